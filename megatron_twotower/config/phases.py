"""The phases of a run: which stretch of it has which mixture, block size and learning rates. Pure functions.

A run without phases is one phase that lasts as long as the run. A cursor counts the sequences that
all ranks have consumed, and every question about a phase is answered from it and the configuration
alone: a resume needs no more.
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import DataConfig, NoiseConfig, PhaseConfig, RunConfig


@dataclass(frozen=True)
class Phase:
    """A phase with everything filled in.

    first_step, steps: optimizer steps. first, sequences: the same in sequences of all ranks, as a
    cursor counts.
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
    """The phases of a run, in order; one without a name where the recipe has none.

    Raises: UserError: a phase without a name or of no step, a block size or a schedule that does
        not fit, or a number of steps that is not the sum of the phases.
    """
    schedule, optimizer = config.schedule, config.optimizer
    batch = config.data.global_batch_size
    if not config.phases:
        steps = config.train.steps
        whole = Phase(
            "",
            "",
            0,
            steps,
            0,
            steps * batch,
            config.noise,
            optimizer.learning_rate,
            schedule.minimum_learning_rate,
            schedule.warmup_steps,
            schedule.decay_steps,
        )
        return (whole,)
    phases: list[Phase] = []
    for number, given in enumerate(config.phases):
        first = sum(phase.steps for phase in phases)
        phases.append(_filled_in(config, given, number=number, first_step=first))
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise UserError(f"phases: found the names {', '.join(names)}, expected each once")
    total = phases[-1].first_step + phases[-1].steps
    if config.train.steps != total:
        raise UserError(f"train.steps: found {config.train.steps}, expected {total}, the sum of all phases, or 0")
    return tuple(phases)


def _filled_in(config: RunConfig, given: PhaseConfig, *, number: int, first_step: int) -> Phase:
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
    if config.objective == "two_tower" and (size < 1 or data.sequence_length_tokens % size):
        raise UserError(
            f"{key}.block_size_tokens: found {size}, expected a divisor of data.sequence_length_tokens "
            f"{data.sequence_length_tokens}"
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
    noise = dataclasses.replace(config.noise, block_size_tokens=size)
    batch = data.global_batch_size
    return Phase(
        given.name,
        given.mixture or given.name,
        first_step,
        steps,
        first_step * batch,
        steps * batch,
        noise,
        highest,
        lowest,
        warmup,
        decay,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def phase_number(phases: tuple[Phase, ...], cursor: int) -> int:
    """The phase that the sequence at `cursor` belongs to; the last one goes on past the end of the run."""
    return bisect.bisect_right([phase.first for phase in phases], cursor) - 1


def phase_of(config: RunConfig, cursor: int) -> Phase:
    """The phase that the sequence at `cursor` belongs to."""
    phases = resolve_phases(config)
    return phases[phase_number(phases, cursor)]


def document_alignment(config: RunConfig) -> int:
    """Tokens that documents are padded to a multiple of, where boundaries are respected.

    One number for the whole run, so that a sequence is the same in every phase: a multiple of every
    block size. The `ar` objective has no blocks and needs no padding.
    """
    return (
        math.lcm(*(phase.noise.block_size_tokens for phase in resolve_phases(config)))
        if config.objective != "ar"
        else 1
    )


def steps_of(tokens: int, data: DataConfig) -> int:
    """Tokens as whole global batches, rounded to the nearest."""
    return round(tokens / (data.sequence_length_tokens * data.global_batch_size))
