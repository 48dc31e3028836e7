"""Tables and numbers on the console."""

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

# --- tables and pictures ------------------------------------------------------------------------------------------


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
    return "-" if value is None else f"{value:,.{digits}f}"


def with_error(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def wide_console() -> Console:
    """The terminal as it is; into a file or a pipe, wide enough for whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=150)
