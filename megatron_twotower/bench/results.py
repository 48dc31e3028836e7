"""What every benchmark does with its results: it prints tables and writes JSON and a picture."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_twotower.common.files import write_file
from megatron_twotower.common.machine import machine_line


def write_results(folder: Path, name: str, results: Mapping[str, Any], picture: bytes | None = None) -> list[Path]:
    """Write `name`.json and, if there is a picture, `name`.png. Returns the files.

    Raises:
        UserError: A file cannot be written.
    """
    contents: dict[Path, bytes | str] = {folder / f"{name}.json": json.dumps(results, indent=1) + "\n"}
    if picture is not None:
        contents[folder / f"{name}.png"] = picture
    for path, content in contents.items():
        write_file(path, content)
    return list(contents)


def report(
    output: Path,
    name: str,
    results: Mapping[str, Any],
    *,
    tables: Iterable[Table],
    console: Console,
    notes: Iterable[str] = (),
    picture: bytes | None = None,
) -> None:
    """Print tables, notes and the machine, and write the results and the picture.

    Args:
        output: The folder to write to.
        name: The name of the files.
        results: For JSON. Its `machine` is what `common.machine.machine` returns.
        notes: Lines to print after the tables.
    """
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    console.print(machine_line(results["machine"]), highlight=False)
    files = write_results(output, name, results, picture)
    console.print(", ".join(map(str, files)), highlight=False)
