"""Progress bars on standard error."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclass(frozen=True)
class Stage:
    """name: "tokenising", where done and total are bytes of input; "writing" and "verifying", where they are tokens.

    documents, tokens: of the whole stage so far, what an interrupted run had done included.
    """

    name: str
    done: int
    total: int
    documents: int
    tokens: int


Report = Callable[[Stage], None]


@contextlib.contextmanager
def bar() -> Iterator[Report]:
    """A bar on standard error with documents, tokens and tokens per second; one line for each stage."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    starts: dict[str, tuple[float, int]] = {}
    shown = Progress(*columns, console=Console(stderr=True))

    def report(stage: Stage) -> None:
        if stage.name not in tasks:
            shown.start()  # not before: it leaves a blank line, and an error is to be one line
            tasks[stage.name] = shown.add_task(stage.name, total=stage.total, text="")
            starts[stage.name] = (time.monotonic(), stage.tokens)
        began, before = starts[stage.name]
        rate = (stage.tokens - before) / max(time.monotonic() - began, 1e-9)
        text = f"{stage.documents:,} documents, {stage.tokens:,} tokens, {rate:,.0f} tokens/s"
        shown.update(tasks[stage.name], completed=stage.done, total=stage.total, text=text)

    try:
        yield report
    finally:
        if tasks:
            shown.stop()


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A function that is told the bytes to come, and gives the report that moves a bar on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=Console(stderr=True))

    def begin(total: int) -> Callable[[int], None]:
        shown.start()  # not before: an error of what is checked first is to be one line
        task = shown.add_task(what, total=total)
        return lambda count: shown.advance(task, count)

    try:
        yield begin
    finally:
        if shown.tasks:
            shown.stop()


# Called with: what is being measured, how much of it is done, how much there is.
OnProgress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    pass


@contextmanager
def stage_bars() -> Iterator[OnProgress]:
    """Yields an OnProgress that draws a bar for each stage."""
    percent = TextColumn("{task.percentage:>3.0f}%")
    tasks: dict[str, Any] = {}
    shown = Progress(
        TextColumn("{task.description:<16}"), BarColumn(), percent, TimeElapsedColumn(), console=Console(stderr=True)
    )

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            shown.start()  # not before: it leaves a blank line, and an error is to be one line
            tasks[stage] = shown.add_task(stage, total=total)
        shown.update(tasks[stage], completed=done)

    try:
        yield progress
    finally:
        if tasks:
            shown.stop()
