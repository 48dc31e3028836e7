"""The command `bench context`: a training step with context parallelism against one rank.

Three cases alternate: one rank at length L, one rank at length C L, and C ranks that share
sequences of length C L. Each rank is a process with one thread. At best C ranks need 1 / C of the
time and of the memory that one rank needs for the same sequence.
"""

import dataclasses
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_twotower.bench import training_steps
from megatron_twotower.bench.ranks import be_rank, forkserver, unused_port
from megatron_twotower.bench.results import report
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel
from megatron_twotower.train import loop

OBJECTIVES = ("two_tower", "ar")


@dataclass(frozen=True)
class ContextOptions:
    """What to measure.

    Attributes:
        length_tokens: L.
        ranks: C.
        repeats: Rounds. In each round every case takes one step.
    """

    length_tokens: int = 2048
    ranks: int = 2
    repeats: int = 7


QUICK = ContextOptions(length_tokens=64, repeats=1)
QUICK_OVERRIDES = ("model=tiny",)


@dataclass(frozen=True)
class Case:
    """One case of the comparison: an objective, a number of ranks and the length of a sequence."""

    objective: str
    ranks: int
    length: int

    def config(self, config: RunConfig) -> RunConfig:
        """The configuration of the case. A step is one sequence."""
        return dataclasses.replace(
            config,
            objective=self.objective,
            data=dataclasses.replace(
                config.data, sequence_length_tokens=self.length, micro_batch_size=1, global_batch_size=1
            ),
            parallel=dataclasses.replace(config.parallel, context=self.ranks, threads_per_rank=1),
        )


def cases(options: ContextOptions) -> Iterator[Case]:
    """All cases, those of one objective together."""
    long = options.length_tokens * options.ranks
    for objective in OBJECTIVES:
        yield Case(objective, 1, options.length_tokens)
        yield Case(objective, 1, long)
        yield Case(objective, options.ranks, long)


# --- ranks ---


def _run_rank(config: RunConfig, rank: int, port: int, pipe: Connection) -> None:
    """One rank: a step for every message, until there is none.

    The first reply is the memory after the first step beyond that before it, in bytes; the others
    are seconds.
    """
    be_rank(rank, ranks=config.parallel.context, port=port)
    torch.set_num_threads(1)
    groups = parallel.initialise(config)
    trainer = training_steps.build_trainer(config, groups)
    batch = training_steps.random_batch(config, length=config.data.sequence_length_tokens)
    before = _peak_bytes()
    while pipe.recv():
        started = time.perf_counter()
        loop.train_step(trainer, [batch])
        seconds = time.perf_counter() - started
        pipe.send((seconds, _peak_bytes() - before))
    parallel.shutdown()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class _Ranks:
    """The processes of a case, which take a step when they are told."""

    processes: Sequence[BaseProcess]
    pipes: Sequence[Connection]

    def step(self) -> tuple[float, int]:
        """Let all ranks take a step. Returns the longest time and the largest memory."""
        for pipe in self.pipes:
            pipe.send(True)
        try:
            replies = [pipe.recv() for pipe in self.pipes]
        except EOFError as error:
            raise UserError("bench context: a rank ended before its step was done, expected a time") from error
        return max(seconds for seconds, _ in replies), max(memory for _, memory in replies)

    def end(self) -> None:
        """End all ranks."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(False)
        for process in self.processes:
            process.join(60)
            process.kill()


def _start(config: RunConfig) -> _Ranks:
    port, processes, pipes = unused_port(), [], []
    for rank in range(config.parallel.context):
        ours, theirs = forkserver().Pipe()
        process = forkserver().Process(target=_run_rank, args=(config, rank, port, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return _Ranks(processes, pipes)


# --- the command ---


def measure(config: RunConfig, options: ContextOptions) -> list[dict[str, Any]]:
    """Time and memory of every case, relative to one rank with the same sequence."""
    rows = []
    for objective in OBJECTIVES:
        own = [case for case in cases(options) if case.objective == objective]
        started = [_start(case.config(config)) for case in own]
        try:
            memory = [ranks.step()[1] for ranks in started]
            rounds = [[ranks.step()[0] for ranks in started] for _ in range(options.repeats)]
        finally:
            for ranks in started:
                ranks.end()
        seconds = [statistics.median(each) for each in zip(*rounds, strict=True)]
        for case, median, kept in zip(own, seconds, memory, strict=True):
            rows.append(
                {
                    **dataclasses.asdict(case),
                    "median_seconds": median,
                    "memory_bytes": kept,
                    "time_ratio": median / seconds[1],
                    "memory_ratio": kept / memory[1],
                }
            )
    return rows


def run(
    output: Path,
    *,
    recipe: str = "bench_step",
    overrides: Sequence[str] = (),
    options: ContextOptions = ContextOptions(),
    quick: bool = False,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `context.json` to `output`.

    Args:
        quick: Use `QUICK` instead of `options`: tiny sizes, which only show that the command works.
    """
    options, console = QUICK if quick else options, console or wide_console()
    config = load_recipe(recipe, [*(QUICK_OVERRIDES if quick else ()), *overrides])
    require(config.parallel.context == 1, "parallel.context: found it among the settings, expected --ranks")
    require(options.ranks > 1, f"--ranks: found {options.ranks}, expected at least 2")
    for case in cases(options):
        validate(case.config(config), world_size=case.ranks)
    with console.status("one rank and several, in turn"):
        rows = measure(config, options)
    facts: dict[str, Any] = {"machine": machine(), "recipe": recipe, "overrides": list(overrides), "cases": rows}
    report(output, "context", facts, tables=[_table(rows)], console=console)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    return plain_table(
        "a step of one sequence, one thread per rank; relative to one rank with the same sequence",
        ("objective", "ranks", "L", "seconds", "time", "limit", "memory of a step, MiB", "memory", "limit"),
        [
            (
                row["objective"],
                f"{row['ranks']}",
                f"{row['length']}",
                f"{row['median_seconds']:.3f}",
                f"{row['time_ratio']:.3f} x",
                f"{1 / row['ranks']:.2f}" if row["ranks"] > 1 else "",
                f"{row['memory_bytes'] / 2**20:,.0f}",
                f"{row['memory_ratio']:.3f} x",
                f"{1 / row['ranks']:.2f}" if row["ranks"] > 1 else "",
            )
            for row in rows
        ],
        left=1,
    )
