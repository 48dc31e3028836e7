"""What the optimizer holds for each parameter on this rank, for checkpoints."""

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
    """What the optimizer keeps on this rank for one parameter, of its flattened elements from `first` on.

    tensors: `exp_avg`, `exp_avg_sq`, and `main`, the fp32 weights, where the parameter itself is
    not fp32.
    distributed: other data-parallel ranks keep the rest, and not the same.
    """

    first: int
    tensors: dict[str, Tensor]
    distributed: bool


def optimizer_shards(optimizer: MegatronOptimizer, parameters: Sequence[Tensor]) -> dict[Tensor, OptimizerShard]:
    """The state of every parameter that this rank's optimizer has some of. Zeros where it has taken no step yet."""
    found: dict[Tensor, OptimizerShard] = {}
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
            found[parameter] = OptimizerShard(first, tensors, isinstance(inner, DistributedOptimizer))
    return found


def _main_parameters(inner: Any, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(parameter, what Adam updates for it on this rank, its first element) of one of Megatron's chained optimizers."""
    if isinstance(inner, DistributedOptimizer):
        for parameter in inner.model_param_gbuf_map:
            group, place = inner.model_param_group_index_map[parameter]
            main = inner.optimizer.param_groups[group]["params"][place]
            yield parameter, main, inner._get_model_param_range_map(parameter)["param"].start
        return
    updated = {main for group in inner.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = getattr(parameter, "main_param", parameter)  # Megatron's attribute on what is not fp32
        if main in updated:
            yield parameter, main, 0


def set_update_count(optimizer: MegatronOptimizer, updates: int) -> None:
    """Tell Adam how many steps its averages have seen: torch keeps it per parameter, Apex and TE per group."""
    for inner in nonempty_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            if "step" in group or not isinstance(inner.optimizer, torch.optim.AdamW):
                group["step"] = updates
        for state in inner.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)
