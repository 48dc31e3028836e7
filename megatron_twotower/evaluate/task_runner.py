"""Runs tasks of lm-evaluation-harness on a two-tower folder. It needs the extra `eval`.

`tasks` is the command around it, `harness` the model that answers.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_twotower.common.engines import ONE_PROCESS, EngineSettings, started
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.config.hf_config import read_hf_config
from megatron_twotower.evaluate.answering import Model, model_elsewhere, open_model
from megatron_twotower.evaluate.harness import TwoTower
from megatron_twotower.evaluate.harness_settings import HarnessSettings
from megatron_twotower.evaluate.task_recipes import HarnessTask
from megatron_twotower.generate.journal import open_journal
from megatron_twotower.generate.loaded import ModelPlace

__all__ = ["open_model", "run_tasks"]  # `open_model` is of `answering`

# Version of the journal.
JOURNAL_VERSION = 3

# For its own report the harness lists the machine and all installed packages, in other processes
# and for every task. Results here name machine, commit and releases once.
evaluator.add_env_info = lambda results: None
# It says of every task with a `custom_dataset` how to pass settings to it.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())


def run_tasks(
    folder: str | Path,
    tasks: Sequence[HarnessTask],
    manager: TaskManager,
    *,
    settings: HarnessSettings,
    limit: int | None = None,
    allow_code_execution: bool = False,
    apply_chat_template: bool = False,
    engine: EngineSettings = ONE_PROCESS,
    journal: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        folder: Two-tower Hugging Face folder.
        tasks: The tasks to run.
        manager: The index that has them.
        settings: How the model answers.
        limit: Documents of each task; None for all.
        allow_code_execution: Run code that the model has generated, for tasks that need it.
        apply_chat_template: Ask questions as turns of a conversation, examples as earlier turns.
        engine: Who answers. Each worker has a model of its own.
        journal: The file that keeps answers, from which an interrupted run resumes; None for none.

    Returns:
        The results, ready for JSON.

    Raises:
        UserError: a task that does not exist or that cannot be run.
    """
    began = time.perf_counter()
    options = {"confirm_run_unsafe_code": allow_code_execution, "apply_chat_template": apply_chat_template}
    with opened(TwoTower, folder, settings, engine=engine, journal=journal) as model:
        rows = [_run_task(model, task, manager, limit=limit, options=options) for task in tasks]
    return {
        "tasks": rows,
        "settings": asdict(model.settings),
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        **facts(folder, began),
    }


@contextlib.contextmanager
def opened(
    kind: type[Model], folder: str | Path, settings: HarnessSettings, *, engine: EngineSettings, journal: Path | None
) -> Iterator[Model]:
    """Yields the model of the harness, answered by the workers of an engine.

    Args:
        kind: The class that asks.
        engine, journal: As in `run_tasks`.

    Raises:
        UserError: The engine or the model cannot be started, or the journal is of another run.
    """
    read_hf_config(folder)  # a wrong path is found before workers start
    place = ModelPlace.of(folder)
    request = {"version": JOURNAL_VERSION, "model": place.fingerprint, **asdict(settings)}
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(started(engine, place.needs))
        stream = None if journal is None else stack.enter_context(open_journal(journal, request))[0]
        yield model_elsewhere(workers, place, settings, kind=kind, journal=stream)


def facts(folder: str | Path, began: float) -> dict[str, Any]:
    """What results say about model, harness and machine, and the seconds since `began`."""
    return {
        "model": str(folder),
        "weights_sample_sha256": weights_sample(Path(folder)),
        "lm_eval": version("lm_eval"),
        "machine": machine(),
        "seconds": time.perf_counter() - began,
    }


def _run_task(
    model: TwoTower, task: HarnessTask, manager: TaskManager, *, limit: int | None, options: Mapping[str, bool]
) -> dict[str, Any]:
    """Run one task; returns its row of the table."""
    model.passes, model.new_tokens, model.seconds, started = 0, 0, 0.0, time.perf_counter()
    results = evaluated(model, task, manager, limit=limit, options=options)
    return {
        "name": task.name,
        "tasks": list(task.tasks),
        "shots": task.shots,
        "note": task.note,
        "card": dict(task.card),
        **outcome(results, task),
        "seconds": time.perf_counter() - started,
        "new_tokens": model.new_tokens,
        "tokens_per_pass": model.new_tokens / model.passes if model.passes else None,
        "tokens_per_second": model.new_tokens / model.seconds if model.passes else None,
    }


