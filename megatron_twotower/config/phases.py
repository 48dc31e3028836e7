"""The phases of a run: which steps have which mixture, block size and learning rates.

The functions are pure. A run without phases is one phase that lasts as long as the run. A cursor
counts the sequences that all ranks have consumed. The phase of a step follows from the cursor and
the configuration alone, so a checkpoint stores nothing else about phases.
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.context_split import num_stretches
from megatron_twotower.config.schema import DataConfig, NoiseConfig, PhaseConfig, RunConfig


@dataclass(frozen=True)
class Phase:
    """A phase with every value filled in.

    Attributes:
        name: Empty in a run without phases.
        mixture: Of the blend; empty in a run without phases.
        first_step: The number of optimizer steps before this phase.
        steps: The number of optimizer steps of this phase.
        first: The number of sequences, over all ranks, before this phase: the cursor at its start.
        sequences: The number of sequences of this phase, over all ranks.
    """

    name: str
    mixture: str
    first_step: int
    steps: int
    first: int
    sequences: int
    noise: NoiseConfig
    learning_rate: float
    minimum_learning_rate: float
    warmup_steps: int
    decay_steps: int


def resolve_phases(config: RunConfig) -> tuple[Phase, ...]:
    """Return the phases of a run in order; one without a name if the recipe has no phases.

    Raises:
        UserError: A phase has no name or no step, its block size or schedule does not fit, or
            `train.steps` is not the sum of all phases.
    """
    if not config.phases:
        return (whole_run(config),)
    phases: list[Phase] = []
    for number, given in enumerate(config.phases):
        first = sum(phase.steps for phase in phases)
        phases.append(_resolve_phase(config, given, number=number, first_step=first))
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise UserError(f"phases: found the names {', '.join(names)}, expected each once")
    total = phases[-1].first_step + phases[-1].steps
    if config.train.steps != total:
        raise UserError(f"train.steps: found {config.train.steps}, expected {total}, the sum of all phases, or 0")
    return tuple(phases)


def whole_run(config: RunConfig) -> Phase:
    """Return the run as one phase, with the values of `noise`, `optimizer` and `schedule`."""
    schedule, steps = config.schedule, config.train.steps
    return Phase(
        name="",
        mixture="",
        first_step=0,
        steps=steps,
        first=0,
        sequences=steps * config.data.global_batch_size,
        noise=config.noise,
        learning_rate=config.optimizer.learning_rate,
        minimum_learning_rate=schedule.minimum_learning_rate,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
    )


def _resolve_phase(config: RunConfig, given: PhaseConfig, *, number: int, first_step: int) -> Phase:
    """Fill in phase `number` of a recipe, and check it."""
    data, key = config.data, f"phases.{number}"
    if not given.name:
        raise UserError(f"{key}.name: found nothing, expected the name of the phase")
    steps = steps_of(given.tokens, data)
    if steps < 1:
        raise UserError(
            f"{key}.tokens: found {given.tokens}, expected at least one global batch, "
            f"{data.sequence_length_tokens * data.global_batch_size} tokens"
        )
    size = _or(given.block_size_tokens, config.noise.block_size_tokens)
    context = config.parallel.context
    stretch = data.sequence_length_tokens // num_stretches(context)
    if config.objective == "two_tower" and (size < 1 or stretch % size):
        of = f", stretches of parallel.context {context} ranks" if context > 1 else ""
        raise UserError(
            f"{key}.block_size_tokens: found {size}, expected a divisor of {stretch} (data.sequence_length_tokens "
            f"{data.sequence_length_tokens}{of})"
        )
    warmup, decay = (
        steps_of(tokens, data) if tokens is not None else default
        for tokens, default in (
            (given.warmup_tokens, config.schedule.warmup_steps),
            (given.decay_tokens, config.schedule.decay_steps),
        )
    )
    if min(warmup, decay) < 0 or warmup + decay > steps or warmup >= steps:
        raise UserError(
            f"{key}: found {warmup} steps of warm-up and {decay} of decay, expected at most its {steps} together, "
            "and a warm-up that ends before it"
        )
    highest = _or(given.learning_rate, config.optimizer.learning_rate)
    lowest = _or(given.minimum_learning_rate, config.schedule.minimum_learning_rate)
    if not 0 <= lowest <= highest:
        raise UserError(f"{key}.minimum_learning_rate: found {lowest}, expected between 0 and the highest, {highest}")
    return Phase(
        name=given.name,
        mixture=given.mixture or given.name,
        first_step=first_step,
        steps=steps,
        first=first_step * data.global_batch_size,
        sequences=steps * data.global_batch_size,
        noise=dataclasses.replace(config.noise, block_size_tokens=size),
        learning_rate=highest,
        minimum_learning_rate=lowest,
        warmup_steps=warmup,
        decay_steps=decay,
    )


def _or(value: Any, default: Any) -> Any:
    """Return `value`, or `default` if it is None (0 is a value)."""
    return default if value is None else value


def phase_number(phases: tuple[Phase, ...], cursor: int) -> int:
    """Return the index of the phase that the sequence at `cursor` belongs to.

    A cursor after the end of the run belongs to the last phase.
    """
    return bisect.bisect_right([phase.first for phase in phases], cursor) - 1


def document_alignment(config: RunConfig) -> int:
    """Return the multiple of tokens that documents are padded to, if `data.documents` is `respect`.

    It is one number for the run, a multiple of every block size, so that a sequence is the same in
    every phase. The `ar` objective has no blocks and needs no padding.
    """
    if config.objective == "ar":
        return 1
    return math.lcm(*(phase.noise.block_size_tokens for phase in resolve_phases(config)))


def steps_of(tokens: int, data: DataConfig) -> int:
    """Return a number of tokens as complete global batches, rounded to the nearest."""
    return round(tokens / (data.sequence_length_tokens * data.global_batch_size))
