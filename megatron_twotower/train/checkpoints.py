"""Resuming a run from its newest checkpoint, and saving checkpoints during a run."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_twotower.checkpoint import files, fp8_state
from megatron_twotower.checkpoint.files import CheckpointState, ShardedState
from megatron_twotower.checkpoint.sharding import OPTIMIZER_PREFIX, complete, read_as_fp32
from megatron_twotower.checkpoint.writer import CheckpointWriter, SavedCheckpoint
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.data.sources import check_unchanged, order_settings
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.optimizer_state import optimizer_shards, set_update_count
from megatron_twotower.model.parameter_map import entries_of_stage, trained_entries
from megatron_twotower.train.loop import Trainer
from megatron_twotower.train.metrics import Metrics
from megatron_twotower.train.progress import TrainingProgress, log_window, restore_progress


def find_checkpoint(run: Path, config: RunConfig, *, fingerprint: str | None) -> Path | None:
    """Return the newest complete checkpoint of a run; None without one.

    Args:
        run: The run folder.
        config: The configuration that the checkpoint must fit.
        fingerprint: SHA-256 of the backbone that the run starts from.

    Raises:
        UserError: The checkpoint is damaged, or of a run that was configured differently; or none
            is left of an earlier run; or there was one and `resume` is false.
    """
    if not config.resume:
        files.check_fresh(run, resume=False)
    settings = config.train
    found = files.newest_complete(run, verify=settings.verify_checkpoints, on_damaged=settings.on_damaged_checkpoint)
    if parallel.is_main():
        files.clear_leftovers(run)
    if found is None:
        files.check_fresh(run, resume=config.resume)
        return None
    state = parallel.from_main(lambda: files.read_state(found))
    expected = {"objective": config.objective, "model": dataclasses.asdict(config.model), "fingerprint": fingerprint}
    for key, value in expected.items():
        other = getattr(state, key)
        if other != value:
            raise UserError(f"{found}: found {key} {other}, expected {value}")
    _check_fixed(found, state, config)
    _check_window(found, state, config)
    return found


# Settings that change what the denoiser computes from the same input. A checkpoint of an import is
# of step 0, and its configuration knows no mask token unless the folder names one.
_FIXED = {
    "conditioning": ("frequencies", "period", "time_scale", "round_time_to_bf16", "without"),
    "noise": ("mask_token_id", "token_shift"),
}


def _check_fixed(checkpoint: Path, state: CheckpointState, config: RunConfig) -> None:
    """Compare settings that may not change during a run with those in its checkpoint.

    Raises:
        UserError: One of them has changed.
    """
    if config.objective != "two_tower":
        return
    now, defaults = dataclasses.asdict(config), dataclasses.asdict(RunConfig())
    for section, names in _FIXED.items():
        # A key that an older version did not have counts as its default.
        before = state.configuration.get(section, {})
        before = defaults[section] | before if before else now[section]
        for name in names:
            if (state.step or name != "mask_token_id") and before[name] != now[section][name]:
                raise UserError(
                    f"{section}.{name}: found {now[section][name]}, expected {before[name]}, as in {checkpoint}"
                )


def _check_window(checkpoint: Path, state: CheckpointState, config: RunConfig) -> None:
    """Refuse other ranges of the noise level than those of the sums for the next record.

    Raises:
        UserError: Their number has changed.
    """
    sums, buckets = state.window.sums, config.noise.report_buckets
    if config.objective == "two_tower" and sums is not None and len(sums) != 2 + 2 * buckets:
        raise UserError(
            f"noise.report_buckets: found {buckets}, expected {len(sums) // 2 - 1} up to the next record: {checkpoint} "
            "has sums of the steps since the last one"
        )


def check_data(checkpoint: Path | None, run: Path, found: dict[str, Any]) -> None:
    """Compare the data with what the run has read up to a checkpoint.

    Checkpoints of older versions do not say what it was; then `provenance.json` does, or at least
    the configuration in the checkpoint.

    Args:
        checkpoint: The checkpoint to resume from.
        run: The run folder.
        found: `data_summary` of this start.

    Raises:
        UserError: They differ.
    """
    if checkpoint is None:
        return
    state = files.read_state(checkpoint)
    if state.step:
        order = found | {"order": order_settings(state.configuration)}
        before = state.data or run_folder.read_provenance(run).get("data") or order
        check_unchanged(found, before, cursor=state.cursor)


def restore(checkpoint: Path, trainer: Trainer, sharded_state: ShardedState) -> TrainingProgress:
    """Fill weights, optimizer and schedule from a checkpoint that any layout wrote.

    The checkpoint of an import contains only weights. Between fp32 and other precisions the fp32
    weights that Adam updates are the same. FP8 scales of another precision or layout are not
    loaded: they start from their initial values.

    Returns:
        How far the run is.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    state = parallel.from_main(lambda: files.read_state(checkpoint))
    imported = state.step == 0
    same_scales = fp8_state.can_restore(state.configuration, trainer.config)
    if not imported and trainer.config.train.precision == "fp8_delayed" and not same_scales and parallel.is_main():
        logging.getLogger(__name__).warning(
            "%s: has another precision or layout, so the scales of fp8_delayed start from their initial values",
            checkpoint,
        )
    skipped = ((OPTIMIZER_PREFIX,) if imported else ()) + (() if same_scales else (fp8_state.FP8_STATE_PREFIX,))
    shards = [item for item in sharded_state() if not item.key.startswith(skipped)]
    main: list[ShardedTensor | ShardedObject] = []
    precisions = (state.configuration["train"]["precision"], trainer.config.train.precision)
    other_precision = not imported and precisions.count("fp32") == 1
    if other_precision:
        shards, main = read_as_fp32(shards, files.stored_names(checkpoint))
    loaded = files.load(checkpoint, lambda: shards)
    if other_precision:
        files.load(checkpoint, lambda: main)
    _complete(trainer, optimizer=not imported)
    fp8_state.restore_fp8_state([chunk.module for chunk in trainer.model.chunks], loaded)
    if imported:
        trainer.optimizer.reload_model_params()
    else:
        set_update_count(trainer.optimizer, state.updates)
        trainer.schedule.load_state_dict(loaded["schedule"])
    return restore_progress(state, trainer.groups)


