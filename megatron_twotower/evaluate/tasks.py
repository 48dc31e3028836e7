"""The command `evaluate --tasks`: benchmark tasks of lm-evaluation-harness."""

import importlib.util
import json
import tempfile
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
from megatron_twotower.evaluate.code_documents import read_index, write_documents
from megatron_twotower.evaluate.harness_settings import Compared, HarnessSettings
from megatron_twotower.evaluate.speed_quality import rule_name
from megatron_twotower.evaluate.task_recipes import TaskSetup, chosen_setup, chosen_tasks

# What a comparison decides itself, and the options that say it.
_COMPARED = {"mode": "--mode", "scoring": "--scoring", "steps_per_block": "--steps-per-block", "sampler": "--sampler"}


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


def _percent_or_nats(row: Mapping[str, Any], number_of_setting: int) -> str:
    scale = 100 if row["larger_is_better"] else 1
    error = row["stderrs"][number_of_setting]
    return with_error(scale * row["values"][number_of_setting], None if error is None else scale * error)


def _setting_name(row: Mapping[str, Any]) -> str:
    if row["mode"] == "ar":
        return "AR"
    return f"{'drafts' if row['mode'] == 'speculative' else rule_name(row)}, S {row['block_size']}"


def comparison_tables(found: Mapping[str, Any]) -> list[Table]:
    """Quality by task and setting, and the speed of each setting."""
    settings, tasks = found["settings"], found["tasks"]
    names = [_setting_name(row) for row in settings]
    quality = [
        [
            name,
            *(_percent_or_nats(task, number) for task in tasks),
            "-" if row["retained"] is None else with_error(100 * row["retained"], _percent(row["retained_stderr"])),
        ]
        for number, (name, row) in enumerate(zip(names, settings, strict=True))
    ]
    speed = [
        [
            name,
            number(row["tokens_per_pass"]),
            number(row["tokens_per_second"], 1),
            number(row["speedup"]),
            f"{row['new_tokens']:,}",
            number(row["seconds"], 1),
        ]
        for name, row in zip(names, settings, strict=True)
    ]
    part = "" if found["limit"] is None else f", the first {found['limit']} documents of each"
    headings = [f"{task['name']} ({task['documents']:,})" for task in tasks]
    return [
        plain_table(
            f"{found['model']}: %, two towers by rule and block size{part}",
            ["", *headings, "retained"],
            quality,
            left=1,
        ),
        plain_table(
            "wall-clock against cached AR of the same run",
            ["", "tokens/pass", "tokens/s", "x AR", "tokens", "seconds"],
            speed,
            left=1,
        ),
    ]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


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
    compare: Compared | None = None,
    questions: Path | None = None,
    engine: EngineSettings = ONE_PROCESS,
    console: Console | None = None,
) -> None:
    """Run the command: run the tasks, write `output` and print the table.

    With something to compare, of the command or of a recipe, each task is run with AR and with all
    of that.

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
        compare: What to compare with AR; None for what the recipe says.
        questions: Folder of questions for a recipe that asks them; None to write them for this run.
        engine: Who answers. Each worker has a model of its own.
        console: The console to print on; None for standard output.

    Raises:
        UserError: The harness is not installed, or see `run_tasks`; `output` is not written then.
            OUTPUT.partial keeps the answers, if there were any.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: not installed, expected for --tasks (pip install 'megatron-twotower[eval]')")
    tasks, setup = chosen_tasks(chosen, shots=shots), chosen_setup(chosen)
    if questions is not None and not setup.questions:
        raise UserError(f"--questions: found with {' '.join(chosen)}, which asks none")
    if task_files is not None and setup.task_files is not None:
        raise UserError(f"--task-files: found with {chosen[0]}, which has files of its own")
    compared, given = setup.compare if compare is None else compare, dict(settings or {})
    comparing = compared != Compared()
    unused = _COMPARED if compared.drafts else _COMPARED | {"draft_steps": "--draft-steps"}
    if comparing and (idle := [option for name, option in unused.items() if name in given]):
        raise UserError(f"{idle[0]}: found with a comparison of AR and mask diffusion, which does not use it")
    own = HarnessSettings(**{**setup.settings, **given})
    for size in compared.drafts:
        if size <= own.draft_steps:
            raise UserError(f"--drafts: found {size} with --draft-steps {own.draft_steps}, expected more than it")
    # These need lm_eval.
    from megatron_twotower.evaluate.comparison import compare_tasks
    from megatron_twotower.evaluate.task_runner import run_tasks, task_manager

    journal = partial_path(Path(output))
    with tempfile.TemporaryDirectory() as written:
        facts, folder_of_questions = _questions(setup, questions, written)
        manager = task_manager(tasks, setup.task_files or task_files, metadata=folder_of_questions)
        common: dict[str, Any] = {
            "settings": own,
            "limit": limit,
            "allow_code_execution": allow_code_execution,
            "apply_chat_template": apply_chat_template,
            "engine": engine,
            "journal": journal,
        }
        journal.parent.mkdir(parents=True, exist_ok=True)
        if comparing:
            found = compare_tasks(folder, tasks, manager, compare=compared, **common)
        else:
            found = run_tasks(folder, tasks, manager, **common)
    found |= facts
    write_file(Path(output), (json.dumps(found, indent=1) + "\n").encode())
    journal.unlink(missing_ok=True)
    console = console or wide_console()
    for table in comparison_tables(found) if comparing else [results_table(found)]:
        console.print(table)
    console.print(machine_line(found["machine"]), highlight=False)


def _questions(setup: TaskSetup, folder: Path | None, new: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What results say about the questions of a recipe, and what its task files receive.

    Args:
        setup: What the recipe says.
        folder: The folder of the questions; None to write them to `new`.
        new: An empty folder.
    """
    if not setup.questions:
        return {}, {}
    index = write_documents(Path(new)) if folder is None else read_index(folder)
    return {"questions": index}, {"questions": str(folder or new)}
