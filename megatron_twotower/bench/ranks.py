"""Ranks of a training run as processes that start quickly and can be killed.

They are forked from a server process that has already imported everything.
"""

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

# The server imports this module, and with it everything that training needs.
from megatron_twotower.train import run  # noqa: F401


@dataclass(frozen=True)
class Job:
    """The started ranks of a run.

    Attributes:
        processes: One process per rank.
        logs: The file that each rank prints to.
    """

    processes: Sequence[BaseProcess]
    logs: Sequence[Path]

    def signal(self, number: int, *, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all if `rank` is `None`."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, seconds: float) -> list[int | None]:
        """Wait for all ranks, for `seconds` at most.

        Returns:
            The exit status of each rank: negative for a signal, `None` if the rank still runs.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        """Kill all ranks with SIGKILL and wait for their end."""
        self.signal(signal.SIGKILL)
        self.wait(60)

    def output(self) -> str:
        """What all ranks have printed, rank by rank."""
        return "".join(path.read_text() for path in self.logs)


def forkserver() -> ForkServerContext:
    """A context whose new processes have imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(ranks: int, arguments: Sequence[str], *, logs: Path) -> Job:
    """Start `twotower ARGUMENTS` as a job of `ranks` processes on this machine.

    Args:
        ranks: The number of ranks.
        arguments: Of the command line.
        logs: The folder for the output of each rank. Existing files are overwritten.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = unused_port()
    files = [logs / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        forkserver().Process(target=_run_rank, args=(rank, ranks, port, list(arguments), str(file)))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    return Job(processes, files)


def unused_port() -> int:
    """A port of this machine at which nothing listens now."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        return int(unused.getsockname()[1])


def be_rank(rank: int, *, ranks: int, port: int) -> None:
    """Give this process the environment that torchrun or srun would give a rank."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}


def _run_rank(rank: int, ranks: int, port: int, arguments: list[str], log: str) -> None:
    be_rank(rank, ranks=ranks, port=port)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.argv = ["twotower", *arguments]
    runpy.run_module("megatron_twotower", run_name="__main__")