def _complete(trainer: Trainer, *, optimizer: bool) -> None:
    """Get what other data-parallel ranks have loaded of what all of them have."""
    config, modules = trainer.config, [chunk.module for chunk in trainer.model.chunks]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    shards = optimizer_shards(trainer.optimizer, parameters) if optimizer else {}
    entries = trained_entries(config)
    for module in modules:
        of_chunk = entries_of_stage(entries, module.tower.stage)
        complete(module, of_chunk, config.model, trainer.groups, shards)


class CheckpointSaver:
    """Saves the checkpoints of a run, and logs a record of each.

    Args:
        run: The run folder.
        trainer: What this rank trains with.
        sharded_state: Returns what a checkpoint stores of this rank.
        fingerprint: SHA-256 of the backbone that the run starts from.
        metrics: Receives the records.
        data: `data_summary` of the run.
        check_lock: As in `CheckpointWriter`.
    """

    def __init__(
        self,
        run: Path,
        trainer: Trainer,
        sharded_state: ShardedState,
        *,
        fingerprint: str | None,
        metrics: Metrics,
        data: dict[str, Any],
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        settings = trainer.config.train
        self._trainer, self._fingerprint, self._metrics, self._data = trainer, fingerprint, metrics, data
        self._writer = CheckpointWriter(
            run,
            sharded_state,
            background=settings.checkpoint_async,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every_steps,
            check_lock=check_lock,
        )

    def save(self, progress: TrainingProgress) -> None:
        """Begin to save the state; called by all ranks at the same step."""
        config = self._trainer.config
        state = files.CheckpointState(
            step=progress.step,
            cursor=progress.cursor,
            updates=progress.updates,
            objective=config.objective,
            backbone=config.init.backbone,
            fingerprint=self._fingerprint,
            model=dataclasses.asdict(config.model),
            window=log_window(progress, self._trainer.groups),
            configuration=dataclasses.asdict(config),
            data=self._data,
        )
        self._log(self._writer.begin(state, self._trainer.schedule.state_dict()), progress)
        progress.window_started = time.perf_counter()

    def finish(self, progress: TrainingProgress, *, wait: bool) -> None:
        """Finish a save whose files are written; with `wait`, wait for them."""
        self._log(self._writer.finish() if wait else self._writer.poll(), progress)
        self._writer.confirm(progress.updates)

    def work_done(self) -> int:
        """Return a number that changes while this rank writes files; any thread may call this."""
        return self._writer.work_done()

    def _log(self, saved: Sequence[SavedCheckpoint], progress: TrainingProgress) -> None:
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
        """End the thread that writes."""
        self._writer.close()
