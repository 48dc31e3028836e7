"""AR against two towers on tasks of lm-evaluation-harness, in one run. It needs `eval`.

`task_runner` runs one setting. Here a worker answers every batch with all settings in turn, so that
a drift of its machine affects all alike.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from lm_eval.tasks import TaskManager

from megatron_twotower.common.engines import ONE_PROCESS, EngineSettings
from megatron_twotower.evaluate.answer_scores import ContextAnswer, Score
from megatron_twotower.evaluate.harness import Reply, ScoreTask, TwoTower, WriteTask
from megatron_twotower.evaluate.harness_settings import Compared, HarnessSettings
from megatron_twotower.evaluate.speed_quality import SweepPoint, sweep_points
from megatron_twotower.evaluate.task_recipes import HarnessTask
from megatron_twotower.evaluate.task_runner import evaluated, facts, opened, outcome

# Rows at a time where given text is scored: unlike writing, this is not timed.
_SCORED_ROWS = 32


@dataclass
class _Written:
    """What a setting has written: tokens, the passes and the seconds that they took."""

    passes: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        """Count what a reply has written."""
        self.passes += reply.passes
        self.new_tokens += reply.new_tokens
        self.seconds += reply.seconds


class ComparedTwoTower(TwoTower):
    """A model whose workers answer every batch with all settings, when the first one asks for it.

    Attributes:
        compared: The settings.
        written: What each of them has written.
    """

    compared: Sequence[HarnessSettings] = ()

    def begin(self, compared: Sequence[HarnessSettings]) -> None:
        """Compare these settings from now on."""
        self.compared = compared
        self.written = {each: _Written() for each in compared}
        self.forget()

    def forget(self) -> None:
        """Forget the answers so far, which no other task asks for."""
        self._texts: dict[Any, dict[HarnessSettings, Reply]] = {}
        self._scores: dict[Any, list[Score]] = {}

    def _replies(self, tasks: Sequence[ScoreTask | WriteTask]) -> Iterator[Reply]:
        assert self._elsewhere is not None
        asking = self.settings
        if not all(isinstance(task, WriteTask) for task in tasks):
            yield from (reply for (reply,) in self._elsewhere.answers(tasks, [asking]))
            return
        keys = [(tuple(map(tuple, task.prompts)), task.answer) for task in tasks if isinstance(task, WriteTask)]
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in self._texts}
        found = self._elsewhere.answers(list(missing.values()), self.compared)
        for key in keys:
            if key not in self._texts:
                self._texts[key] = dict(zip(self.compared, next(found), strict=True))
                for each, reply in self._texts[key].items():
                    self.written[each].add(reply)
            yield self._texts[key][asking]

    def score(self, pairs: Sequence[ContextAnswer], *, quiet: bool = False) -> list[Score]:
        """As `TwoTower.score`, once for settings that score alike."""
        asking = self.settings
        text = tuple((tuple(context), tuple(answer)) for context, answer in pairs)
        key = (asking.scoring, None if asking.scoring == "ar" else asking.block_size, text)
        if key not in self._scores:
            self.settings = replace(asking, batch_size=_SCORED_ROWS)
            self._scores[key] = super().score(pairs, quiet=quiet)
            self.settings = asking
        return self._scores[key]


def compared_settings(
    settings: HarnessSettings, points: Sequence[SweepPoint], drafts: Sequence[int] = ()
) -> list[HarnessSettings]:
    """AR, mask diffusion with the settings of each point, and drafts of each size.

    AR and drafts score given text by the context tower, mask diffusion by the bound of the
    denoiser.
    """
    ar = replace(settings, mode="ar", scoring="ar")
    drafted = [replace(ar, mode="speculative", block_size=size) for size in drafts]
    diffusion = [
        replace(
            settings,
            mode="mask_diffusion",
            scoring="bound",
            block_size=point.block_size,
            confidence_threshold=HarnessSettings.confidence_threshold if point.threshold is None else point.threshold,
            steps_per_block=point.steps or point.block_size,
            sampler=point.sampler,
        )
        for point in points
    ]
    return [ar, *diffusion, *drafted]


def retained(ar: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """The mean over tasks of a setting over that of AR, and its standard error.

    Args:
        ar: The metrics of AR, of the documents of each task.
        other: The metrics of the setting on the same documents.

    Returns:
        The ratio is None if AR's metrics are all 0; the error is None if a task has one document.
        It is that of a ratio of two means, to first order: documents are independent, both
        settings answer the same ones.
    """
    whole = fmean(map(fmean, ar))
    if not whole:
        return None, None
    ratio = fmean(map(fmean, other)) / whole
    if any(len(values) < 2 for values in ar):
        return ratio, None
    residuals = [[b - ratio * a for a, b in zip(*pair, strict=True)] for pair in zip(ar, other, strict=True)]
    return ratio, sum(variance(each) / len(each) for each in residuals) ** 0.5 / len(ar) / whole


def _of_documents(results: Mapping[str, Any], metric: str) -> list[list[float]]:
    """The metric of every document of each task that the harness has run."""
    return [[float(each[metric.partition(",")[0]]) for each in rows] for rows in results["samples"].values()]


def compare_tasks(
    folder: str | Path,
    tasks: Sequence[HarnessTask],
    manager: TaskManager,
    *,
    settings: HarnessSettings,
    compare: Compared,
    limit: int | None = None,
    allow_code_execution: bool = False,
    apply_chat_template: bool = False,
    engine: EngineSettings = ONE_PROCESS,
    journal: Path | None = None,
) -> dict[str, Any]:
    """Run tasks with AR, with mask diffusion, and with drafts that the context tower verifies.

    Args:
        folder: Two-tower Hugging Face folder.
        tasks: The tasks to run.
        manager: The index that has them.
        settings: How the model answers, apart from what is compared.
        compare: What to compare with AR; thresholds and samplers at the block size of `settings`.
        limit: Documents of each task; None for all.
        allow_code_execution: Run code that the model has generated, for tasks that need it.
        apply_chat_template: Ask questions as turns of a conversation.
        engine, journal: As in `run_tasks`.

    Returns:
        The results, ready for JSON. `settings` has a row for each setting, AR first; `tasks` has
        for each task the values of the settings in the same order.

    Raises:
        UserError: A task that cannot be run.
    """
    started = time.perf_counter()
    with opened(ComparedTwoTower, folder, settings, engine=engine, journal=journal) as model:
        found = _compare(
            model,
            tasks,
            manager,
            compare=compare,
            limit=limit,
            options={"confirm_run_unsafe_code": allow_code_execution, "apply_chat_template": apply_chat_template},
        )
    return {
        **found,
        "shared": asdict(model.settings),
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        **facts(folder, started),
    }


def _compare(
    model: ComparedTwoTower,
    tasks: Sequence[HarnessTask],
    manager: TaskManager,
    *,
    compare: Compared,
    limit: int | None,
    options: Mapping[str, bool],
) -> dict[str, Any]:
    """The rows of the settings and of the tasks, see `compare_tasks`."""
    points = sweep_points(
        thresholds=compare.thresholds,
        block_sizes=compare.block_sizes,
        steps=(),
        samplers=compare.samplers,
        trained_block=model.block_size,
        threshold=model.settings.confidence_threshold,
    )
    compared = compared_settings(model.settings, points, compare.drafts)
    model.begin(compared)
    rows: list[dict[str, Any]] = []
    documents: list[list[list[list[float]]]] = [[] for _ in compared]  # setting, task that counts, harness task
    for task in tasks:
        model.forget()
        outcomes = []
        for number, each in enumerate(compared):
            model.use(each)
            results = evaluated(model, task, manager, limit=limit, options=options, with_samples=True)
            outcomes.append(outcome(results, task))
            metric = outcomes[-1]["metric"]
            larger_is_better = all(found[metric.partition(",")[0]] for found in results["higher_is_better"].values())
            if larger_is_better:
                documents[number].append(_of_documents(results, metric))
        rows.append(
            {
                "name": task.name,
                "tasks": list(task.tasks),
                "note": task.note,
                **{key: outcomes[0][key] for key in ("metric", "documents", "versions")},
                "larger_is_better": larger_is_better,
                "values": [found["value"] for found in outcomes],
                "stderrs": [found["stderr"] for found in outcomes],
            }
        )
    return {
        "settings": [
            _setting_row(each, model.written[each], model.written[compared[0]], documents[number], documents[0])
            for number, each in enumerate(compared)
        ],
        "tasks": rows,
    }


def _setting_row(
    settings: HarnessSettings,
    written: _Written,
    ar_written: _Written,
    documents: Sequence[Sequence[Sequence[float]]],
    ar_documents: Sequence[Sequence[Sequence[float]]],
) -> dict[str, Any]:
    """The row of a setting: its speed, and what it retains of AR's metrics."""
    by_diffusion, by_drafts = settings.mode == "mask_diffusion", settings.mode == "speculative"
    speed = written.new_tokens / written.seconds if written.seconds else None
    ar_speed = ar_written.new_tokens / ar_written.seconds if ar_written.seconds else None
    ratio, error = (None, None)
    if settings.mode != "ar" and documents:
        ratio, error = retained([_together(each) for each in ar_documents], [_together(each) for each in documents])
    return {
        "mode": settings.mode,
        "confidence_threshold": settings.confidence_threshold if by_diffusion and settings.sampler is None else None,
        "sampler": settings.sampler if by_diffusion else None,
        "block_size": settings.block_size if by_diffusion or by_drafts else None,
        "steps_per_block": settings.steps_per_block if by_diffusion else None,
        "draft_steps": settings.draft_steps if by_drafts else None,
        "new_tokens": written.new_tokens,
        "passes": written.passes,
        "seconds": written.seconds,
        "tokens_per_pass": written.new_tokens / written.passes if written.passes else None,
        "tokens_per_second": speed,
        "speedup": speed / ar_speed if speed and ar_speed else None,
        "retained": ratio,
        "retained_stderr": error,
    }


def _together(documents: Sequence[Sequence[float]]) -> list[float]:
    """The documents of the harness tasks of a row in one list, each task with the same weight."""
    total = sum(map(len, documents))
    return [value * total / (len(each) * len(documents)) for each in documents for value in each]
