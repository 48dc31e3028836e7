"""What a report is made of, read from a folder that `make train` wrote (`runs/quickstart`).

ar/, twotower/               two training runs: metrics.jsonl, config.yaml, provenance.json
evaluation.json              the output of `twotower evaluate`
longer.json                  optional: the same for a pair that was trained for longer
conditioning/NAME/           optional: metrics.jsonl of a run whose `conditioning.initialisation`
                             is NAME
generation.html              optional: the replay that `twotower generate --html` wrote
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import read_json_object
from megatron_twotower.common.plots import Curve
from megatron_twotower.common.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PROVENANCE_FILE,
    read_metrics,
    read_provenance,
)
from megatron_twotower.generate.replay import page as replay

EVALUATION_FILE, LONGER_FILE, REPLAY_FILE = "evaluation.json", "longer.json", "generation.html"
RUNS = ("ar", "twotower")
EVALUATION_KEYS = (
    "ar_loss",
    "ar_loss_per_byte",
    "ar_loss_on_bound_tokens",
    "masked_loss_by_noise",
    "diffusion_bound",
    "diffusion_bound_stderr",
    "sweep",
    "ar_generation",
    "samples",
    "settings",
    "device",
    "dtype",
    "threads",
)


@dataclass(frozen=True)
class TrainingRun:
    """The records of one training run, as `metrics.jsonl` stores them."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def train_curve(self) -> Curve:
        """Training loss by optimizer step."""
        return [(record["step"], record["loss"]) for record in self.train if record.get("loss") is not None]

    @property
    def validation_curve(self) -> Curve:
        """Validation loss by optimizer step."""
        return [(record["step"], record["loss"]) for record in self.validation if record.get("loss") is not None]

    def until(self, step: int) -> "TrainingRun":
        """The same run up to and including an optimizer step."""
        parts = ([record for record in records if record["step"] <= step] for records in (self.train, self.validation))
        return TrainingRun(*parts)


@dataclass(frozen=True)
class Findings:
    """Everything a report shows.

    Attributes:
        name: The name of the folder.
        longer: The evaluation of a pair that was trained for longer, if there is one.
        conditioning: The runs that compare starts of the time conditioning, by name.
        texts: Configurations and provenance, by name, word for word.
        backbone: The folder that both towers started from, if the run recorded one.
        recording: The recording of the replay, if there is one.
    """

    name: str
    ar: TrainingRun
    twotower: TrainingRun
    evaluation: dict[str, Any]
    longer: dict[str, Any] | None = None
    conditioning: dict[str, TrainingRun] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    backbone: str | None = None
    recording: dict[str, Any] | None = None

    @property
    def sweep(self) -> list[dict[str, Any]]:
        """The rows of the sweep with a confidence threshold, highest first. AR has none."""
        rows = [row for row in self.evaluation["sweep"] if row.get("confidence_threshold") is not None]
        return sorted(rows, key=lambda row: -row["confidence_threshold"])


def read_findings(run: Path) -> Findings:
    """Read a folder that `make train` wrote.

    Raises:
        UserError: A file is missing or cannot be read; the message names it.
    """
    ar, twotower = (_read_training(run / name / METRICS_FILE) for name in RUNS)
    evaluation = _read_evaluation(run / EVALUATION_FILE)
    longer = _read_evaluation(run / LONGER_FILE) if (run / LONGER_FILE).is_file() else None
    if longer:
        _check_same_text(evaluation, longer, run / LONGER_FILE)
    files = [run / name / file for name in RUNS for file in (CONFIG_FILE, PROVENANCE_FILE)]
    texts = {str(path.relative_to(run)): path.read_text() for path in files if path.is_file()}
    compared = sorted((run / "conditioning").glob(f"*/{METRICS_FILE}"))
    return Findings(
        name=run.resolve().name,
        ar=ar,
        twotower=twotower,
        evaluation=evaluation,
        longer=longer,
        conditioning=_conditioning_runs(compared, twotower, _initialisation(run / "twotower" / CONFIG_FILE)),
        texts=texts | {"evaluation settings": json.dumps(evaluation["settings"], indent=1)},
        backbone=read_provenance(run / "twotower").get("backbone"),
        recording=replay.read_page(run / REPLAY_FILE) if (run / REPLAY_FILE).is_file() else None,
    )


def _read_training(path: Path) -> TrainingRun:
    records = read_metrics(path)
    kinds = {kind: [record for record in records if record.get("kind") == kind] for kind in ("train", "validation")}
    for kind, found in kinds.items():
        if not found:
            raise UserError(f"{path}: found no record of kind {kind!r}, expected a run that logs and validates")
    return TrainingRun(**kinds)


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: not found, expected the output of `twotower evaluate`")
    evaluation = read_json_object(path, expected="the output of `twotower evaluate`")
    missing = [key for key in EVALUATION_KEYS if key not in evaluation]
    if missing:
        raise UserError(f"{path}: expected the keys {', '.join(missing)}")
    return evaluation


def _check_same_text(evaluation: dict[str, Any], longer: dict[str, Any], path: Path) -> None:
    """Refuse to compare evaluations of different text or settings; name what differs."""
    for key in ("tokenizer_sha256", "settings"):
        found, expected = longer.get(key), evaluation.get(key)
        if found == expected:
            continue
        if isinstance(found, dict) and isinstance(expected, dict):
            differ = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            found, expected = ({name: each.get(name) for name in differ} for each in (found, expected))
        raise UserError(f"{path}: found {key} {found}, expected that of {EVALUATION_FILE}, {expected}")


def _initialisation(path: Path) -> str | None:
    """The start of the time conditioning in a `config.yaml`, if it is known."""
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    return config.get("conditioning", {}).get("initialisation")


def _conditioning_runs(
    compared: Sequence[Path], main: TrainingRun, initialisation: str | None
) -> dict[str, TrainingRun]:
    """The compared runs, and the first steps of the main run if its start is not among them."""
    runs = {path.parent.name: _read_training(path) for path in compared}
    if runs and initialisation and initialisation not in runs:
        runs[initialisation] = main.until(max(run.validation[-1]["step"] for run in runs.values()))
    return dict(sorted(runs.items()))
