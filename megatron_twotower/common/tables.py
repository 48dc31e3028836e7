"""Tables and numbers on the console."""

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def plain_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[RenderableType]], *, left: int = 0
) -> Table:
    """A table with right-aligned columns, except for the first `left` ones."""
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def number(value: float | None, digits: int = 2) -> str:
    """A number with separated thousands and `digits` decimals; `None` as a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """A number and its standard error, if the error is known."""
    shown = number(value, digits)
    return shown if error is None else f"{shown} ± {number(error, digits)}"


def wide_console() -> Console:
    """A console as wide as the terminal, or wide enough for every table in a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=150)
