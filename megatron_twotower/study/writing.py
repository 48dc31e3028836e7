"""How fast the denoisers of a study write, at equal agreement with AR.

A denoiser that commits more tokens in a pass agrees less with what AR would write, so each is
measured at several confidence thresholds, and compared where they agree equally.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_twotower.common.files import read_json_object, write_file
from megatron_twotower.convert.export import export
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.evaluate.speed_quality import sweep, sweep_points
from megatron_twotower.generate.engine import load
from megatron_twotower.study.design import Training
from megatron_twotower.study.figures import Mean, mean

WRITING_FILE = "writing.json"
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 64, 64
# Shares of the tokens that AR would choose, at which denoisers are compared.
AGREEMENTS = (0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


class Speed(NamedTuple):
    """Tokens per pass at some agreement.

    Attributes:
        at_least: The fastest setting that was measured (of a seed) agrees more than that.
    """

    tokens_per_pass: Mean
    at_least: bool


class Speeds(NamedTuple):
    """Tokens per pass of an arm, over the seeds that were measured.

    Attributes:
        seeds: Their number.
        at: By agreement; `None` where a seed does not agree so much.
    """

    seeds: int
    at: dict[float, Speed | None]


def can_write(training: Training) -> bool:
    """Whether there is a folder to generate with: a denoiser without a part has none."""
    return training.config.conditioning.without == "nothing"


def measure(training: Training) -> None:
    """Let the denoiser of a training continue held-out prompts greedily; write `writing.json`.

    Raises:
        UserError: The run cannot be exported, or its data cannot be read.
    """
    with tempfile.TemporaryDirectory(dir=training.folder) as place:
        export(training.folder, Path(place) / "model")
        model, _ = load(Path(place) / "model")
        corpus = Corpus.open(Path(training.config.data.folder) / VALIDATION)
        prompts = evenly_spaced_windows(corpus, count=PROMPTS, length=PROMPT_TOKENS)
        points = sweep_points(
            thresholds=THRESHOLDS, block_sizes=(), steps=(), trained_block=model.block_size, threshold=THRESHOLDS[0]
        )
        found = sweep(model, prompts, points=points, max_new_tokens=NEW_TOKENS, mask_id=model.mask_token_id)
    keys = ("confidence_threshold", "tokens_per_pass", "agreement", "agreement_stderr")
    curve = [{key: row[key] for key in keys} for row in found[1:]]
    settings = {"prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    write_file(training.folder / WRITING_FILE, json.dumps({"settings": settings, "curve": curve}, indent=1) + "\n")


def measured(training: Training) -> list[dict[str, Any]] | None:
    """The curve of a training, if it was measured."""
    file = training.folder / WRITING_FILE
    return read_json_object(file, expected="tokens per pass")["curve"] if file.is_file() else None


def tokens_per_pass_at(agreement: float, curve: Sequence[Mapping[str, Any]]) -> tuple[float, bool] | None:
    """The most tokens per pass with at least this agreement, linear between two thresholds.

    Returns:
        The number, and whether it is that of the fastest setting: there may be a faster one that
        agrees enough. `None` if no threshold agrees so much.
    """
    points = sorted((row["tokens_per_pass"], row["agreement"]) for row in curve)
    good = [number for number, (_, agrees) in enumerate(points) if agrees >= agreement]
    if not good:
        return None
    speed, agrees = points[good[-1]]
    if good[-1] + 1 == len(points):
        return speed, True
    next_speed, next_agrees = points[good[-1] + 1]
    return speed + (next_speed - speed) * (agrees - agreement) / (agrees - next_agrees), False


def means(trainings: Sequence[Training]) -> dict[tuple[str, str, float], Speeds]:
    """Tokens per pass by size, arm and share, of those that were measured."""
    curves: dict[tuple[str, str, float], list[list[dict[str, Any]]]] = {}
    for training in trainings:
        if (curve := measured(training)) is not None:
            curves.setdefault((training.size, training.arm, training.share), []).append(curve)
    return {
        key: Speeds(len(of_seeds), {agreement: _speed_at(agreement, of_seeds) for agreement in AGREEMENTS})
        for key, of_seeds in curves.items()
    }


def _speed_at(agreement: float, curves: Sequence[Sequence[Mapping[str, Any]]]) -> Speed | None:
    """The mean over the curves of all seeds; `None` if one of them does not agree so much."""
    speeds = [tokens_per_pass_at(agreement, curve) for curve in curves]
    reached = [speed for speed in speeds if speed is not None]
    if len(reached) < len(speeds):
        return None
    return Speed(mean([tokens for tokens, _ in reached]), any(fastest for _, fastest in reached))