def evaluated(
    model: TwoTower,
    task: HarnessTask,
    manager: TaskManager,
    *,
    limit: int | None,
    options: Mapping[str, bool],
    with_samples: bool = False,
) -> dict[str, Any]:
    """What the harness returns of a task.

    Args:
        model: The model that answers.
        task: The task to run.
        manager: The index that has it.
        limit: Documents; None for all.
        options: Keywords of `simple_evaluate`.
        with_samples: Whether to return the metrics of every document too.

    Raises:
        UserError: The task cannot be run.
    """
    seed = model.settings.seed
    try:
        return simple_evaluate(
            model,
            tasks=load_tasks(task, manager),
            num_fewshot=task.shots,
            limit=limit,
            task_manager=manager,
            log_samples=with_samples,
            **options,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, ConnectionError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"task {', '.join(task.tasks)}: cannot be run ({reason})") from error


def outcome(results: Mapping[str, Any], task: HarnessTask) -> dict[str, Any]:
    """The metric of a task; of several harness tasks, their plain mean."""
    tables = results["results"]
    # A tag of the harness has no table of its own, but its tasks have.
    names = list(task.tasks) if all(name in tables for name in task.tasks) else list(tables)
    metric = task.metric or _metrics(tables[names[0]])[0]
    missing = [name for name in names if metric not in tables[name]]
    if missing:
        found = ", ".join(_metrics(tables[missing[0]]))
        raise UserError(f"task {missing[0]}: metric {metric!r}: not found, expected one of {found}")
    errors = [tables[name].get(metric.replace(",", "_stderr,")) for name in names]
    known_errors = [error for error in errors if isinstance(error, float)]
    has_stderr = len(known_errors) == len(names)
    return {
        "metric": metric,
        "value": sum(tables[name][metric] for name in names) / len(names),
        "stderr": sum(error**2 for error in known_errors) ** 0.5 / len(names) if has_stderr else None,
        "documents": sum(count["effective"] for count in results["n-samples"].values()),
        "versions": {name: results["versions"].get(name) for name in names},
    }


def _metrics(table: Mapping[str, Any]) -> list[str]:
    """The metrics in a table of results, as "acc,none"; the other keys are "alias" and errors."""
    return [key for key in table if "," in key and "_stderr" not in key]


def task_manager(
    tasks: Sequence[HarnessTask], include_path: str | Path | None = None, *, metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """The harness's index of tasks, with all of these tasks.

    The harness has thousands of task files of its own. They are read only if a task is not found in
    `include_path`.

    Args:
        metadata: What the functions of the task files receive; None for nothing.

    Raises:
        UserError: An unknown name.
    """
    names = [name for task in tasks for name in task.tasks]
    path = None if include_path is None else str(include_path)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False, metadata=dict(metadata or {}))
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=path, metadata=dict(metadata or {}))
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"task {name!r}: not found, expected one of lm-evaluation-harness's or of --task-files")
    return manager


def load_tasks(task: HarnessTask, manager: TaskManager) -> list[Any]:
    """The tasks for the harness to run: names, or loaded tasks with our overrides.

    The harness merges settings when one task file includes another. So this writes a temporary file
    that includes the task and has the overrides, and loads it.
    """
    if not task.overrides:
        return list(task.tasks)
    loaded: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in task.tasks:
            file = Path(folder) / f"{name}.yaml"
            own = {"include": str(manager.task_index[name].yaml_path), "task": name, **task.overrides}
            file.write_text(yaml.safe_dump(own))
            loaded += manager.load([str(file)])["tasks"].values()
    return loaded


def weights_sample(folder: Path) -> str:
    """A SHA-256 over samples of a model folder, to tell folders apart in seconds.

    It covers the configuration, and of each weight file the name, the size and 64 samples of 64
    KiB. Equal values do not prove that two folders are equal.
    """
    samples, size = 64, 65536
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        total = file.stat().st_size
        digest.update(json.dumps([file.name, total]).encode())
        with file.open("rb") as stream:
            for number in range(samples):
                stream.seek(number * max(0, total - size) // (samples - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()
