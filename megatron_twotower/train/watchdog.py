"""Detection of hanging ranks: name the rank and the call in which it hangs, and end the job.

Every rank has a thread that publishes a heartbeat through the store of torch.distributed, and looks
at two clocks: that of its own training loop, and the heartbeat of the next rank. A loop that makes
no progress is reported by its own thread, with the call it is in. A process that is frozen, or
whose interpreter is, is reported by the rank before it. Then the process ends with status 76, and
torchrun and Slurm end the others.

A job may be suspended as a whole (SIGSTOP, `scontrol suspend`): a process counts no time in which
its own thread stood still.

A save has a limit of its own, and while any rank writes, it is alive: ranks that are done wait for
the slowest one.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

import megatron_twotower
from megatron_twotower.mcore import parallel

# Exit status of a process whose job hangs.
HUNG = 76
# The activity of a loop that has ended, and the first word of that of a save.
FINISHED = "the end"
SAVING = "saving"


class Watchdog:
    """The watchdog of one rank. The training loop calls `heartbeat`; the rest happens in a thread.

    Args:
        limit_seconds: How long a loop may make no progress, or a process publish no heartbeat; 0:
            any time.
        save_limit_seconds: The same during a save.
        work_done: Returns a number that changes while this rank writes a checkpoint.
    """

    def __init__(
        self, *, limit_seconds: float, save_limit_seconds: float = 0, work_done: Callable[[], int] = lambda: 0
    ) -> None:
        self._limit, self._save_limit = limit_seconds or math.inf, save_limit_seconds or math.inf
        self._interval = min(max(min(self._limit, self._save_limit) / 10, 0.1), 30.0)
        self._work_done, self._work = work_done, (0, 0)
        self._activity, self._since = "start", time.monotonic()
        self._main = threading.main_thread().ident
        self._name = f"{parallel.rank()} (process {os.getpid()} on {socket.gethostname()})"
        self._count, self._neighbour_beat, self._neighbour_since = 0, b"", time.monotonic()
        self._reported_own = self._reported_neighbour = False
        self._store: Any = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self, activity: str) -> None:
        """Note that the loop now begins `activity`."""
        self._activity, self._since = activity, time.monotonic()

    def start(self) -> None:
        """Publish a first heartbeat, before any rank can take a step, and start the thread."""
        self.heartbeat("start")
        self._store = self._connect()
        if self._store is not None:
            self._publish()
        self._thread.start()

    def _publish(self) -> None:
        self._count += 1
        self._store.set(f"watchdog/{parallel.rank()}", json.dumps([self._count, self._activity, self._name]))

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        """Look at both clocks until the run ends.

        A problem is reported at once. The process ends a little later, so that other ranks can
        report theirs.
        """
        end: float | None = None
        slept = time.monotonic()
        while not self._stopped.wait(self._interval):
            self._leave_out(time.monotonic() - slept - self._interval)
            self._notice_writing()
            found = [self._check_own_loop(), self._check_neighbour()]
            for text in filter(None, found):
                print(f"watchdog: {text}", file=sys.stderr, flush=True)
            if any(found) and end is None:
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                end = time.monotonic() + 3 * self._interval
            if end is not None and time.monotonic() > end:
                os._exit(HUNG)
            slept = time.monotonic()

    def _leave_out(self, seconds: float) -> None:
        """Count no time in which the whole process stood still; a short one is the scheduler's."""
        if seconds > self._interval:
            now = time.monotonic()
            self._since = min(self._since + seconds, now)
            self._neighbour_since = min(self._neighbour_since + seconds, now)

    def _limit_of(self, activity: str) -> float:
        return self._save_limit if activity.startswith(SAVING) else self._limit

    def _notice_writing(self) -> None:
        """Count it as progress of a save that this rank, or another one, has written something."""
        if not self._activity.startswith(SAVING):
            return
        own, total = self._work_done(), 0
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # `_check_neighbour` reports it
                total = self._store.add("watchdog/writing", int(own != self._work[0]))
        if (own, total) != self._work:
            self._work, self._since = (own, total), time.monotonic()

    def _check_own_loop(self) -> str | None:
        """Return what is wrong with the training loop of this rank; only the first time."""
        seconds = time.monotonic() - self._since
        if seconds < self._limit_of(self._activity) or self._reported_own:
            return None
        self._reported_own = True
        frame = sys._current_frames().get(self._main or 0)
        state = "has waited for other ranks" if _in_collective(frame) else "has made no progress"
        return f"rank {self._name}: {state} for {seconds:.0f} s, at {self._activity}, in {describe_call(frame)}"

    def _check_neighbour(self) -> str | None:
        """Publish this rank's heartbeat and read that of the next rank.

        Returns:
            What is wrong with the next rank; only the first time.
        """
        if self._store is None or self._reported_neighbour:
            return None
        number = (parallel.rank() + 1) % parallel.world_size()
        try:
            self._publish()
            beat = self._store.get(f"watchdog/{number}")
        except RuntimeError as error:
            # The process with the store is frozen or has ended, or the run is over.
            self._reported_neighbour = True
            reason = str(error).strip().splitlines()[0]
            return None if self._stopped.is_set() else f"rank {self._name}: the job's store does not answer ({reason})"
        if beat != self._neighbour_beat:
            self._neighbour_beat, self._neighbour_since = beat, time.monotonic()
        _, activity, name = json.loads(beat)
        seconds = time.monotonic() - self._neighbour_since
        if seconds < self._limit_of(activity) or activity == FINISHED:
            return None
        self._reported_neighbour = True
        return f"rank {name}: no heartbeat for {seconds:.0f} s, the last at {activity}"

    def _connect(self) -> Any:
        """Open a second connection to the job's store: the loop's may be waiting for an answer."""
        if parallel.world_size() == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()
        store.set_timeout(timedelta(seconds=max(min(self._limit, self._save_limit), 1.0)))
        return store


def _in_collective(frame: FrameType | None) -> bool:
    return frame is not None and f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename


def describe_call(frame: FrameType | None) -> str:
    """Return `function (file:line)` of the current call and of its caller in this package."""
    if frame is None:
        return "no Python call"
    stack = traceback.extract_stack(frame)
    package = os.path.dirname(megatron_twotower.__file__)
    ours = [call for call in stack if call.filename.startswith(package)]
    named = [f"{call.name} ({os.path.basename(call.filename)}:{call.lineno})" for call in (stack[-1], *ours[-1:])]
    return ", called by ".join(dict.fromkeys(named))


@contextlib.contextmanager
def watching(
    *, limit_seconds: float, save_limit_seconds: float, work_done: Callable[[], int]
) -> Iterator[Callable[[str], None]]:
    """Run a watchdog for the duration of a run; none if both limits are 0. See `Watchdog`.

    Yields:
        The function that receives the activity of the loop.
    """
    if not limit_seconds and not save_limit_seconds:
        yield lambda activity: None
        return
    watchdog = Watchdog(limit_seconds=limit_seconds, save_limit_seconds=save_limit_seconds, work_done=work_done)
    watchdog.start()
    try:
        yield watchdog.heartbeat
    finally:
        watchdog.heartbeat(FINISHED)
        watchdog.stop()
