"""The files of a run folder: their names, how they are read, and how they are written.

config.yaml                  the resolved configuration, itself a recipe
provenance.json              versions, commit, seed, fingerprints of backbone and data, roles
metrics.jsonl                one JSON object per line: training, validation and checkpoint records
checkpoints/step-00000100/   training state after that many optimizer steps
ledger/rank-00000.jsonl      which samples each step consumed, if asked for
nonfinite/                   batches of steps whose loss or gradients were not finite
run.lock                     the process that trains here, while it does
"""

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_twotower.common import machine
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import read_json_object, write_file

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
LEDGER_FOLDER = "ledger"
NONFINITE_FOLDER = "nonfinite"
LOCK_FILE = "run.lock"
_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "webdataset", "numpy")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def provenance(
    version: str,
    *,
    seed: int,
    ranks: int,
    backbone: str | None,
    fingerprint: str | None,
    denoiser: str | None = None,
    denoiser_fingerprint: str | None = None,
) -> dict[str, Any]:
    """The facts that are needed to repeat a run.

    Args:
        version: The version of this package.
        backbone: The folder of the backbone, if the run started from one.
        fingerprint: SHA-256 of the backbone.
        denoiser: The folder of the denoiser, if the run trains one further.
        denoiser_fingerprint: SHA-256 of that folder.
    """
    further = {"denoiser": denoiser, "denoiser_sha256": denoiser_fingerprint} if denoiser else {}
    return {
        "megatron_twotower": version,
        "commit": machine.commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "seed": seed,
        "ranks": ranks,
        "backbone": backbone,
        "backbone_sha256": fingerprint,
        **further,
    }


def read_provenance(run: Path) -> dict[str, Any]:
    """The facts in a run's `provenance.json`; empty if the run has not written it yet.

    Raises:
        UserError: The file cannot be read.
    """
    file = run / PROVENANCE_FILE
    return read_json_object(file, expected="the facts of a run") if file.is_file() else {}


def write_start(run: Path, *, config: str, facts: Mapping[str, Any]) -> None:
    """Write the files that describe a starting run: `config.yaml` and `provenance.json`.

    Args:
        config: The configuration as YAML text.
        facts: The content of `provenance.json`.
    """
    write_file(run / CONFIG_FILE, config)
    write_file(run / PROVENANCE_FILE, json.dumps(facts, indent=1) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in the order written, without an incomplete last line.

    Raises:
        UserError: The file is missing, or a line is not a JSON object with a `step`.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found, expected the {METRICS_FILE} of a training run")
    lines = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}:{number}: found {line[:60]!r}, expected a JSON object with a step")
        records.append(record)
    return records
