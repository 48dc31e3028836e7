"""Runs a function over many tasks in worker processes, with shared counters of progress.

Workers stop when the parent asks them to, and end by themselves when the parent has died.
"""

import concurrent.futures
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from megatron_twotower.common.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

COUNTERS = 3
_POLL_SECONDS = 0.2

# Set once in each worker process, and in the parent while it does the work itself.
_counters: Any = [0] * COUNTERS
_stopping: Any = threading.Event()
_on_count: Callable[[list[int]], None] | None = None


class Stopped(Exception):
    """The parent asked its workers to stop."""


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


def unordered(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, on_count: Callable[[list[int]], None]
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) of every task, as the results come.

    Tasks are begun in order, and only few are taken from `tasks` before a worker is free for them.
    With one worker, this process does the work. After an error the tasks under way are stopped
    before it is raised.

    Args:
        on_count: Receives the sums of the amounts that `count` was called with in all workers.

    Raises:
        UserError: a worker died. Exceptions of the function are raised as they are.
    """
    if workers == 1:
        return _alone(function, tasks, on_count=on_count)
    return _together(function, tasks, workers=workers, on_count=on_count)


def _alone(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, on_count: Callable[[list[int]], None]
) -> Iterator[tuple[Task, Result]]:
    global _counters, _on_count, _stopping
    _counters, _on_count, _stopping = [0] * COUNTERS, on_count, threading.Event()
    try:
        for task in tasks:
            yield task, function(task)
    finally:
        _on_count = None


def _together(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, on_count: Callable[[list[int]], None]
) -> Iterator[tuple[Task, Result]]:
    # Not fork: this process has threads (the progress bar, the tokenizer's). The fork server
    # imports once what all workers need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__])
    counters, stopping = context.Array(ctypes.c_longlong, COUNTERS), context.Event()
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(counters, stopping)
    )
    source = iter(tasks)
    running: dict[concurrent.futures.Future[Result], Task] = {}
    try:
        while True:
            for task in islice(source, 2 * workers - len(running)):  # per worker: one running and one waiting
                running[executor.submit(function, task)] = task
            if not running:
                return
            done, _ = concurrent.futures.wait(
                running, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            on_count(counters[:])
            for future in done:
                yield running.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker process died: found no result, expected memory enough for all --workers") from error
    finally:
        stopping.set()
        executor.shutdown(wait=True, cancel_futures=True)


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
