"""Named Hugging Face tensors into Megatron modules, each rank its part."""

from collections.abc import Sequence

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
    source: TensorSource,
    *,
    model: ModelConfig,
    groups: ProcessGroupCollection,
) -> None:
    """Fill every parameter of a module from named tensors, each rank its own part.

    Raises:
        UserError: a tensor is missing or has another shape.
        AssertionError: a parameter of the module is in no entry.
    """
    targets = canonical_tensors(module)
    for entry in entries:
        ep = groups.ep
        name = name_on_rank(entry, experts=model.n_routed_experts, rank=ep.rank(), ranks=ep.size())
        if name is None:
            continue
        target = targets.pop(name)
        whole = whole_parameter(entry, [source(hf) for hf in entry.hf_names], model)
        group = groups.tp if entry.expert is None else groups.expt_tp
        target.copy_(shard(whole, entry, rank=group.rank(), ranks=group.size()))
    assert not targets, f"parameters without an entry: {sorted(targets)}"


def whole_parameter(entry: Entry, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """Hugging Face tensors -> Megatron's layout, checked.

    Raises:
        UserError: the shape is not the configuration's.
    """
    for (name, shape), tensor in zip(hf_shapes([entry], model).items(), tensors, strict=True):
        if tensor.shape != shape:
            raise UserError(f"tensor {name}: found shape {tuple(tensor.shape)}, expected {shape}")
    return parameter_from_hf(entry, tensors, model)
