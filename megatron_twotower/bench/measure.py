"""Time and peak memory of work, on the CPU or on a CUDA device."""

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError

T = TypeVar("T")

# Rounds that are counted at least, however long one round takes.
MINIMUM_ROUNDS = 3
# Share of the free memory that a case may be expected to fill.
FILLABLE_SHARE = 0.85


# --- time ---


@dataclass(frozen=True)
class TimedCase:
    """One implementation under measurement.

    Attributes:
        name: The name in the results.
        parts: Work that runs in this order. Each part is timed separately.
    """

    name: str
    parts: Mapping[str, Callable[[], Any]]

    def run(self) -> None:
        """Run all parts once."""
        for part in self.parts.values():
            part()


@dataclass(frozen=True)
class CaseTimes:
    """Measured times of one case.

    Attributes:
        parts: Seconds of each part, one entry per counted round.
    """

    parts: Mapping[str, Sequence[float]]

    @property
    def totals(self) -> list[float]:
        """Seconds of all parts together, one entry per counted round."""
        return [sum(each) for each in zip(*self.parts.values(), strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians and the minimum in seconds, for JSON."""
        return {
            "median_seconds": statistics.median(self.totals),
            "minimum_seconds": min(self.totals),
            "stage_seconds": {name: statistics.median(seconds) for name, seconds in self.parts.items()},
            "rounds": len(self.totals),
        }


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use `count` threads of torch, then restore the number of before.

    The order of sums depends on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait until the CUDA device has finished its work, so that the clock can be read."""
    if not device.is_cpu():
        torch.cuda.synchronize()


def elapsed_seconds(work: Callable[[], Any]) -> float:
    """Run the work once and return how long it took, kernels included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def time_cases(cases: Sequence[TimedCase], *, repeats: int, budget_seconds: float) -> dict[str, CaseTimes]:
    """Time the cases in rounds. Each round runs every case once, so that all see the same machine.

    The first round is not counted: it may compile kernels. The second round is counted, and its
    duration gives the number of rounds that fit into the budget.

    Args:
        repeats: The number of counted rounds if they fit into the budget.
        budget_seconds: Time for all counted rounds. Rounds that would take longer are left out,
            but at least `MINIMUM_ROUNDS` (or `repeats`, if smaller) are counted.

    Returns:
        The times of each case, by its name.
    """
    seconds: dict[str, dict[str, list[float]]] = {case.name: {part: [] for part in case.parts} for case in cases}
    rounds, done = repeats, -1
    while done < rounds:
        started = time.perf_counter()
        for case in cases:
            for name, part in case.parts.items():
                seconds[case.name][name].append(elapsed_seconds(part))
        done += 1
        if done == 1:
            fitting = int(budget_seconds / max(time.perf_counter() - started, 1e-9))
            rounds = min(repeats, max(MINIMUM_ROUNDS, fitting))
    return {name: CaseTimes({part: values[1:] for part, values in parts.items()}) for name, parts in seconds.items()}


# --- memory ---


def process_memory_bytes(field: str) -> int:
    """Memory of this process by a field of its status; 0 where the system has no such field.

    Args:
        field: VmRSS (resident), VmHWM (the highest VmRSS so far) or RssAnon (without mapped files).
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _reset_high_water_mark() -> None:
    """Return freed memory to the system and reset VmHWM, where the system permits that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # VmHWM then includes earlier peaks; a new process has none


def extra_peak_bytes(work: Callable[[], Any]) -> int:
    """Run the work and return its peak memory above what was allocated before.

    On a CPU this is resident memory.
    """
    if device.is_cpu():
        _reset_high_water_mark()
        before = process_memory_bytes("VmRSS")
        work()
        return max(0, process_memory_bytes("VmHWM") - before)
    gc.collect()  # garbage that is freed during the work would lower its peak
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - allocated


def fillable_bytes() -> int:
    """Memory that a case may be expected to fill."""
    if device.is_cpu():
        return int(FILLABLE_SHARE * psutil.virtual_memory().available)
    # Blocks that torch's allocator caches from earlier cases are free for the next one.
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(FILLABLE_SHARE * (torch.cuda.mem_get_info()[0] + cached))


@contextlib.contextmanager
def hooked(
    modules: Iterable[nn.Module], *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Call `before` and `after` with the forward passes of some modules, as torch calls hooks."""
    hooks = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(before)] if before else []
        hooks += [module.register_forward_hook(after)] if after else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_new_process(function: Callable[..., T], *arguments: Any, preload: str) -> T:
    """Call a function in a new process, whose memory has no history.

    On CUDA the function is called in this process, because torch's allocator counts memory there.

    Args:
        preload: A module that new processes have imported when they start.

    Raises:
        UserError: The process ended without a result, as when the kernel kills it for its memory.
    """
    if not device.is_cpu():
        return function(*arguments)
    return in_process_of_its_own(function, *arguments, preload=preload)


def in_process_of_its_own(function: Callable[..., T], *arguments: Any, preload: str) -> T:
    """`in_new_process`, also on CUDA: for work of the CPU.

    The process is a fork of a server without threads: a fork of this process could wait for ever
    for a lock of one of its threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        call = f"{function.__name__}{arguments}"
        raise UserError(f"{call}: its process ended with status {process.exitcode}, expected a result") from error
    finally:
        process.join()


def _send_result(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))
    sender.close()
