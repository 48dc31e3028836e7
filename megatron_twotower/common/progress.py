"""Progress bars on standard error. Slow functions report to them through plain callables."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Called with: the stage, how much of it is done, how much there is.
OnProgress = Callable[[str, int, int], None]
# Called with each number of bytes that is done.
OnBytes = Callable[[int], None]
# Called with the number of bytes of all the work before it begins, returns its `OnBytes`.
BytesProgress = Callable[[int], OnBytes]


def silent_bytes(total: int) -> OnBytes:
    """The `BytesProgress` that shows nothing."""
    return lambda count: None


def silent(stage: str, done: int, total: int) -> None:
    """The `OnProgress` that shows nothing."""


class BarReport(Protocol):
    """Moves the bar of a stage, and shows `text` next to it."""

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Report that `done` of `total` is done."""


@contextlib.contextmanager
def stage_bars() -> Iterator[BarReport]:
    """Yields an `OnProgress` that draws one bar per stage."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    bars, tasks = Progress(*columns, console=Console(stderr=True)), dict[str, TaskID]()

    def report(stage: str, done: int, total: int, text: str = "") -> None:
        if stage not in tasks:
            bars.start()  # not earlier: it prints a blank line, and an early error must be one line
            tasks[stage] = bars.add_task(stage, total=total, text=text)
        bars.update(tasks[stage], completed=done, total=total, text=text)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def per_second() -> Callable[[int], float]:
    """A meter: called with a running total, it returns the rate per second since its first call."""
    first: list[tuple[float, int]] = []

    def rate(total: int) -> float:
        now = time.monotonic()
        if not first:
            first.append((now, total))
        began, before = first[0]
        return (total - before) / max(now - began, 1e-9)

    return rate


@contextlib.contextmanager
def bytes_bar(stage: str) -> Iterator[BytesProgress]:
    """Yields a `BytesProgress` that draws a bar, with the bytes per second."""
    with stage_bars() as bars:

        def begin(total: int) -> OnBytes:
            rate, done = per_second(), 0

            def advance(count: int) -> None:
                nonlocal done
                speed = rate(done)
                done += count
                bars(stage, done, total, f"{decimal(done)} of {decimal(total)}, {decimal(int(speed))}/s")

            return advance

        yield begin


@dataclass(frozen=True)
class CorpusProgress:
    """How far a stage of work on a corpus is.

    Attributes:
        stage: "tokenising", "selecting", "writing" or "verifying".
        done: The amount that is done: bytes of input for "tokenising", documents that were looked
            at for "selecting", else tokens.
        total: The amount of the stage, in the same unit.
        documents: Documents done in this stage, including those of an interrupted run.
        tokens: Tokens done in this stage, including those of an interrupted run.
    """

    stage: str
    done: int
    total: int
    documents: int
    tokens: int


OnCorpusProgress = Callable[[CorpusProgress], None]


@contextlib.contextmanager
def corpus_bars() -> Iterator[OnCorpusProgress]:
    """Yields an `OnCorpusProgress` that draws one bar per stage, with documents and token rate."""
    rates: dict[str, Callable[[int], float]] = {}
    with stage_bars() as bars:

        def report(found: CorpusProgress) -> None:
            rate = rates.setdefault(found.stage, per_second())
            if found.tokens or not found.documents:
                text = f"{found.documents:,} documents, {found.tokens:,} tokens, {rate(found.tokens):,.0f} tokens/s"
            else:
                text = f"{found.documents:,} documents, {rate(found.documents):,.0f} documents/s"
            bars(found.stage, found.done, found.total, text)

        yield report
