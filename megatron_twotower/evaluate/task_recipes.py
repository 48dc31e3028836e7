"""Tasks of lm-evaluation-harness to run, from recipes in `recipes/evaluation/` or from names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder


@dataclass(frozen=True)
class HarnessTask:
    """One row of the table of results.

    Attributes:
        name: Name of the row.
        tasks: Names of tasks, groups or tags of the harness; the result is their plain mean.
        shots: Examples before a question; None for the number of the task.
        metric: The metric as the harness names it, such as "acc,none"; None for its first one.
        card: Results in the card of the released model, in percent, by mode.
        overrides: Settings that replace those of the task.
        note: a remark for the reader of the results.
    """

    name: str
    tasks: tuple[str, ...]
    shots: int | None = None
    metric: str | None = None
    card: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def task_recipe_names() -> list[str]:
    """Names of the recipes in `recipes/evaluation/`."""
    return sorted(path.stem for path in (recipes_folder() / "evaluation").glob("*.yaml"))


def read_task_recipe(path: Path) -> list[HarnessTask]:
    """Read the tasks of a recipe file.

    Raises:
        UserError: Not a recipe of tasks; the message names the entry.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list `tasks`")
    known, found = set(HarnessTask.__dataclass_fields__), []
    for number, entry in enumerate(entries):
        where = f"{path}: tasks[{number}]"
        if not isinstance(entry, dict) or not {"name", "tasks"} <= entry.keys():
            raise UserError(f"{where}: expected the keys name and tasks")
        if unknown := sorted(entry.keys() - known):
            raise UserError(f"{where}: {unknown[0]}: unknown key, expected of {', '.join(sorted(known))}")
        tasks = entry["tasks"]
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        found.append(HarnessTask(**{**entry, "tasks": names}))
    return found


def chosen_tasks(chosen: Sequence[str], *, shots: int | None = None) -> list[HarnessTask]:
    """The tasks that the command line names.

    Args:
        chosen: Names of recipes, paths of recipe files, and names of tasks of the harness.
        shots: Replaces the number of examples in recipes and tasks; None keeps it.
    """
    found: list[HarnessTask] = []
    for name in chosen:
        if name.endswith((".yaml", ".yml")):
            found += read_task_recipe(Path(name))
        elif name in task_recipe_names():
            found += read_task_recipe(recipes_folder() / "evaluation" / f"{name}.yaml")
        else:
            found.append(HarnessTask(name, (name,)))
    return found if shots is None else [replace(task, shots=shots) for task in found]
