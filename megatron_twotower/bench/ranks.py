"""Ranks of a training run as processes that start at once and can be killed: forked from a server with all imported."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

# This module is what the server imports, and with it all that training needs.
from megatron_twotower.train import run  # noqa: F401


@dataclass(frozen=True)
class Job:
    """The ranks of a run that was started, and where each writes what it prints."""

    processes: Sequence[BaseProcess]
    logs: Sequence[Path]

    def signal(self, number: int, *, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, seconds: float) -> list[int | None]:
        """The exit status of each rank: negative for a signal, None where it still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        """End all ranks for good."""
        self.signal(signal.SIGKILL)
        self.wait(60)

    def output(self) -> str:
        return "".join(path.read_text() for path in self.logs)


def context() -> ForkServerContext:
    """Makes processes that start with all of this imported."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([__name__])
    return made


def start(ranks: int, arguments: Sequence[str], *, logs: Path) -> Job:
    """Start `twotower ARGUMENTS` on so many ranks of this machine.

    logs: folder for what each rank prints, written anew.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [logs / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        context().Process(target=_rank, args=(rank, ranks, port, list(arguments), str(file)))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    return Job(processes, files)


def _rank(rank: int, ranks: int, port: int, arguments: list[str], log: str) -> None:
    """One rank, as torchrun or srun would start it."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(target, stream.fileno())
    sys.argv = ["twotower", *arguments]
    runpy.run_module("megatron_twotower", run_name="__main__")
