"""The parameters of a rank, counted in its modules, built without memory or other ranks."""

from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.transformer_config import transformer_config
from megatron_twotower.model.parameter_map import canonical_name
from megatron_twotower.model.towers import BackboneModel, TwoTower, build_context_tower
from megatron_twotower.plan.weights import Parameter, RankParameters, projections_by_layer


def parameters_of_modules(config, layout, *, rank):
    """The `RankParameters` of a rank, from modules whose tensors have shapes but no memory."""
    with parallel.pretend_rank(config, ranks=layout.ranks, rank=rank) as groups, FakeTensorMode():
        megatron = transformer_config(config, transformer_impl="local")
        # Megatron forks its random state for every weight that it initialises, which takes long.
        megatron.perform_initialization = False
        stages = stages_of_rank(config.model, config.parallel, groups.pp.rank())
        if config.objective == "ar":
            return RankParameters(0, tuple(_trained(BackboneModel(config, megatron, groups, s)) for s in stages))
        contexts = [build_context_tower(config, megatron, groups, stage) for stage in stages]
        frozen = [(canonical_name(n), p.numel()) for context in contexts for n, p in context.named_parameters()]
        return RankParameters(
            context=sum(elements for _, elements in frozen),
            chunks=tuple(_trained(TwoTower(config, megatron, groups, context)) for context in contexts),
            projections=projections_by_layer(frozen),
        )


def _trained(module):
    # Megatron sets `allreduce` to False on the parameters of experts, if experts are parallel.
    return tuple(
        Parameter(canonical_name(name), p.numel(), not getattr(p, "allreduce", True))
        for name, p in module.named_parameters()
    )
