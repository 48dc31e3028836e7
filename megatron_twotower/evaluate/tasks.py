"""The command `evaluate --tasks`: benchmark tasks through lm-evaluation-harness, one table, one JSON file."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.common.machine import machine_line
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.evaluate.task_recipes import chosen_tasks


def results_table(found: Mapping[str, Any]) -> Table:
    """A line for each task, in percent; what the released model's card reports for the same mode beside it."""
    own = found["settings"]
    mode = own["mode"]
    with_card = any(row["card"] for row in found["tasks"])
    headings = [
        "task",
        "shots",
        "metric",
        "%",
        *(["card, AR", "card, two towers"] if with_card else []),
        "documents",
        "tokens/pass",
        "tokens/s",
        "seconds",
    ]
    rows = [
        [
            row["name"],
            "own" if row["shots"] is None else str(row["shots"]),
            row["metric"],
            with_error(100 * row["value"], None if row["stderr"] is None else 100 * row["stderr"]),
            *([number(row["card"].get(key)) for key in ("ar", "mask_diffusion")] if with_card else []),
            f"{row['documents']:,}",
            number(row["tokens_per_pass"]),
            number(row["tokens_per_second"], 1),
            number(row["seconds"], 1),
        ]
        for row in found["tasks"]
    ]
    part = "" if found["limit"] is None else f", the first {found['limit']} documents of each"
    return plain_table(f"{found['model']}: writing by {mode}, scoring by {own['scoring']}{part}", headings, rows)


def run(
    folder: str | Path,
    *,
    chosen: Sequence[str],
    output: str | Path,
    settings: Mapping[str, Any] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    task_files: Path | None = None,
    allow_code_execution: bool = False,
    console: Console | None = None,
) -> None:
    """Run the tasks, print their table and write `output`.

    Args:
        chosen: see `chosen_tasks`. settings: fields of `HarnessSettings` that differ from its own.

    Raises:
        UserError: the harness is not installed, or see `run_tasks`; nothing is written then.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: not installed, expected for --tasks (pip install 'megatron-twotower[eval]')")
    tasks = chosen_tasks(chosen, shots=shots)
    from megatron_twotower.evaluate import harness

    found = harness.run_tasks(
        folder,
        tasks,
        settings=harness.HarnessSettings(**(settings or {})),
        limit=limit,
        include_path=task_files,
        allow_code_execution=allow_code_execution,
    )
    write_file(Path(output), (json.dumps(found, indent=1) + "\n").encode())
    console = console or wide_console()
    console.print(results_table(found))
    console.print(machine_line(found["machine"]), highlight=False)
