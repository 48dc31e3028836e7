"""The engine on a Ray cluster: one actor a worker, on any node, replaced when it dies.

Tasks are handed to workers that have answered a first call, in which they compare the program, its
packages and some files with those of the driver. A worker has one task running and one waiting. If
it dies, with its node or alone, its tasks are done again by others. Nodes that join the cluster get
workers too, up to the wanted number.

Ray has no users: who reaches its ports can run code. A Ray that is started here listens on the
loopback interface alone, has no dashboard, and asks for a token that only this process tells its
workers.
"""

import contextlib
import logging
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_twotower import __version__
from megatron_twotower.common import workers
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.files import contents_sha256, is_seen
from megatron_twotower.common.versions import installed, require_fit
from megatron_twotower.common.workers import POLL_SECONDS, Engine, OnCount, Result, Task, TaskQueue

INSTALL = "pip install 'megatron-twotower[cluster]'"
LOCAL_ADDRESS = "local"

_DEATHS = 5  # of workers at one task, or of workers in a row that did not start
_TASKS_A_WORKER = 2  # one running and one waiting
_COUNT_SECONDS = 1.0
_RESOURCES_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # without a worker, before a warning
_CONNECT_SECONDS = 5.0
_OBJECT_STORE_BYTES = 256 << 20  # of a Ray that is started here; tasks and results are small
# What decides results, and what must understand each other.
_PACKAGES = ("numpy", "tokenizers", "transformers", "torch")


def program() -> dict[str, str]:
    """The versions of this program and of what decides its results."""
    sources = sorted(Path(__file__).resolve().parent.parent.rglob("*.py"))
    own = f"{__version__} with sources {contents_sha256(sources)[:12]}"
    packages = {name: installed(name) or "none" for name in _PACKAGES}
    return {"megatron_twotower": own, "Python": platform.python_version(), **packages}


@contextlib.contextmanager
def ray_engine(
    address: str | None, *, workers: int | None, files: Sequence[Path], gpus: int | None
) -> Iterator[Engine]:
    """Yields an engine on a Ray cluster.

    Args:
        address, workers: As in `engines.EngineSettings`.
        files, gpus: As in `engines.Needs`.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or it has no room for a worker.
            From the engine: a node has another program or other files, a task ends with a
            `UserError` or an `OSError` (the message names the node), or workers die again and
            again.
    """
    if installed("ray") is None:
        raise UserError(f"ray: not installed, expected for --engine ray ({INSTALL})")
    require_fit("ray")
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL_ADDRESS
    ray = _connected(address, workers=workers)
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
    pool = _Pool(ray, workers=workers, gpus=gpus, program=program(), files=_checksums(files))
    try:
        if not pool.room():
            has = "GPUs" if gpus else "CPUs"
            found = ray.cluster_resources().get(has[:-1], 0)
            raise UserError(f"{address}: found {found:g} {has}, expected at least {gpus or 1} for a worker")
        yield pool.unordered
    finally:
        pool.end()
        ray.shutdown()


def _checksums(files: Sequence[Path]) -> dict[str, str]:
    return {str(path.resolve()): contents_sha256([path]) for path in files}


# --- the cluster ---


def _connected(address: str, *, workers: int | None) -> Any:
    """The module `ray`, connected to a cluster.

    Raises:
        UserError: There is no cluster at the address, or it runs another Ray or Python.
    """
    if address.startswith("ray://"):
        raise UserError(f"{address}: found a Ray client address, expected HOST:PORT of the cluster (6379 by default)")
    if address == LOCAL_ADDRESS and "ray" not in sys.modules:  # Ray reads these when it is imported
        os.environ.update(
            RAY_USAGE_STATS_ENABLED="0",
            # Ray's own way to keep to the loopback interface, where it does not support clusters.
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
        )
    elif address not in (LOCAL_ADDRESS, "auto"):
        _check_port(address)
    import ray
    import ray._private.worker

    # ray/_private/worker.py (2.60) prints ten lines on standard output for each worker that dies,
    # whatever `log_to_driver` says. `_Pool` says it in one, on standard error.
    ray._private.worker.print_to_stdstream = lambda *arguments, **keywords: None
    cores = workers or len(os.sched_getaffinity(0))
    own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == LOCAL_ADDRESS else {}),
        )
    except Exception as error:  # ConnectionError, RuntimeError for versions, ValueError, and Ray's own
        raise UserError(f"{address}: no Ray cluster that can be used ({_one_line(error)})") from error
    return ray


