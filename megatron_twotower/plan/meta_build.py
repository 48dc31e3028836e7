"""The modules of one rank, built without memory and without the other ranks: what the table of names is checked by."""

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.transformer_config import TransformerConfig, transformer_config
from megatron_twotower.model.parameter_map import canonical_name
from megatron_twotower.model.towers import BackboneModel, TwoTower, build_context_tower
from megatron_twotower.plan.layout import Layout
from megatron_twotower.plan.weights import Parameter, RankParameters, by_layer


def build(config: RunConfig, layout: Layout, *, rank: int = 0) -> RankParameters:
    """Build what a rank of a layout would build, with tensors that have shapes but no memory, and count it."""
    with parallel.pretend_rank(config, ranks=layout.ranks, rank=rank) as groups, FakeTensorMode():
        megatron = _without_initialisation(transformer_config(config, transformer_impl="local"))
        own = stages_of_rank(config.model, config.parallel, groups.pp.rank())
        if config.objective == "ar":
            return RankParameters(0, tuple(_trained(BackboneModel(config, megatron, groups, stage)) for stage in own))
        contexts = [build_context_tower(config, megatron, groups, stage) for stage in own]
        frozen = [(canonical_name(n), p.numel()) for context in contexts for n, p in context.named_parameters()]
        chunks = tuple(_trained(TwoTower(config, megatron, groups, context)) for context in contexts)
        return RankParameters(sum(elements for _, elements in frozen), chunks, by_layer(frozen))


def _without_initialisation(megatron: TransformerConfig) -> TransformerConfig:
    # Megatron forks its random state around every weight that it initialises, even by a function
    # that does nothing.
    megatron.perform_initialization = False
    return megatron


def _trained(module: nn.Module) -> tuple[Parameter, ...]:
    # Megatron marks by `allreduce` what is summed over all data-parallel ranks; experts are not.
    return tuple(
        Parameter(canonical_name(name), p.numel(), not getattr(p, "allreduce", True))
        for name, p in module.named_parameters()
    )
