"""Training state on disk: Megatron distributed checkpoints of what trains, and a readable `state.json`.

A run folder holds `checkpoints/step-00000100/`. A checkpoint is written beside its place and renamed when every rank
has finished: a folder with that name is whole. The frozen context tower is not stored, only where it came from and
its fingerprint, which is verified on resume.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_twotower.config import ModelConfig
from megatron_twotower.names import Entry, local_expert_name
from megatron_twotower.parallel import is_main
from megatron_twotower.records import UserError

# Makes the sharded tensors of all that trains. A callable, because Megatron empties them as it saves or loads.
ShardedWeights = Callable[[], dict[str, Any]]

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself, in `state.json`.

    fingerprint: of the backbone both towers start from. window: sums since the last logged record, over all ranks,
    so that the next record is the one an uninterrupted run writes.
    """

    step: int
    cursor: int
    objective: str
    backbone: str | None
    fingerprint: str | None
    model: dict[str, Any]
    window: dict[str, Any]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-????????")
    return sorted(path for path in found if (path / "state.json").is_file())


def read_state(folder: Path) -> CheckpointState:
    """
    Raises:
        UserError: not a checkpoint of this program.
    """
    try:
        return CheckpointState(**json.loads((folder / "state.json").read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}/state.json: not a checkpoint ({error}), expected one of this program") from error


def _sharded(name: str, tensor: Tensor, entry: Entry, groups: ProcessGroupCollection) -> Any:
    """How one parameter is spread over ranks, for Megatron's distributed checkpoint.

    Parts that are each split by themselves are stored each by itself, so that another layout can cut them again.
    """
    expert = entry.expert is not None
    group, replicas = (groups.expt_tp, groups.expt_dp) if expert else (groups.tp, groups.dp_cp)
    rank, ranks = group.rank(), group.size()
    replica = (0, 0 if entry.split is not None else rank, replicas.rank())

    def piece(key: str, data: Tensor, replica_id: tuple[int, int, int]) -> ShardedTensor:
        offsets = [] if entry.split is None else [(entry.split, rank, ranks)]
        return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica_id)

    if not entry.parts:
        return piece(name, tensor, replica)
    sizes, axis = [part // ranks for part in entry.parts], entry.split or 0

    def build(key: str, data: Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        pieces = data.split(sizes, dim=axis)
        return [piece(f"{key}.part{i}", part, replica_id) for i, part in enumerate(pieces)]

    return ShardedTensorFactory(name, tensor, build, lambda pieces: torch.cat(pieces, dim=axis), replica)


def sharded_weights(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> dict[str, Any]:
    """Sharded tensors of all that trains, under names that do not depend on the layout."""
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    sharded = {}
    for entry in entries:
        ranks = groups.ep
        local = local_expert_name(entry, experts=model.n_routed_experts, rank=ranks.rank(), ranks=ranks.size())
        if local is not None:
            sharded[entry.megatron] = _sharded(entry.megatron, held[local], entry, groups)
    return sharded


def _optimizer_state(optimizer: MegatronOptimizer, weights: dict[str, Any], *, loading: bool) -> Any:
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}
    return optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)


def save_checkpoint(
    run: Path, state: CheckpointState, *, weights: ShardedWeights, optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler, keep: int,
) -> None:  # fmt: skip
    """Write the checkpoint of a step; on return every rank's part is on disk and the folder has its name.

    Args:
        weights: makes the sharded weights.
        keep: how many of the newest checkpoints stay.
    """
    folder = checkpoint_folder(run, state.step)
    partial = folder.with_name(f"{folder.name}.partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    sharded = weights()
    content = {
        "weights": sharded,
        "optimizer": _optimizer_state(optimizer, sharded, loading=False),
        "schedule": schedule.state_dict(),
    }
    dist_checkpointing.save(content, str(partial), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    dist.barrier()
    if is_main():
        (partial / "state.json").write_text(json.dumps(state.__dict__, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in find_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


@torch.no_grad()
def load_weights_of(folder: Path, weights: ShardedWeights) -> None:
    """Fill the tensors behind sharded weights from a checkpoint of any layout.

    Raises:
        UserError: the checkpoint cannot be read, or is of another shape.
    """
    _copy(weights(), _load(folder, {"weights": weights()})["weights"])


@torch.no_grad()
def load_checkpoint(
    folder: Path, *, weights: ShardedWeights, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler
) -> None:
    """Restore weights, optimizer and schedule, exactly as they were saved; of step 0 there are weights alone.

    Raises:
        UserError: the checkpoint cannot be read, or is of another shape.
    """
    if read_state(folder).step == 0:  # an import
        load_weights_of(folder, weights)
        optimizer.reload_model_params()
        return
    sharded = weights()
    content = {
        "weights": sharded,
        "optimizer": _optimizer_state(optimizer, sharded, loading=True),
        "schedule": schedule.state_dict(),
    }
    loaded = _load(folder, content)
    _copy(weights(), loaded["weights"])
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])


def _load(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(content, str(folder))
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()
        detail = reason[0] if reason else type(error).__name__
        raise UserError(f"{folder}: cannot be loaded ({detail}), expected a whole checkpoint of this model") from error


def _copy(weights: dict[str, Any], loaded: dict[str, Tensor]) -> None:
    for name, sharded in weights.items():
        sharded.data.copy_(loaded[name])
