"""Time and peak memory of pieces of work, on the host or on CUDA.

The only room of the benchmarks that knows which device there is.
"""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError

# Rounds that are counted at least, however long one takes.
FEWEST_ROUNDS = 3
# Share of the free memory that a case may be expected to fill.
FILLABLE = 0.85


@dataclass(frozen=True)
class Case:
    """One way to do a job, in stages that are timed apart and run in order."""

    name: str
    stages: Mapping[str, Callable[[], Any]]

    def run(self) -> None:
        for stage in self.stages.values():
            stage()


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Work with `count` threads, and leave the process with as many as before: sums depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait for the device, so that a clock read next means something."""
    if not device.is_cpu():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Times:
    """Seconds of one case, by stage, one entry per counted round; and what they come to."""

    stages: Mapping[str, Sequence[float]]

    @property
    def totals(self) -> list[float]:
        return [sum(each) for each in zip(*self.stages.values(), strict=True)]

    def figures(self) -> dict[str, Any]:
        """For JSON: medians and minima in seconds."""
        return {
            "median_seconds": statistics.median(self.totals),
            "minimum_seconds": min(self.totals),
            "stage_seconds": {name: statistics.median(found) for name, found in self.stages.items()},
            "rounds": len(self.totals),
        }


def in_turns(cases: Sequence[Case], *, repeats: int, budget_seconds: float) -> dict[str, Times]:
    """Every case once per round, after a round that is not counted: it may compile kernels, and says nothing of the
    others.

    Args: repeats: rounds that count, or fewer where they would take longer than `budget_seconds`,
        but at least `FEWEST_ROUNDS` (or `repeats`).
    """
    found: dict[str, dict[str, list[float]]] = {case.name: {stage: [] for stage in case.stages} for case in cases}
    rounds, done = repeats, -1
    while done < rounds:
        started = time.perf_counter()
        for case in cases:
            for name, stage in case.stages.items():
                found[case.name][name].append(seconds(stage))
        done += 1
        if done == 1:
            fitting = int(budget_seconds / max(time.perf_counter() - started, 1e-9))
            rounds = min(repeats, max(FEWEST_ROUNDS, fitting))
    return {name: Times({stage: values[1:] for stage, values in by.items()}) for name, by in found.items()}


# --- memory -------------------------------------------------------------------------------------------------------


def _own_memory(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS, what is resident, or VmHWM, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _forget_the_past() -> None:
    """Give freed memory back, and let the high-water mark start anew where that is permitted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark so far then counts too: in a fresh process that is no more than was resident


def extra_peak_bytes(work: Callable[[], Any]) -> int:
    """How much memory the work needs at its peak, beyond what is held before it. On the host: resident memory."""
    if device.is_cpu():
        _forget_the_past()
        before = _own_memory("VmRSS")
        work()
        return max(0, _own_memory("VmHWM") - before)
    gc.collect()  # what went in the midst of the work would make its peak look lower
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - held


def fillable_bytes() -> int:
    """Memory that a case may be expected to fill."""
    if device.is_cpu():
        return int(FILLABLE * psutil.virtual_memory().available)
    # What torch's allocator keeps of earlier cases is free for this one.
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(FILLABLE * (torch.cuda.mem_get_info()[0] + cached))


def apart(function: Callable[..., int], *arguments: Any, preload: str) -> int:
    """The result of a function in a process of its own; where there is CUDA, whose allocator counts, in this one.

    Args:
        preload: module that such processes have imported when they start.

    Raises: UserError: the process was ended before it was done, as the kernel does where memory
        runs out.
    """
    if not device.is_cpu():
        return function(*arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        what = f"{function.__name__}{arguments}"
        raise UserError(f"{what}: its process ended with status {process.exitcode}, expected a figure") from error
    finally:
        process.join()


def _send(sender: Any, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))
    sender.close()


# --- files --------------------------------------------------------------------------------------------------------


def write_files(folder: Path, name: str, figures: Mapping[str, Any], picture: bytes | None) -> None:
    """`name`.json and, where there is one, `name`.png: each whole, or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", (json.dumps(figures, indent=1) + "\n").encode()), ("png", picture)):
        if content is not None:
            partial = folder / f"{name}.{suffix}.partial"
            partial.write_bytes(content)
            partial.replace(folder / f"{name}.{suffix}")
