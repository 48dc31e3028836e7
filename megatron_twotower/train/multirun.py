"""Several runs from one command: Hydra's multi-run of a recipe. Each job has its own folder.

`twotower train --multirun recipe=tiny seed=1,2` trains twice, into OUTPUT/seed=1 and OUTPUT/seed=2.
Hydra's launchers (`hydra/launcher=...`) decide where the jobs run; without one they run here, one
after the other. With several ranks every rank runs all jobs, in the same order.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.overrides import plain_overrides, quoted
from megatron_twotower.config.recipes import load_recipe, prepare_hydra, resolve_composed


class StoppedEarly(Exception):
    """A signal ended a job, and its state is saved; the same sweep resumes from there."""


def _job(composed: Any) -> None:
    """Train one run of a sweep. A module-level function, so that a launcher can pickle it."""
    from hydra.core.hydra_config import HydraConfig

    from megatron_twotower.mcore import parallel
    from megatron_twotower.train import run as train_run

    config = resolve_composed(composed, recipe=str(HydraConfig.get().job.config_name))
    config = dataclasses.replace(config, output=HydraConfig.get().runtime.output_dir)
    try:
        if not train_run.run_training(config):
            raise StoppedEarly
    finally:
        parallel.shutdown()


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the keys with several values, and the overrides with one, without Hydra's own."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides=list(overrides))
    except HydraException as error:
        raise UserError(f"override: {str(error).splitlines()[0]}") from error
    keys = [each.key_or_group for each in parsed if each.is_sweep_override()]
    single = [text for text, each in zip(overrides, parsed, strict=True) if not each.is_sweep_override()]
    return keys, [text for text in single if not text.startswith("hydra")]


def run(recipe: str, overrides: Sequence[str]) -> None:
    """Train once for each combination of values. A run that is complete takes no step.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: Hydra overrides; at least one has several values.

    Raises:
        UserError: No key has several values, or the error of a single run.
        StoppedEarly: A signal ended the sweep.
    """
    import hydra

    path, search = prepare_hydra(recipe)
    overrides = plain_overrides(overrides, several=True)
    keys, single = _split_overrides(overrides)
    if not keys:
        raise UserError("--multirun: found no key with several values, expected one such as seed=1,2")
    if "output" in keys:
        raise UserError("output: found several values, expected one, below which each job has a folder")
    ranks = os.environ.get("WORLD_SIZE", "1")
    launchers = [text for text in overrides if text.startswith("hydra/launcher=")]
    if launchers and ranks != "1":
        raise UserError(
            f"{launchers[0]}: found {ranks} ranks, each of which would launch the jobs; expected one process"
        )
    output = load_recipe(recipe, single).output
    named_otherwise = [text.partition("=")[0] for text in [*search, *overrides] if text.partition("=")[0] not in keys]
    own = [
        f"hydra.sweep.dir={quoted(output)}",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(named_otherwise)}]",
        "hydra/job_logging=disabled",
    ]
    before, variable = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # Hydra reads the command line, hides exceptions unless this variable is set, and replaces the
    # handlers of the root logger.
    sys.argv = ["twotower", "--multirun", *search, *own, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(path.parent), config_name=path.stem, version_base="1.3")(_job)()
    finally:
        sys.argv, root.handlers[:] = before, handlers
        root.setLevel(level)
        os.environ.pop("HYDRA_FULL_ERROR")
        if variable is not None:
            os.environ["HYDRA_FULL_ERROR"] = variable
