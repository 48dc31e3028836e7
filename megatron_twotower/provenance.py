"""What is needed to run something again: versions, commit, seed, backbone."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_twotower import __version__, parallel
from megatron_twotower.config import RunConfig

_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "webdataset", "numpy")


def provenance(config: RunConfig, *, fingerprint: str | None) -> dict[str, Any]:
    """The facts of a run, for its `provenance.json`. fingerprint: of the backbone."""
    return {
        "megatron_twotower": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "seed": config.seed,
        "ranks": parallel.world_size(),
        "backbone": config.init.backbone,
        "backbone_sha256": fingerprint,
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
