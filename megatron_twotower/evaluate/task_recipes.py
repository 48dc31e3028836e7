"""Tasks of lm-evaluation-harness to run, from recipes in `recipes/evaluation/` or from names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.evaluate.harness_settings import Compared, HarnessSettings


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


@dataclass(frozen=True)
class TaskSetup:
    """What a recipe says besides its tasks.

    Attributes:
        task_files: Folder of the task files of the recipe; None if they are the harness's own.
        questions: Whether the tasks ask questions of `code_documents`.
        compare: What to compare with AR.
        settings: Fields of `HarnessSettings` that differ from their defaults.
    """

    task_files: Path | None = None
    questions: bool = False
    compare: Compared = field(default_factory=Compared)
    settings: Mapping[str, Any] = field(default_factory=dict)


_SETUP_KEYS = ("task_files", "questions", "compare", "settings")


def task_recipe_names() -> list[str]:
    """Names of the recipes in `recipes/evaluation/`."""
    return sorted(path.stem for path in (recipes_folder() / "evaluation").glob("*.yaml"))


def _content(path: Path) -> dict[str, Any]:
    """The content of a recipe file, whose tasks are not checked yet."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list `tasks`")
    if unknown := sorted(content.keys() - {"tasks", *_SETUP_KEYS}):
        raise UserError(f"{path}: {unknown[0]}: unknown key, expected of tasks, {', '.join(_SETUP_KEYS)}")
    return content


def read_task_recipe(path: Path) -> list[HarnessTask]:
    """Read the tasks of a recipe file.

    Raises:
        UserError: Not a recipe of tasks; the message names the entry.
    """
    known, found = set(HarnessTask.__dataclass_fields__), []
    for number, entry in enumerate(_content(path)["tasks"]):
        where = f"{path}: tasks[{number}]"
        if not isinstance(entry, dict) or not {"name", "tasks"} <= entry.keys():
            raise UserError(f"{where}: expected the keys name and tasks")
        if unknown := sorted(entry.keys() - known):
            raise UserError(f"{where}: {unknown[0]}: unknown key, expected of {', '.join(sorted(known))}")
        tasks = entry["tasks"]
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        found.append(HarnessTask(**{**entry, "tasks": names}))
    return found


def read_task_setup(path: Path) -> TaskSetup:
    """Read what a recipe file says besides its tasks.

    Raises:
        UserError: Not a recipe of tasks; the message names the entry.
    """
    content = _content(path)
    compare, settings, files = content.get("compare", {}), content.get("settings", {}), content.get("task_files")
    for name, section, known in (
        ("compare", compare, tuple(Compared.__dataclass_fields__)),
        ("settings", settings, tuple(HarnessSettings.__dataclass_fields__)),
    ):
        if not isinstance(section, dict) or (unknown := sorted(section.keys() - set(known))):
            found = repr(section) if not isinstance(section, dict) else unknown[0]
            raise UserError(f"{path}: {name}: found {found}, expected of {', '.join(known)}")
    for name, values in compare.items():
        require(isinstance(values, list), f"{path}: compare.{name}: found {values!r}, expected a list")
    return TaskSetup(
        task_files=None if files is None else path.parent / files,
        questions=bool(content.get("questions", False)),
        compare=Compared(**{name: tuple(values) for name, values in compare.items()}),
        settings=settings,
    )


def _recipe_file(name: str) -> Path | None:
    """The recipe file that a word of the command line names; None if it names a task."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return recipes_folder() / "evaluation" / f"{name}.yaml" if name in task_recipe_names() else None


def chosen_tasks(chosen: Sequence[str], *, shots: int | None = None) -> list[HarnessTask]:
    """The tasks that the command line names.

    Args:
        chosen: Names of recipes, paths of recipe files, and names of tasks of the harness.
        shots: Replaces the number of examples in recipes and tasks; None keeps it.
    """
    found: list[HarnessTask] = []
    for name in chosen:
        path = _recipe_file(name)
        found += [HarnessTask(name, (name,))] if path is None else read_task_recipe(path)
    return found if shots is None else [replace(task, shots=shots) for task in found]


def chosen_setup(chosen: Sequence[str]) -> TaskSetup:
    """What the recipes that the command line names say besides their tasks.

    Raises:
        UserError: A recipe that says something is not alone.
    """
    for name in chosen:
        path = _recipe_file(name)
        setup = TaskSetup() if path is None else read_task_setup(path)
        if setup != TaskSetup():
            if len(chosen) > 1:
                raise UserError(f"--tasks: found {name} with others, expected it alone: it has settings of its own")
            return setup
    return TaskSetup()
