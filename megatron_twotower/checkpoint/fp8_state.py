"""The state of `fp8_delayed` in checkpoints: scales and histories of Transformer Engine's modules.

Each module writes and reads its own state (`get_extra_state`). Nothing else in a checkpoint depends
on it, and a run in another precision, or without Transformer Engine, does not read it. After every
step all ranks agree on the largest absolute values, from which the scales follow. So all
data-parallel ranks have the same state, and the first of them writes it. It can only be restored
with the tensor, expert and expert-tensor sizes that it was written with (`_LAYOUT`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_twotower.config.schema import RunConfig

# The prefix of these objects' names in a checkpoint.
FP8_STATE_PREFIX = "fp8_scaling."
# The parallel sizes that a module's state depends on. Pipeline sizes are not among them, because a
# layer has the same name on every stage.
_LAYOUT = ("tensor", "expert", "expert_tensor")


def _modules_with_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The submodules that have extra state besides tensors, with their names."""
    for name, submodule in module.named_modules():
        if type(submodule).set_extra_state is not nn.Module.set_extra_state:
            yield name, submodule


def sharded_fp8_state(module: nn.Module, config: RunConfig, groups: ProcessGroupCollection) -> Iterator[ShardedObject]:
    """The FP8 state of this rank.

    There is none in other precisions, because their scales come from the values of the same step.
    """
    if config.train.precision != "fp8_delayed":
        return
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    for name, submodule in _modules_with_state(module):
        yield ShardedObject(f"{FP8_STATE_PREFIX}{name}", submodule.get_extra_state(), (1,), (0,), replica)


def can_restore(saved: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether a run can use the FP8 state of a checkpoint.

    Both must be in `fp8_delayed`, and their ranks must split layers in the same way.

    Args:
        saved: The configuration in the checkpoint.
        config: The configuration of the run.
    """
    own = {name: getattr(config.parallel, name) for name in _LAYOUT}
    same_layout = all(saved.get("parallel", {}).get(name) == value for name, value in own.items())
    precisions = {saved.get("train", {}).get("precision"), config.train.precision}
    return same_layout and precisions == {"fp8_delayed"}


def restore_fp8_state(modules: Sequence[nn.Module], loaded: Mapping[str, Any]) -> None:
    """Set the FP8 state of modules from a checkpoint.

    Args:
        modules: The model chunks of this rank.
        loaded: What `files.load` returned. Modules without an object in it stay unchanged.
    """
    for module in modules:
        for name, submodule in _modules_with_state(module):
            state = loaded.get(f"{FP8_STATE_PREFIX}{name}@0")
            if state is not None:
                submodule.set_extra_state(state)
