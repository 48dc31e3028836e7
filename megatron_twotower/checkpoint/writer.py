"""Writing checkpoints while training goes on.

A save has three parts. Beginning it, on every rank at the same step: agree on who writes what, and
copy that to host memory; this is what training waits for. Writing, in a thread: this rank's file,
and its checksum. Finishing, on every rank when all have written: the index, `state.json`, and the
name. A failed save leaves the older checkpoints alone.
"""

import contextlib
import dataclasses
import queue
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.checkpoint.files import CheckpointState, FileSum, ShardedState
from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.mcore import parallel, patches

# What the first rank writes besides the tensors: Megatron, but for `COMMON`, which it writes up to
# 0.16 alone and reads in every release.
COMMON = "common.pt"
INDEX_FILES = (".metadata", "metadata.json", COMMON)
# Its own way of saving: 0.19 would else ask for nvidia-resiliency-ext.
_OWN_WAY = {} if patches.RELEASE == "0.16" else {"async_strategy": "mcore"}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that has its name. stall_seconds: that training waited. write_seconds: of the slowest rank."""

    step: int
    size: int
    stall_seconds: float
    write_seconds: float


@dataclass(frozen=True)
class _Pending:
    state: CheckpointState
    partial: Path
    request: AsyncRequest
    written: "Future[tuple[dict[str, FileSum], float]]"
    stall_seconds: float


class CheckpointWriter:
    """Saves the checkpoints of a run, one at a time.

    background: write while training goes on. keep, keep_every: as in `checkpoint.retire`.
    """

    def __init__(self, run: Path, pieces: ShardedState, *, background: bool, keep: int, keep_every: int) -> None:
        self._run, self._pieces = run, pieces
        self._background, self._keep, self._keep_every = background, keep, keep_every
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, state: CheckpointState, schedule: dict[str, Any]) -> list[SavedCheckpoint]:
        """Begin to save; where that is not done in the background, finish too. Called by all ranks.

        Returns:
            what was finished meanwhile.

        Raises:
            UserError: this save or the one before could not be written.
        """
        finished = self.finish()
        started = time.perf_counter()
        partial = checkpoint_folder(self._run, state.step)
        partial = partial.with_name(f"{partial.name}.partial")
        if parallel.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with _one_line(partial):
            request = dist_checkpointing.save(
                checkpoint_files.state_dict(self._staged()) | {"schedule": schedule},
                str(partial),
                TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                async_sharded_save=True,
                **_OWN_WAY,
            )
            if parallel.is_main() and not (partial / COMMON).exists():
                torch.save({"schedule": schedule}, partial / COMMON)
        if request.preload_fn is not None:
            buckets = request.preload_fn()  # to host memory
            request = request._replace(async_fn_args=(None, buckets, request.async_fn_args[2]))
        written = self._writer.submit(_write, request)
        self._pending = _Pending(state, partial, request, written, time.perf_counter() - started)
        return finished if self._background else finished + self.finish()

    def _staged(self) -> Any:
        """The pieces, copied where training would otherwise go on changing what is being written."""
        for piece in self._pieces():
            if self._background and device.is_cpu() and isinstance(piece, ShardedTensor):
                piece.data = piece.data.clone(memory_format=torch.contiguous_format)
            yield piece

    def poll(self) -> list[SavedCheckpoint]:
        """Finish the save that all ranks have written, if there is one. Called by all ranks at the same step.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is None or parallel.any_rank(not self._pending.written.done()):
            return []
        return self.finish()

    def finish(self) -> list[SavedCheckpoint]:
        """Wait for the save that is under way, if there is one, and give it its name. Called by all ranks.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        started = time.perf_counter()
        error = pending.written.exception()
        if parallel.any_rank(error is not None):
            reasons = [text for text in parallel.gather_objects(error and _reason(error)) if text]
            if parallel.is_main():
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise UserError(_cannot_be_written(pending.partial, reasons[0]))
        sums, seconds = pending.written.result()
        with _one_line(pending.partial):
            for finalise in pending.request.finalize_fns:
                finalise()
        outcomes = parallel.gather_objects((sums, seconds))
        size = sum(each.size for files, _ in outcomes for each in files.values())
        problem = self._publish(pending, [files for files, _ in outcomes]) if parallel.is_main() else None
        if problem := parallel.broadcast_from_main(problem):
            raise UserError(problem)
        stall = pending.stall_seconds + time.perf_counter() - started
        return [SavedCheckpoint(pending.state.step, size, stall, max(each for _, each in outcomes))]

    def _publish(self, pending: _Pending, written: list[dict[str, FileSum]]) -> str | None:
        """Give the checkpoint its name. Returns what went wrong, for all ranks to raise."""
        files = {name: found for each in written for name, found in each.items()}
        try:
            files |= {name: checkpoint_files.checksum(pending.partial / name) for name in INDEX_FILES}
            checkpoint_files.write_state(pending.partial, dataclasses.replace(pending.state, files=files))
            checkpoint_files.publish(pending.partial, checkpoint_folder(self._run, pending.state.step))
            checkpoint_files.retire(self._run, keep=self._keep, keep_every=self._keep_every)
        except OSError as error:
            shutil.rmtree(pending.partial, ignore_errors=True)
            return _cannot_be_written(pending.partial, _reason(error))
        return None

    def close(self) -> None:
        """End the writing thread; an unfinished save is never given its name."""
        self._writer.shutdown()


def _write(request: AsyncRequest) -> tuple[dict[str, FileSum], float]:
    """Write this rank's file. Returns its checksum, by name, and seconds.

    In this process: megatron-core 0.16.1 forks one to write, which outlives a training process that
    is killed and then writes into the folder of the next.
    """
    started = time.perf_counter()
    if request.async_fn is None:
        return {}, 0.0
    transforms, _ = request.async_fn.args
    _, buckets, results = request.async_fn_args
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        outcome: queue.Queue[Any] = queue.Queue()
        busy: queue.Queue[int] = queue.Queue()
        busy.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcome, busy, True)
        _, found = outcome.get()
        if isinstance(found, Exception):
            raise found
        written[number] = found
    results.put(written)
    sums = {Path(file).name: checkpoint_files.checksum(Path(file)) for file, _, _ in buckets}
    return sums, time.perf_counter() - started


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _cannot_be_written(partial: Path, reason: str) -> str:
    folder = partial.name.removesuffix(".partial")
    return f"{partial.parent / folder}: cannot be written ({reason}); older checkpoints are whole"


@contextlib.contextmanager
def _one_line(partial: Path) -> Any:
    try:
        yield
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError) as error:
        raise UserError(_cannot_be_written(partial, _reason(error))) from error
