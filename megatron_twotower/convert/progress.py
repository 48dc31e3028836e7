"""A bar over bytes that are converted."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_twotower.convert.tensors import Report, Watch


@contextlib.contextmanager
def bar(what: str) -> Iterator[Watch]:
    """A function that is told the bytes to come, and gives the report that moves a bar on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=Console(stderr=True))

    def begin(total: int) -> Report:
        shown.start()  # not before: an error of what is checked first is to be one line
        task = shown.add_task(what, total=total)
        return lambda count: shown.advance(task, count)

    try:
        yield begin
    finally:
        if shown.tasks:
            shown.stop()
