"""What a run leaves behind so that nothing is lost: its checkpoints, its books, and the batch that broke it."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_twotower.checkpoint import files, fp8_state
from megatron_twotower.checkpoint.files import ShardedState
from megatron_twotower.checkpoint.sharding import OPTIMIZER_PREFIX
from megatron_twotower.checkpoint.writer import CheckpointWriter, SavedCheckpoint
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.optimizer_state import set_update_count
from megatron_twotower.train import loop
from megatron_twotower.train import progress as train_progress
from megatron_twotower.train.metrics import Metrics


def resume_point(run: Path, config: RunConfig, *, fingerprint: str | None) -> Path | None:
    """The newest checkpoint to go on from, whole and checked against what the run starts from.

    Raises:
        UserError: the checkpoint is damaged, or of another model, objective or backbone.
    """
    if parallel.broadcast_from_main(bool(files.find_checkpoints(run))) and not config.resume:
        raise UserError(f"{run}: holds checkpoints, expected resume=true or another output folder")
    settings = config.train
    found = files.newest_complete(run, verify=settings.verify_checkpoints, on_damaged=settings.on_damaged_checkpoint)
    if parallel.is_main():
        files.clear_leftovers(run)
    if found is None:
        return None
    state = files.read_state(found)
    expected = {"objective": config.objective, "model": dataclasses.asdict(config.model), "fingerprint": fingerprint}
    for key, value in expected.items():
        other = getattr(state, key)
        if other != value:
            raise UserError(f"{found}: found {key} {other}, expected {value}")
    return found


def restore(point: Path, parts: loop.Trainer, sharded_state: ShardedState) -> train_progress.Progress:
    """Fill weights, optimizer and schedule from a checkpoint of any layout; that of an import holds weights alone.

    Scales of FP8 that are not of this precision and layout are left: they begin anew.

    Returns:
        where the run stands.

    Raises:
        UserError: it cannot be read.
    """
    state = files.read_state(point)
    goes_on = fp8_state.can_restore(state.configuration, parts.config)
    if state.step and parts.config.train.precision == "fp8_delayed" and not goes_on and parallel.is_main():
        logging.getLogger(__name__).warning(
            "%s: its precision or layout is another, so the scales of fp8_delayed begin anew", point
        )
    skipped = ((OPTIMIZER_PREFIX,) if state.step == 0 else ()) + (() if goes_on else (fp8_state.FP8_STATE_PREFIX,))
    loaded = files.load(point, lambda: (shard for shard in sharded_state() if not shard.key.startswith(skipped)))
    fp8_state.restore_fp8_state([chunk.module for chunk in parts.model.chunks], loaded)
    if state.step == 0:  # an import
        parts.optimizer.reload_model_params()
    else:
        set_update_count(parts.optimizer, state.updates)
        parts.schedule.load_state_dict(loaded["schedule"])
    return train_progress.resumed(state.step, state.cursor, state.updates, state.window, parts.groups)


class CheckpointHooks:
    """The checkpoints of a run under way: `save` and `saved` are the loop's hooks."""

    def __init__(
        self, run: Path, parts: loop.Trainer, sharded_state: ShardedState, *, fingerprint: str | None, metrics: Metrics
    ) -> None:
        settings = parts.config.train
        self._parts, self._fingerprint, self._metrics = parts, fingerprint, metrics
        self._saver = CheckpointWriter(
            run,
            sharded_state,
            background=settings.checkpoint_async,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every_steps,
        )

    def save(self, progress: train_progress.Progress) -> None:
        config = self._parts.config
        state = files.CheckpointState(
            step=progress.step,
            cursor=progress.cursor,
            updates=progress.updates,
            objective=config.objective,
            backbone=config.init.backbone,
            fingerprint=self._fingerprint,
            model=dataclasses.asdict(config.model),
            window=train_progress.window(progress, self._parts.groups),
            configuration=dataclasses.asdict(config),
        )
        self._record(self._saver.begin(state, self._parts.schedule.state_dict()), progress)
        progress.since = time.perf_counter()

    def saved(self, progress: train_progress.Progress, *, wait: bool) -> None:
        self._record(self._saver.finish() if wait else self._saver.poll(), progress)

    def _record(self, saved: Sequence[SavedCheckpoint], progress: train_progress.Progress) -> None:
        for each in saved:
            self._metrics.log(
                {
                    "kind": "checkpoint",
                    "step": progress.step,
                    "saved_step": each.step,
                    "gib": each.size / 2**30,
                    "stall_seconds": each.stall_seconds,
                    "write_seconds": each.write_seconds,
                }
            )

    def close(self) -> None:
        self._saver.close()