def _check_port(address: str) -> None:
    """Look whether anything listens at an address: Ray itself waits for minutes, and says more.

    Raises:
        UserError: Nothing does.
    """
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdigit(), f"address: found {address}, expected HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{address}: found no Ray cluster ({error}), expected one (ray start --head)") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- a worker ---


class _Worker:
    """The actor. `run` has a thread of its own; the other calls are answered meanwhile."""

    def __init__(self) -> None:
        self.node, self.number, self.counts = socket.gethostname(), -1, [0] * workers.COUNTERS

    def start(self, expected: Mapping[str, str], files: Mapping[str, str], folder: str) -> str | None:
        """Set up this process, in a folder if it is there. Returns what is wrong, or None."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        with contextlib.suppress(OSError):  # relative paths are those of the driver
            os.chdir(folder)
        for name, version in program().items():
            if version != expected[name]:
                return f"node {self.node}: found {name} {version}, expected {expected[name]}, as the driver has"
        for name, sha256 in files.items():
            path = Path(name)
            shared = "the driver's (a file system that all nodes share)"
            if not is_seen(path):
                return f"node {self.node}: {path}: found no such file, expected {shared}"
            if contents_sha256([path]) != sha256:
                return f"node {self.node}: {path}: found another file, expected {shared}"
        return None

    def run(self, number: int, function: Callable[[Any], Any], task: Any) -> tuple[str | None, Any, list[int]]:
        """Do a task. Returns an error in one line or None, the result, and what was counted."""
        self.number, self.counts = number, workers.count_here()
        try:
            return None, function(task), self.counts
        except (UserError, OSError) as error:
            return f"{_one_line(error)} (on node {self.node})", None, self.counts

    def counted(self) -> tuple[int, list[int]]:
        """The number of the task under way, and what it has counted so far."""
        return self.number, list(self.counts)


@dataclass
class _Actor:
    """A worker as the driver sees it.

    Attributes:
        ready: Whether it has answered the first call.
        tasks: Numbers of the tasks that it has been given and not finished.
        live: What the task under way has counted, by its number.
    """

    handle: Any
    ready: bool = False
    tasks: set[int] = field(default_factory=set)
    live: dict[int, list[int]] = field(default_factory=dict)


class _Pool:
    """All workers of a driver."""

    def __init__(
        self, ray: Any, *, workers: int | None, gpus: int, program: Mapping[str, str], files: Mapping[str, str]
    ) -> None:
        self._ray, self._most, self._gpus, self._program, self._files = ray, workers, gpus, program, files
        self._class = ray.remote(concurrency_groups={"control": 1})(_Worker)
        self._actors: list[_Actor] = []
        self._starting: dict[Any, _Actor] = {}
        self._failed_starts = 0
        self._looked = self._had_worker = 0.0

    def room(self) -> int:
        """The number of workers that the cluster has room for, or that are wanted."""
        resources = self._ray.cluster_resources()
        room = int(resources.get("GPU", 0) // self._gpus) if self._gpus else int(resources.get("CPU", 0))
        return min(room, self._most or room)

    def end(self) -> None:
        """Stop all workers at once."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor.handle)
        self._actors, self._starting = [], {}

    def unordered(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        on_count: OnCount = lambda amounts: None,
        ahead: int | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """See `workers.Engine`."""
        queue: TaskQueue[Task] = TaskQueue(tasks, ahead=ahead)
        running: dict[Any, tuple[_Actor, int, Task]] = {}
        deaths: dict[int, int] = {}
        counts = _Counts(self._ray, on_count)
        sent = self._ray.put(function)
        self._had_worker = time.monotonic()
        try:
            while True:
                self._look_for_room()
                self._hand_out(queue, running, sent)
                if not running:
                    if (numbered := queue.take()) is None:
                        counts.report([])
                        return
                    queue.give_back(numbered[0], numbered[1])  # no worker is ready
                done, _ = self._ray.wait([*running, *self._starting], timeout=POLL_SECONDS)
                for ref in done:
                    if ref in self._starting:
                        self._finish_start(ref)
                        continue
                    actor, number, task = running.pop(ref)
                    try:
                        error, result, counted = self._ray.get(ref)
                    except self._lost as death:
                        logging.getLogger(__name__).warning("ray: a worker was lost, its tasks are done again")
                        self._drop(actor)
                        for lost in [other for other, (its, _, _) in running.items() if its is actor]:
                            _, waiting_number, waiting = running.pop(lost)
                            queue.give_back(waiting_number, waiting)
                        deaths[number] = deaths.get(number, 0) + 1
                        if deaths[number] >= _DEATHS:
                            raise UserError(
                                f"{deaths[number]} workers died at one task: found no result, expected memory enough "
                                f"for a worker ({_one_line(death)})"
                            ) from death
                        queue.give_back(number, task)
                        continue
                    actor.tasks.remove(number)
                    actor.live.pop(number, None)
                    if error is not None:
                        raise UserError(error)
                    counts.add(counted)
                    queue.finish(number)
                    yield task, result
                if counts.due():
                    counts.report(self._actors)
        finally:
            if running:  # an error, or the caller has enough
                self.end()

    @property
    def _lost(self) -> tuple[type[Exception], ...]:
        """What Ray raises if a worker, its node or a result is gone."""
        found = self._ray.exceptions
        return (
            found.RayActorError,
            found.WorkerCrashedError,
            found.NodeDiedError,
            found.ObjectLostError,
            found.OutOfMemoryError,
            found.ActorUnschedulableError,
        )

    def _hand_out(self, queue: TaskQueue[Task], running: dict[Any, tuple[_Actor, int, Task]], sent: Any) -> None:
        for load in range(_TASKS_A_WORKER):  # every worker gets one before any gets two
            for actor in self._actors:
                if not actor.ready or len(actor.tasks) > load:
                    continue
                if (numbered := queue.take()) is None:
                    return
                number, task = numbered
                actor.tasks.add(number)
                running[actor.handle.run.remote(number, sent, task)] = actor, number, task

    def _look_for_room(self) -> None:
        """Start workers that there is room for, every few seconds."""
        now = time.monotonic()
        if any(actor.ready for actor in self._actors):
            self._had_worker = now
        elif now - self._had_worker > _SILENT_SECONDS:
            self._had_worker = now
            logging.getLogger(__name__).warning("ray: no worker could be started yet, waiting for free CPUs or GPUs")
        if now - self._looked < _RESOURCES_SECONDS:
            return
        self._looked = now
        while len(self._actors) < self.room():
            handle = self._class.options(num_cpus=1, num_gpus=self._gpus, max_restarts=0).remote()
            actor = _Actor(handle)
            self._actors.append(actor)
            start = handle.start.options(concurrency_group="control")
            self._starting[start.remote(dict(self._program), dict(self._files), os.getcwd())] = actor

    def _finish_start(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            problem = self._ray.get(ref)
        except self._lost as death:
            self._drop(actor)
            self._failed_starts += 1
            line = str(death).strip().splitlines()[-1]
            if "ModuleNotFoundError" in str(death):
                raise UserError(f"a node cannot import the program ({line}), expected it on every node") from death
            if self._failed_starts >= _DEATHS:
                raise UserError(f"{self._failed_starts} workers in a row did not start ({line})") from death
            return
        if problem is not None:
            raise UserError(problem)
        actor.ready, self._failed_starts = True, 0

    def _drop(self, actor: _Actor) -> None:
        with contextlib.suppress(ValueError):
            self._actors.remove(actor)
        with contextlib.suppress(Exception):  # one that is only out of reach must not go on
            self._ray.kill(actor.handle)


class _Counts:
    """Sums what tasks have counted: finished ones exactly, those under way as last heard."""

    def __init__(self, ray: Any, on_count: OnCount) -> None:
        self._ray, self._on_count = ray, on_count
        self._finished = [0] * workers.COUNTERS
        self._asked: dict[Any, _Actor] = {}
        self._last = time.monotonic()

    def add(self, counted: Sequence[int]) -> None:
        """Add the counts of a finished task."""
        self._finished = [one + other for one, other in zip(self._finished, counted, strict=True)]

    def due(self) -> bool:
        """Whether a second has passed since the last report."""
        return time.monotonic() - self._last >= _COUNT_SECONDS

    def report(self, actors: Sequence[_Actor]) -> None:
        """Report what workers have answered, and ask them again."""
        self._last = time.monotonic()
        if self._asked:
            answered, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in answered:
                actor = self._asked.pop(ref)
                with contextlib.suppress(Exception):  # a dead worker: its task begins again
                    number, counted = self._ray.get(ref)
                    actor.live = {number: counted} if number in actor.tasks else {}
        waiting = {id(actor) for actor in self._asked.values()}
        for actor in actors:
            if actor.ready and id(actor) not in waiting:
                self._asked[actor.handle.counted.options(concurrency_group="control").remote()] = actor
        live = [counted for actor in actors for counted in actor.live.values()]
        self._on_count([sum(column) for column in zip(self._finished, *live, strict=True)])
