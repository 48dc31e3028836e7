"""The optimizer state of this rank, parameter by parameter, as checkpoints store it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor


def nonempty_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The chained optimizers that have parameters on this rank."""
    return [inner for inner in optimizer.chained_optimizers if inner.optimizer is not None]


@dataclass(frozen=True)
class OptimizerShard:
    """The optimizer state of one parameter that this rank keeps.

    Attributes:
        first: The index in the flattened parameter of the first element of the shard.
        tensors: `exp_avg`, `exp_avg_sq` and, if the parameter is not fp32, `main`, its fp32 copy.
            Each is flat and has the elements from `first` on.
        distributed: Whether each data-parallel rank keeps another shard of the parameter.
    """

    first: int
    tensors: dict[str, Tensor]
    distributed: bool


def optimizer_shards(optimizer: MegatronOptimizer, parameters: Sequence[Tensor]) -> dict[Tensor, OptimizerShard]:
    """The shard of each parameter of which this rank keeps optimizer state.

    State that the optimizer has not created yet, because it has taken no step, is created with
    zeros.
    """
    shards: dict[Tensor, OptimizerShard] = {}
    for inner in nonempty_optimizers(optimizer):
        for parameter, main, first in _main_parameters(inner, parameters):
            state = inner.optimizer.state[main]
            if "exp_avg" not in state:
                state |= {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
                if isinstance(inner.optimizer, torch.optim.AdamW):
                    state["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
            tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            if main.dtype != parameter.dtype:
                tensors["main"] = main
            shards[parameter] = OptimizerShard(first, tensors, isinstance(inner, DistributedOptimizer))
    return shards


def _main_parameters(inner: Any, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The parameters of one of Megatron's chained optimizers.

    Yields:
        (parameter, the tensor that Adam updates for it on this rank, index of its first element).
    """
    if isinstance(inner, DistributedOptimizer):
        for parameter in inner.model_param_gbuf_map:
            group, index = inner.model_param_group_index_map[parameter]
            main = inner.optimizer.param_groups[group]["params"][index]
            yield parameter, main, inner._get_model_param_range_map(parameter)["param"].start
        return
    updated = {main for group in inner.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = getattr(parameter, "main_param", parameter)  # Megatron sets it on parameters that are not fp32
        if main in updated:
            yield parameter, main, 0


def set_update_count(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the number of updates that Adam's averages have seen.

    torch stores it per parameter, Apex and Transformer Engine per parameter group.
    """
    for inner in nonempty_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            if "step" in group or not isinstance(inner.optimizer, torch.optim.AdamW):
                group["step"] = updates
        for state in inner.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)
