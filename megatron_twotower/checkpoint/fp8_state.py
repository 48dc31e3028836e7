"""What `fp8_delayed` remembers of the steps before, in checkpoints: the scales of Transformer Engine's modules.

Each module writes and reads its own (`get_extra_state`); the rest of a checkpoint does not depend
on it, and a run in another precision or spec does not ask for it. After every step ranks have
agreed on the largest values, so all data-parallel ranks hold the same, and the first of them writes
it. It is of the layout that it was made in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_twotower.config.schema import RunConfig

# What the names of these objects in a checkpoint begin with.
FP8_STATE_PREFIX = "fp8_scaling."
# What a module's share of experts and of matrices depends on; pipeline stages keep their layers'
# numbers.
_LAYOUT = ("tensor", "expert", "expert_tensor")


def _modules_with_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a module that have more to keep than tensors, by name."""
    for name, part in module.named_modules():
        if type(part).set_extra_state is not nn.Module.set_extra_state:
            yield name, part


def sharded_fp8_state(module: nn.Module, config: RunConfig, groups: ProcessGroupCollection) -> Iterator[ShardedObject]:
    """What this rank remembers; nothing in other precisions, whose scales come from the values at hand."""
    if config.train.precision != "fp8_delayed":
        return
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    for name, part in _modules_with_state(module):
        yield ShardedObject(f"{FP8_STATE_PREFIX}{name}", part.get_extra_state(), (1,), (0,), replica)


def can_restore(saved: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether the scales in a checkpoint are those of a run: both fp8_delayed, on ranks that split layers alike.

    Args:
        saved: the configuration in the checkpoint.
    """
    own = {name: getattr(config.parallel, name) for name in _LAYOUT}
    alike = all(saved.get("parallel", {}).get(name) == value for name, value in own.items())
    precisions = {saved.get("train", {}).get("precision"), config.train.precision}
    return alike and precisions == {"fp8_delayed"}


def restore_fp8_state(modules: Sequence[nn.Module], loaded: Mapping[str, Any]) -> None:
    """Give modules what a checkpoint holds for them.

    Args:
        loaded: by the keys of `checkpoint.state_dict`; without such objects nothing happens.
    """
    for module in modules:
        for name, part in _modules_with_state(module):
            state = loaded.get(f"{FP8_STATE_PREFIX}{name}@0")
            if state is not None:
                part.set_extra_state(state)
