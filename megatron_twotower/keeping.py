"""What a run leaves behind so that nothing is lost: its checkpoints, its books, and the batch that broke it."""

import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_twotower import checkpoint, ledger, parallel, scaling, trainer
from megatron_twotower.checkpoint import Pieces
from megatron_twotower.config import RunConfig
from megatron_twotower.metrics import Metrics
from megatron_twotower.optimizer import set_updates
from megatron_twotower.pieces import OF_OPTIMIZER
from megatron_twotower.records import Batch, UserError
from megatron_twotower.saving import Saved, Saver


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, which Slurm sends ahead of the end of a job's time."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def __call__(self) -> bool:
        return parallel.any_rank(self.received is not None)


def resume_point(run: Path, config: RunConfig, *, fingerprint: str | None) -> Path | None:
    """The newest checkpoint to go on from, whole and checked against what the run starts from.

    Raises:
        UserError: the checkpoint is damaged, or of another model, objective or backbone.
    """
    if parallel.from_main(bool(checkpoint.find_checkpoints(run))) and not config.resume:
        raise UserError(f"{run}: holds checkpoints, expected resume=true or another output folder")
    settings = config.train
    found = checkpoint.newest_whole(run, verify=settings.verify_checkpoints, on_damaged=settings.on_damaged_checkpoint)
    if parallel.is_main():
        checkpoint.clear_leftovers(run)
    if found is None:
        return None
    state = checkpoint.read_state(found)
    expected = {"objective": config.objective, "model": dataclasses.asdict(config.model), "fingerprint": fingerprint}
    for key, value in expected.items():
        other = getattr(state, key)
        if other != value:
            raise UserError(f"{found}: found {key} {other}, expected {value}")
    return found


def restore(point: Path, parts: trainer.Trainer, pieces: Pieces) -> trainer.Progress:
    """Fill weights, optimizer and schedule from a checkpoint of any layout; that of an import holds weights alone.

    Scales of FP8 that are not of this precision and layout are left: they begin anew.

    Returns:
        where the run stands.

    Raises:
        UserError: it cannot be read.
    """
    state = checkpoint.read_state(point)
    goes_on = scaling.goes_on(state.configuration, parts.config)
    if state.step and parts.config.train.precision == "fp8_delayed" and not goes_on and parallel.is_main():
        logging.getLogger(__name__).warning(
            "%s: its precision or layout is another, so the scales of fp8_delayed begin anew", point
        )
    skipped = ((OF_OPTIMIZER,) if state.step == 0 else ()) + (() if goes_on else (scaling.OF_SCALING,))
    loaded = checkpoint.load(point, lambda: (piece for piece in pieces() if not piece.key.startswith(skipped)))
    scaling.restore_scaling([part.module for part in parts.model.parts], loaded)
    if state.step == 0:  # an import
        parts.optimizer.reload_model_params()
    else:
        set_updates(parts.optimizer, state.updates)
        parts.schedule.load_state_dict(loaded["schedule"])
    return trainer.resumed(state.step, state.cursor, state.updates, state.window, parts.groups)


class Keeper:
    """The checkpoints of a run under way: `save` and `saved` are the loop's hooks."""

    def __init__(
        self, run: Path, parts: trainer.Trainer, pieces: Pieces, *, fingerprint: str | None, metrics: Metrics
    ) -> None:
        settings = parts.config.train
        self._parts, self._fingerprint, self._metrics = parts, fingerprint, metrics
        self._saver = Saver(
            run,
            pieces,
            background=settings.checkpoint_async,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every_steps,
        )

    def save(self, progress: trainer.Progress) -> None:
        config = self._parts.config
        state = checkpoint.CheckpointState(
            step=progress.step,
            cursor=progress.cursor,
            updates=progress.updates,
            objective=config.objective,
            backbone=config.init.backbone,
            fingerprint=self._fingerprint,
            model=dataclasses.asdict(config.model),
            window=trainer.window(progress, self._parts.groups),
            configuration=dataclasses.asdict(config),
        )
        self._record(self._saver.begin(state, self._parts.schedule.state_dict()), progress)
        progress.since = time.perf_counter()

    def saved(self, progress: trainer.Progress, *, wait: bool) -> None:
        self._record(self._saver.finish() if wait else self._saver.poll(), progress)

    def _record(self, saved: Sequence[Saved], progress: trainer.Progress) -> None:
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


def bookkeeper(run: Path, config: RunConfig, groups: ProcessGroupCollection) -> Callable[[Sequence[Batch], int], None]:
    """Writes this rank's line of the ledger for a step; nothing where none is asked for, or another rank has it."""
    start = parallel.from_main(time.time_ns())
    if not config.train.ledger or groups.tp.rank() or groups.pp.rank():
        return lambda batches, step: None
    stream = ledger.open_ledger(run, rank=groups.dp_cp.rank())

    def write(batches: Sequence[Batch], step: int) -> None:
        stream.write(ledger.entry(batches, start=start, step=step))

    return write


def batch_keeper(run: Path) -> Callable[[Sequence[Batch], int], str]:
    """Writes the micro-batches of a step that could not be used to the run folder, each rank its own."""

    def keep(batches: Sequence[Batch], step: int) -> str:
        folder = run / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{step:08d}-rank-{parallel.rank():05d}.pt"
        torch.save([dataclasses.asdict(batch) for batch in batches], file)
        return str(file)

    return keep
