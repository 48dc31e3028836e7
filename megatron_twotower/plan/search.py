"""A search over the valid layouts of a number of ranks: which fit, and which are fast."""

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig, flatten
from megatron_twotower.config.validation import validate
from megatron_twotower.plan.estimate import Assumptions, Estimate, estimate

# The sizes that a search combines. Validation rejects layouts that are not possible.
TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = (1, 2, 4, 8, 16, 32)
# The fewest tokens of a sequence for each context-parallel rank: other layouts suit shorter ones.
CONTEXT_TOKENS = 4096
MICRO_BATCH = (1, 2)
# In order of the time that recomputation takes.
RECOMPUTE = ("", "E", "M", "ME", "ME*-")


def _replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The configuration with other values in a section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _pipeline_layers(layers: int, stages: int) -> list[int]:
    """The layers of each stage: one more in the first stages; empty if all have the same number."""
    each, remaining = divmod(layers, stages)
    return [each + (i < remaining) for i in range(stages)] if remaining else []


def candidates(config: RunConfig, *, ranks: int) -> Iterator[RunConfig]:
    """The configuration with every valid layout of these sizes."""
    kinds = config.model.hybrid_override_pattern
    recomputes = dict.fromkeys("".join(kind for kind in letters if kind in kinds) for letters in RECOMPUTE)
    seen = set()
    contexts = [c for c in CONTEXT if c == 1 or config.data.sequence_length_tokens // c >= CONTEXT_TOKENS]
    choices = product(TENSOR, PIPELINE, EXPERT, (True, False), MICRO_BATCH, recomputes, contexts)
    for tensor, pipeline, expert, complete_experts, batch, recompute, context in choices:
        if pipeline > config.model.num_layers:
            continue
        changed = _replaced(
            config,
            "parallel",
            tensor=tensor,
            sequence=tensor > 1,
            context=context,
            expert=expert,
            # 0 is the same number as for dense layers.
            expert_tensor=1 if complete_experts and tensor > 1 else 0,
            pipeline=pipeline,
            pipeline_chunks=1,
            pipeline_layers=_pipeline_layers(config.model.num_layers, pipeline),
        )
        changed = _replaced(changed, "data", micro_batch_size=batch)
        changed = _replaced(changed, "train", recompute_layers=recompute)
        changed = _replaced(changed, "optimizer", distributed=True)
        try:
            validate(changed, world_size=ranks)
        except UserError:
            continue
        key = (tensor, pipeline, expert, changed.parallel.expert_tensor_ranks, batch, recompute, context)
        if key not in seen:
            seen.add(key)
            yield changed


def overrides(before: RunConfig, after: RunConfig) -> list[str]:
    """The overrides on the command line that change one configuration to the other."""
    old = dict(flatten(before))

    def text(value: Any) -> str:
        if isinstance(value, str):
            return value if value.isalnum() else f"'{value}'"
        if isinstance(value, list):
            return str(value).replace(" ", "")
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"{key}={text(value)}" for key, value in flatten(after) if old[key] != value]


def search(config: RunConfig, *, ranks: int, assumptions: Assumptions | None = None) -> list[Estimate]:
    """The estimates of all candidates.

    Those that fit come first, in order of time. The others follow in order of memory.
    """
    found = [estimate(each, ranks=ranks, assumptions=assumptions) for each in candidates(config, ranks=ranks)]
    return sorted(found, key=lambda e: (not e.fits, e.seconds if e.fits else e.memory.total))


def remedies(wanted: Estimate, found: list[Estimate], *, count: int = 3) -> list[Estimate]:
    """The layouts that fit with the fewest overrides, in order of these, then of time.

    Args:
        wanted: The layout that does not fit.
        found: The layouts of a search.
        count: The largest number of layouts.
    """
    fitting = [each for each in found if each.fits]
    return sorted(fitting, key=lambda e: (len(overrides(wanted.config, e.config)), e.seconds))[:count]
