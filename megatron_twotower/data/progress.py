"""How far preparing is, and a bar that shows it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


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
