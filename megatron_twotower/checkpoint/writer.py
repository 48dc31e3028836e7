"""Writes checkpoints while training continues.

A save has three parts:

1. Begin, on all ranks at the same step: agree on which rank writes what, and copy the state to host
   memory. Training waits for this part.
2. Write, in a thread: the data file of this rank, and its checksum.
3. Finish, on all ranks after all have written: write the index and `state.json`, and rename the
   folder.

A save that fails does not change the older checkpoints.
"""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint import CheckpointException

from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.checkpoint.files import CheckpointState, FileSum, ShardedState
from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import is_seen
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.mcore import async_save, meeting, parallel
from megatron_twotower.mcore.async_save import AsyncSave


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete and has its final name.

    Attributes:
        step: The step of the checkpoint.
        size: Bytes of the data files of all ranks.
        stall_seconds: Seconds that training waited.
        write_seconds: Seconds that the slowest rank wrote.
    """

    step: int
    size: int
    stall_seconds: float
    write_seconds: float


@dataclass(frozen=True)
class _PendingSave:
    state: CheckpointState
    partial: Path
    save: AsyncSave
    written: Future[tuple[dict[str, FileSum], float]]
    stall_seconds: float


class CheckpointWriter:
    """Saves the checkpoints of a run, one at a time."""

    def __init__(
        self,
        run: Path,
        sharded_state: ShardedState,
        *,
        background: bool,
        keep: int,
        keep_every: int,
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the writing thread.

        Args:
            run: The run folder.
            sharded_state: Returns the state that a checkpoint stores.
            background: Whether to write while training continues.
            keep: As in `files.retire`.
            keep_every: As in `files.retire`.
            check_lock: Raises a `UserError` if the folder is another run's by now. The first rank
                calls it before it changes the folder.
        """
        self._run, self._sharded_state, self._check_lock = run, sharded_state, check_lock
        self._background, self._keep, self._keep_every = background, keep, keep_every
        self._pending: _PendingSave | None = None
        self._saves, self._bytes_written, self._bytes_read = 0, 0, 0
        self._unproven: CheckpointState | None = None
        self._validated = False  # the shards of a process are the same at every save
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, state: CheckpointState, schedule: dict[str, Any]) -> list[SavedCheckpoint]:
        """Begin a save, and finish it unless the writer works in the background.

        All ranks call this.

        Args:
            state: The content of `state.json`, without the list of files.
            schedule: The state of the learning-rate schedule.

        Returns:
            The checkpoints that this call finished.

        Raises:
            UserError: This save or the previous one could not be written.
        """
        finished = self.finish()
        started = time.perf_counter()
        partial = checkpoint_folder(self._run, state.step)
        partial = partial.with_name(f"{partial.name}.partial")
        parallel.from_main(lambda: self._prepare(partial))
        with _one_line_errors(partial):
            sharded_state = checkpoint_files.state_dict(self._stable_state())
            save = async_save.prepare_save(
                sharded_state, partial, common={"schedule": schedule}, validate=not self._validated
            )
        self._validated = True
        save.copy_to_host()
        self._saves += 1
        written = self._writer.submit(_write, save, self._note_read)
        threading.Thread(target=self._measure, args=(save, written), name="size of a save", daemon=True).start()
        self._pending = _PendingSave(state, partial, save, written, time.perf_counter() - started)
        return finished if self._background else finished + self.finish()

    def _prepare(self, partial: Path) -> None:
        """Create the empty folder of a save, on the first rank."""
        self._check_lock()
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(_cannot_be_written(partial, _reason(error))) from error

    def _stable_state(self) -> Iterator[ShardedTensor | ShardedObject]:
        """The state, with copies of tensors that training would change during the write."""
        for shard in self._sharded_state():
            if self._background and device.is_cpu() and isinstance(shard, ShardedTensor):
                shard.data = shard.data.clone(memory_format=torch.contiguous_format)
            yield shard

    def work_done(self) -> int:
        """Return a number that changes while this rank writes; any thread may call this.

        It counts the bytes in this rank's files, and those read back for their checksums.
        """
        return self._bytes_written + self._bytes_read

    def _note_read(self, count: int) -> None:
        self._bytes_read += count

    def _measure(self, save: AsyncSave, written: Future[Any]) -> None:
        """Count the bytes of a save until it is written. A broken disk may block this thread."""
        pause = 0.1
        while wait([written], timeout=pause).not_done:
            pause = min(2 * pause, 10.0)
            with contextlib.suppress(OSError):  # not created yet
                self._bytes_written = sum(file.stat().st_size for file in save.files)

    def poll(self) -> list[SavedCheckpoint]:
        """Finish the pending save if all ranks have written it.

        All ranks call this at the same step.

        Returns:
            The checkpoint that this call finished, if any.

        Raises:
            UserError: The save could not be written.
        """
        if self._pending is None or parallel.any_rank(not self._pending.written.done()):
            return []
        return self.finish()

    def finish(self) -> list[SavedCheckpoint]:
        """Wait for the pending save, and rename its folder to its final name. All ranks call this.

        Returns:
            The checkpoint that this call finished, if any.

        Raises:
            UserError: The save could not be written.
        """
        pending = self._pending
        if pending is None:
            return []
        started = time.perf_counter()
        error = pending.written.exception()
        # The slowest rank may be later than the time limit of a collective.
        meeting.wait_for_all(f"save {self._saves}")
        self._pending = None
        if parallel.any_rank(error is not None):
            reasons = [text for text in parallel.gather_objects(error and _reason(error)) if text]
            if parallel.is_main():
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise UserError(_cannot_be_written(pending.partial, reasons[0]))
        sums, seconds = pending.written.result()
        with _one_line_errors(pending.partial):
            pending.save.finalise()
        outcomes = parallel.gather_objects((sums, seconds))
        size = sum(each.size for files, _ in outcomes for each in files.values())
        problem = self._publish(pending, [files for files, _ in outcomes]) if parallel.is_main() else None
        if problem := parallel.broadcast_from_main(problem):
            raise UserError(problem)
        stall = pending.stall_seconds + time.perf_counter() - started
        return [SavedCheckpoint(pending.state.step, size, stall, max(each for _, each in outcomes))]

    def _publish(self, pending: _PendingSave, written: list[dict[str, FileSum]]) -> str | None:
        """Complete the folder on rank 0 and rename it. Returns an error message, or `None`."""
        partial, files = pending.partial, {name: found for each in written for name, found in each.items()}
        try:
            self._check_lock()
            for rank, each in enumerate(written):
                for name, found in each.items():
                    if not is_seen(partial / name, size=found.size):
                        raise UserError(f"rank 0 does not see {name} of rank {rank}, expected a folder of all nodes")
            files |= {name: checkpoint_files.checksum(partial / name) for name in async_save.INDEX_FILES}
            checkpoint_files.write_state(partial, dataclasses.replace(pending.state, files=files))
            checkpoint_files.publish(partial, checkpoint_folder(self._run, pending.state.step))
        except (OSError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            return _cannot_be_written(partial, _reason(error))
        self._unproven = pending.state
        # Of this checkpoint it is not known whether a step can be taken from it.
        checkpoint_files.retire(self._run, keep=max(self._keep, 2), keep_every=self._keep_every)
        return None

    def confirm(self, updates: int) -> None:
        """Note the optimizer steps that the run has taken.

        One after the newest checkpoint shows that training can go on from it.
        """
        if self._unproven is not None and updates > self._unproven.updates:
            self._unproven = None
            checkpoint_files.retire(self._run, keep=self._keep, keep_every=self._keep_every)

    def close(self) -> None:
        """End the writing thread. The folder of an unfinished save keeps its `.partial` name."""
        self._writer.shutdown()


def _write(save: AsyncSave, note: Callable[[int], None]) -> tuple[dict[str, FileSum], float]:
    """Write this rank's data files; `note` receives the bytes that are read back.

    Returns:
        Their sums by name, and the seconds that it took.
    """
    started = time.perf_counter()
    sums = {file.name: checkpoint_files.checksum(file, note=note) for file in save.write()}
    return sums, time.perf_counter() - started


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _cannot_be_written(partial: Path, reason: str) -> str:
    folder = partial.name.removesuffix(".partial")
    return f"{partial.parent / folder}: cannot be written ({reason}); older checkpoints are complete"


@contextlib.contextmanager
def _one_line_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except (dist_checkpointing.core.CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise UserError(_cannot_be_written(partial, _reason(error))) from error
