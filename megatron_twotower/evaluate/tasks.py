"""The command `evaluate --tasks`: benchmark tasks of lm-evaluation-harness."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_twotower.common.engines import ONE_PROCESS, EngineSettings
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import partial_path, write_file
from megatron_twotower.common.machine import machine_line
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.evaluate.harness_settings import HarnessSettings
from megatron_twotower.evaluate.task_recipes import chosen_tasks


def results_table(found: Mapping[str, Any]) -> Table:
    """A row for each task, in percent, with the results in the card of the released model."""
    settings = found["settings"]
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
    title = f"{found['model']}: writing by {settings['mode']}, scoring by {settings['scoring']}{part}"
    return plain_table(title, headings, rows)


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
    apply_chat_template: bool = False,
    engine: EngineSettings = ONE_PROCESS,
    console: Console | None = None,
) -> None:
    """Run the command: run the tasks, write `output` and print the table.

    Args:
        folder: Two-tower Hugging Face folder.
        chosen: Names of recipes, paths of recipe files, and names of tasks of the harness.
        output: JSON file.
        settings: Fields of `HarnessSettings` that differ from their defaults.
        shots: Replaces the number of examples in recipes and tasks; None keeps it.
        limit: Documents of each task; None for all.
        task_files: Folder of further task files.
        allow_code_execution: Run code that the model has generated, for tasks that need it.
        apply_chat_template: Ask questions as turns of a conversation.
        engine: Who answers. Each worker has a model of its own.
        console: The console to print on; None for standard output.

    Raises:
        UserError: The harness is not installed, or see `run_tasks`; `output` is not written then.
            OUTPUT.partial keeps the answers, if there were any.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: not installed, expected for --tasks (pip install 'megatron-twotower[eval]')")
    tasks = chosen_tasks(chosen, shots=shots)
    from megatron_twotower.evaluate.task_runner import run_tasks  # needs lm_eval

    journal = partial_path(Path(output))
    journal.parent.mkdir(parents=True, exist_ok=True)
    found = run_tasks(
        folder,
        tasks,
        settings=HarnessSettings(**(settings or {})),
        limit=limit,
        include_path=task_files,
        allow_code_execution=allow_code_execution,
        apply_chat_template=apply_chat_template,
        engine=engine,
        journal=journal,
    )
    write_file(Path(output), (json.dumps(found, indent=1) + "\n").encode())
    journal.unlink()
    console = console or wide_console()
    console.print(results_table(found))
    console.print(machine_line(found["machine"]), highlight=False)
