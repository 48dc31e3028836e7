"""A watch over hanging ranks: it says which rank hangs and in which call, and ends the job instead of wasting its time.

Every rank has a thread that publishes a sign of life through the store that the ranks met at, and
looks at two clocks: its own training loop's, and the sign of life of the next rank. A loop that
stands still is reported by its own thread, with the call it is in; a process that is frozen, or
whose interpreter is, by the rank before it. Then the process ends with status 76; torchrun and
Slurm end the others.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

import megatron_twotower
from megatron_twotower.mcore import parallel

# The status of a process whose job hangs.
HUNG = 76
# What a loop that has ended is at.
FINISHED = "the end"


class Watchdog:
    """The watch of one rank. `beat` is what the training loop calls; the rest happens in a thread.

    limit_seconds: how long a loop may stand still, or a process give no sign of life.
    """

    def __init__(self, *, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._every = min(max(limit_seconds / 10, 0.1), 30.0)
        self._doing, self._since = "start", time.monotonic()
        self._main = threading.main_thread().ident
        self._name = f"{parallel.rank()} (process {os.getpid()} on {socket.gethostname()})"
        self._count, self._sign, self._sign_since = 0, b"", time.monotonic()
        self._said_own = self._said_neighbour = False
        self._store: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """The loop has come to `doing`."""
        self._doing, self._since = doing, time.monotonic()

    def start(self) -> None:
        """Give a first sign of life, before any rank can have taken a step, and go on in a thread."""
        self.beat("start")
        self._store = self._connected()
        if self._store is not None:
            self._publish()
        self._thread.start()

    def _publish(self) -> None:
        self._count += 1
        self._store.set(f"watchdog/{parallel.rank()}", json.dumps([self._count, self._doing, self._name]))

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """Look at both clocks until the run is over. What is found is said at once; the end comes a little later, so
        that other ranks can say theirs."""
        end: float | None = None
        while not self._over.wait(self._every):
            found = [self._own_loop(), self._neighbour()]
            for text in filter(None, found):
                print(f"watchdog: {text}", file=sys.stderr, flush=True)
            if any(found) and end is None:
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                end = time.monotonic() + 3 * self._every
            if end is not None and time.monotonic() > end:
                os._exit(HUNG)

    def _own_loop(self) -> str | None:
        """What is wrong with the training loop of this rank, said once."""
        seconds = time.monotonic() - self._since
        if seconds < self._limit or self._said_own:
            return None
        self._said_own = True
        frame = sys._current_frames().get(self._main or 0)
        state = "waits for others" if _in_collective(frame) else "stands still"
        return f"rank {self._name}: {state} since {seconds:.0f} s, at {self._doing}, in {innermost_call(frame)}"

    def _neighbour(self) -> str | None:
        """Publish this rank's sign of life, and look at the next one's. What is wrong with it, said once."""
        if self._store is None or self._said_neighbour:
            return None
        number = (parallel.rank() + 1) % parallel.world_size()
        try:
            self._publish()
            sign = self._store.get(f"watchdog/{number}")
        except RuntimeError as error:  # the process that keeps the store is frozen or gone, or all is over
            self._said_neighbour = True
            reason = str(error).strip().splitlines()[0]
            return None if self._over.is_set() else f"rank {self._name}: the job's store does not answer ({reason})"
        if sign != self._sign:
            self._sign, self._sign_since = sign, time.monotonic()
        _, doing, name = json.loads(sign)
        seconds = time.monotonic() - self._sign_since
        if seconds < self._limit or doing == FINISHED:
            return None
        self._said_neighbour = True
        return f"rank {name}: no sign of life since {seconds:.0f} s, the last at {doing}"

    def _connected(self) -> Any:
        """A connection of its own to the job's store: the loop's may be waiting for an answer."""
        if parallel.world_size() == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()
        store.set_timeout(timedelta(seconds=max(self._limit, 1.0)))
        return store


def _in_collective(frame: FrameType | None) -> bool:
    return frame is not None and f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename


def innermost_call(frame: FrameType | None) -> str:
    """`function (file:line)` of the call a thread is in, and the innermost one of this package around it."""
    if frame is None:
        return "no Python call"
    stack = traceback.extract_stack(frame)
    here = os.path.dirname(megatron_twotower.__file__)
    ours = [entry for entry in stack if entry.filename.startswith(here)]
    named = [f"{entry.name} ({os.path.basename(entry.filename)}:{entry.lineno})" for entry in (stack[-1], *ours[-1:])]
    return ", called by ".join(dict.fromkeys(named))


@contextlib.contextmanager
def watching(*, limit_seconds: float) -> Iterator[Any]:
    """The watch as long as a run lasts; gives what to call for a sign of life. No watch where the limit is 0."""
    if not limit_seconds:
        yield lambda doing: None
        return
    watch = Watchdog(limit_seconds=limit_seconds)
    watch.start()
    try:
        yield watch.beat
    finally:
        watch.beat(FINISHED)
        watch.stop()
