"""Tasks of lm-evaluation-harness answered by the workers of an engine, and resumed.

The process that runs the harness holds the questions. Each worker has a model. Every reply is kept
in a journal next to the output, by the checksum of its task, so that a run that was killed asks
only what is missing.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_twotower.common.workers import Engine, in_order
from megatron_twotower.evaluate.harness import Elsewhere, Reply, ScoreTask, TwoTower, WriteTask
from megatron_twotower.evaluate.harness_settings import HarnessSettings
from megatron_twotower.generate.journal import append, entries
from megatron_twotower.generate.loaded import ModelFacts, ModelPlace, facts_of
from megatron_twotower.generate.prompt_file import BATCHES_AHEAD

Model = TypeVar("Model", bound=TwoTower)


@dataclass(frozen=True)
class _Asked:
    """A task for a worker: `settings` open the model, which answers with each of `compared`."""

    place: ModelPlace
    settings: HarnessSettings
    task: ScoreTask | WriteTask
    compared: tuple[HarnessSettings, ...]


def open_model(
    kind: type[Model], folder: str | Path, settings: HarnessSettings, *, elsewhere: Elsewhere | None = None
) -> Model:
    """A two-tower folder as a model of the harness, with settings."""
    return kind(
        folder,
        mode=settings.mode,
        scoring=settings.scoring,
        batch_size=settings.batch_size,
        max_length=settings.max_length_tokens,
        max_gen_toks=settings.max_new_tokens,
        block_size=settings.block_size,
        steps_per_block=settings.steps_per_block,
        confidence_threshold=settings.confidence_threshold,
        draft_steps=settings.draft_steps,
        bound_draws=settings.bound_draws,
        seed=settings.seed,
        prefill_chunk_size=settings.prefill_chunk_size,
        sampler=settings.sampler,
        elsewhere=elsewhere,
    )


@functools.lru_cache(maxsize=1)
def _model_here(place: ModelPlace, settings: HarnessSettings) -> TwoTower:
    return open_model(TwoTower, place.folder, settings)


def answer(asked: _Asked) -> list[Reply]:
    """Do a task with the model of this process, with each of the settings in turn."""
    model, replies, task = _model_here(asked.place, asked.settings), [], asked.task
    reads = model.read(task) if len(asked.compared) > 1 and isinstance(task, WriteTask) else None
    for each in asked.compared:
        model.use(each)
        replies.append(model.reply(task, reads))
    return replies


def facts_here(asked: tuple[ModelPlace, HarnessSettings]) -> ModelFacts:
    """The facts of the model of this process."""
    return facts_of(_model_here(*asked).model)


def model_elsewhere(
    engine: Engine, place: ModelPlace, settings: HarnessSettings, *, kind: type[Model], journal: IO[bytes] | None = None
) -> Model:
    """The model of the harness, answered by the workers of an engine.

    Args:
        kind: The class that asks.
        journal: The open journal of the run, see `journal.open_journal`; None to keep nothing.

    Raises:
        UserError: The model cannot be loaded.
    """
    ((_, facts),) = engine(facts_here, [(place, settings)])
    known = (
        {} if journal is None else {each["key"]: list(map(_read_reply, each["replies"])) for each in entries(journal)}
    )

    def answers(tasks: Sequence[ScoreTask | WriteTask], compared: Sequence[HarnessSettings]) -> Iterator[list[Reply]]:
        keys = [_key(task, compared) for task in tasks]
        missing = [
            _Asked(place, settings, task, tuple(compared))
            for task, key in zip(tasks, keys, strict=True)
            if key not in known
        ]
        found = in_order(engine, answer, missing, ahead=BATCHES_AHEAD)
        for key in keys:
            if key in known:
                yield known[key]
                continue
            _, replies = next(found)
            if journal is not None:
                append(journal, {"key": key, "replies": list(map(dataclasses.asdict, replies))})
            yield replies

    return open_model(kind, place.folder, settings, elsewhere=Elsewhere(facts, answers))


def _key(task: ScoreTask | WriteTask, compared: Sequence[HarnessSettings]) -> str:
    asked = [type(task).__name__, dataclasses.asdict(task), list(map(dataclasses.asdict, compared))]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read_reply(found: dict[str, Any]) -> Reply:
    values = [tuple(value) if isinstance(value, list) else value for value in found.pop("values")]
    return Reply(values, **found)
