"""Runs a function over many tasks: in this process, in worker processes, or on Ray.

An engine is a function that does it (`Engine`); `engines.started` makes one from its name. The
function that does the work is pure: its result and the files that it writes follow from the task
alone. So it does not matter which worker does a task, in which order, or how often.

Workers stop when the parent asks them to, and end by themselves when the parent has died.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import heapq
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from megatron_twotower.common.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
OnCount = Callable[[list[int]], None]

COUNTERS = 3
POLL_SECONDS = 0.2

# Set once in each worker process, and in the parent while it does the work itself.
_counters: Any = [0] * COUNTERS
_stopping: Any = threading.Event()
_on_count: OnCount | None = None


class Stopped(Exception):
    """The parent asked its workers to stop."""


class Engine(Protocol):
    """Runs a function over tasks."""

    def __call__(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        on_count: OnCount = lambda amounts: None,
        ahead: int | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Yields (task, result) of every task, as the results come.

        Tasks are begun in order, and only few are taken from `tasks` before a worker is free for
        them. After an error the tasks under way are stopped, at the latest when the engine ends.

        Args:
            function: A function of a module. Exceptions that it raises are raised here.
            on_count: Receives the sums of the amounts that `count` was called with for these tasks.
            ahead: How many tasks may be begun from the oldest unfinished one on; None for any.

        Raises:
            UserError: A worker died, and the engine cannot replace it.
        """


def count(*amounts: int) -> None:
    """Add to the shared counters. The function that does the work calls this often.

    Raises:
        Stopped: The worker must end.
    """
    assert len(amounts) == COUNTERS, amounts
    if _stopping.is_set():
        raise Stopped
    if isinstance(_counters, list):
        for place, amount in enumerate(amounts):
            _counters[place] += amount
        if _on_count is not None:
            _on_count(_counters)
    else:
        with _counters.get_lock():
            for place, amount in enumerate(amounts):
                _counters[place] += amount


def count_here(on_count: OnCount | None = None) -> list[int]:
    """Begin to count from 0 in this process alone. Returns the sums, which `count` updates."""
    global _counters, _on_count, _stopping
    _counters, _on_count, _stopping = [0] * COUNTERS, on_count, threading.Event()
    return _counters


class TaskQueue(Generic[Task]):
    """Numbers tasks and hands them out in order; those that are given back come first.

    Args:
        ahead: How many tasks may be handed out from the oldest unfinished one on; None for any.
    """

    def __init__(self, tasks: Iterable[Task], *, ahead: int | None) -> None:
        self._source, self._ahead = enumerate(tasks), ahead
        self._again: list[tuple[int, Task]] = []
        self._unfinished: set[int] = set()
        self._next = 0

    def take(self) -> tuple[int, Task] | None:
        """The number of a task and the task; None if there is none now."""
        if self._again:
            return heapq.heappop(self._again)
        if self._ahead is not None and self._unfinished and self._next - min(self._unfinished) >= self._ahead:
            return None
        if (numbered := next(self._source, None)) is not None:
            self._unfinished.add(numbered[0])
            self._next += 1
        return numbered

    def give_back(self, number: int, task: Task) -> None:
        """The task was not done, and must be done again."""
        heapq.heappush(self._again, (number, task))

    def finish(self, number: int) -> None:
        """The task is done."""
        self._unfinished.remove(number)


def in_order(
    engine: Engine, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) of every task in the order of the tasks.

    At most `ahead` results wait in memory for an earlier one.
    """
    waiting: dict[int, tuple[Task, Result]] = {}
    expected = 0
    for (number, task), result in engine(functools.partial(_numbered, function), enumerate(tasks), ahead=ahead):
        waiting[number] = task, result
        while expected in waiting:
            yield waiting.pop(expected)
            expected += 1


def _numbered(function: Callable[[Task], Result], numbered: tuple[int, Task]) -> Result:
    return function(numbered[1])


# --- the local engine ---


@contextlib.contextmanager
def local_engine(workers: int) -> Iterator[Engine]:
    """Yields an engine of `workers` processes; with 1, this process does the work."""
    if workers == 1:
        yield _alone
        return
    # Not fork: this process has threads (the progress bar, the tokenizer's). The fork server
    # imports once what all workers need.
    context = multiprocessing.get_context("forkserver")
    counters, stopping = context.Array(ctypes.c_longlong, COUNTERS), context.Event()
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(counters, stopping)
    )

    def engine(
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        on_count: OnCount = lambda amounts: None,
        ahead: int | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        plain = function.args[0] if isinstance(function, functools.partial) else function
        context.set_forkserver_preload([__name__, plain.__module__])
        return _together(executor, counters, function, tasks, workers=workers, on_count=on_count, ahead=ahead)

    try:
        yield engine
    finally:
        stopping.set()
        executor.shutdown(wait=True, cancel_futures=True)


def _alone(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    on_count: OnCount = lambda amounts: None,
    ahead: int | None = None,
) -> Iterator[tuple[Task, Result]]:
    count_here(on_count)
    try:
        for task in tasks:
            yield task, function(task)
    finally:
        count_here()


def _together(
    executor: concurrent.futures.Executor,
    counters: Any,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    on_count: OnCount,
    ahead: int | None,
) -> Iterator[tuple[Task, Result]]:
    before, queue = counters[:], TaskQueue(tasks, ahead=ahead)
    running: dict[concurrent.futures.Future[Result], tuple[int, Task]] = {}
    try:
        while True:
            while len(running) < 2 * workers and (numbered := queue.take()):  # per worker: one running, one waiting
                running[executor.submit(function, numbered[1])] = numbered
            if not running:
                return
            done, _ = concurrent.futures.wait(
                running, timeout=POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            on_count([now - old for now, old in zip(counters[:], before, strict=True)])
            for future in done:
                number, task = running.pop(future)
                queue.finish(number)
                yield task, future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker process died: found no result, expected memory enough for all --workers") from error


def _start(counters: Any, stopping: Any) -> None:
    """Set up a worker process."""
    global _counters, _stopping
    _counters, _stopping = counters, stopping
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the group; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
