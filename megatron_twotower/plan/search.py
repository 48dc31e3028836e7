"""Layouts of so many ranks: which are valid, which fit, and which of these are fast."""

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig, flatten
from megatron_twotower.config.validation import validate
from megatron_twotower.plan.estimate import Assumptions, Estimate, estimate

# What is tried. Sizes that do not divide are left out by validation.
TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
MICRO_BATCH = (1, 2)
# From the least to do again to the most.
RECOMPUTE = ("", "E", "M", "ME", "ME*-")


def _changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _stretches(layers: int, count: int) -> list[int]:
    """Lengths that differ by one at most, the longer ones first; nothing where they are equal."""
    each, more = divmod(layers, count)
    return [each + (i < more) for i in range(count)] if more else []


def candidates(config: RunConfig, *, ranks: int) -> Iterator[RunConfig]:
    """Every valid layout of the tables above."""
    kinds = config.model.hybrid_override_pattern
    kept = dict.fromkeys("".join(kind for kind in letters if kind in kinds) for letters in RECOMPUTE)
    seen = set()
    choices = product(TENSOR, PIPELINE, EXPERT, (True, False), MICRO_BATCH, kept)
    for tensor, pipeline, expert, narrow, batch, recompute in choices:
        if pipeline > config.model.num_layers:
            continue
        each = 1 if narrow and tensor > 1 else 0
        changed = _changed(
            config,
            "parallel",
            tensor=tensor,
            sequence=tensor > 1,
            expert=expert,
            expert_tensor=each,
            pipeline=pipeline,
            pipeline_chunks=1,
            pipeline_layers=_stretches(config.model.num_layers, pipeline),
        )
        changed = _changed(changed, "data", micro_batch_size=batch)
        changed = _changed(changed, "train", recompute_layers=recompute)
        changed = _changed(changed, "optimizer", distributed=True)
        try:
            validate(changed, world_size=ranks)
        except UserError:
            continue
        key = (tensor, pipeline, expert, changed.parallel.expert_tensor_ranks, batch, recompute)
        if key not in seen:
            seen.add(key)
            yield changed


def overrides(before: RunConfig, after: RunConfig) -> list[str]:
    """What to write on the command line to get from one configuration to the other."""
    old = dict(flatten(before))

    def spelled(value: Any) -> str:
        if isinstance(value, str):
            return value if value.isalnum() else f"'{value}'"
        if isinstance(value, list):
            return str(value).replace(" ", "")
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"{key}={spelled(value)}" for key, value in flatten(after) if old[key] != value]


def search(config: RunConfig, *, ranks: int, assumptions: Assumptions | None = None) -> list[Estimate]:
    """All candidates that were found valid, those that fit first, the fastest first; others by the memory they need."""
    found = [estimate(each, ranks=ranks, assumptions=assumptions) for each in candidates(config, ranks=ranks)]
    return sorted(found, key=lambda e: (not e.fits, e.seconds if e.fits else e.memory.total))


def remedies(wanted: Estimate, found: list[Estimate], *, count: int = 3) -> list[Estimate]:
    """Of the layouts that fit, those with the fewest changes against the wanted one, the fastest first."""
    fitting = [each for each in found if each.fits]
    return sorted(fitting, key=lambda e: (len(overrides(wanted.config, e.config)), e.seconds))[:count]
