"""Loading of named Hugging Face tensors into Megatron modules. Each rank loads its part."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert.tensors import TensorSource
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.model.parameter_map import (
    Entry,
    canonical_tensors,
    hf_shapes,
    name_on_rank,
    parameter_from_hf,
    shard,
)


@torch.no_grad()
def load_weights(
    module: nn.Module,
    entries: Sequence[Entry],
    source: TensorSource | None,
    *,
    model: ModelConfig,
    groups: ProcessGroupCollection,
    copies: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill every parameter of a module from named tensors. Each rank fills its part.

    Args:
        module: The module on this rank.
        entries: The entries of all parameters of the module.
        source: The Hugging Face tensors. `None` if a checkpoint follows: then nothing is read, and
            what the checkpoint should lack is NaN.
        model: The shapes of the model.
        groups: The process groups of this rank.
        copies: Parameters of this rank that are copied instead of read, by the names of the entries
            on this rank.

    Raises:
        UserError: A tensor is missing or has another shape.
        AssertionError: A parameter of the module has no entry.
    """
    targets = canonical_tensors(module)
    for entry in entries:
        ep = groups.ep
        name = name_on_rank(entry, experts=model.n_routed_experts, rank=ep.rank(), ranks=ep.size())
        if name is None:
            continue
        target = targets.pop(name)
        if source is None:
            target.fill_(torch.nan)
            continue
        if copies and name in copies:
            target.copy_(copies[name])
            continue
        parameter = _complete_parameter(entry, [source(hf) for hf in entry.hf_names], model)
        group = groups.tp if entry.expert is None else groups.expt_tp
        target.copy_(shard(parameter, entry, rank=group.rank(), ranks=group.size()))
    assert not targets, f"parameters without an entry: {sorted(targets)}"


def _complete_parameter(entry: Entry, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """Check the shapes of Hugging Face tensors, and convert them to the complete parameter."""
    for (name, shape), tensor in zip(hf_shapes([entry], model).items(), tensors, strict=True):
        if tensor.shape != shape:
            raise UserError(f"tensor {name}: found shape {tuple(tensor.shape)}, expected {shape}")
    return parameter_from_hf(entry, tensors, model)
