"""Settings for the tasks of lm-evaluation-harness. This module does not need the extra `eval`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.generate.engine import MODES, check_sampler

# How a given answer is scored: see `HarnessSettings.scoring`.
SCORINGS = ("ar", "bound", "mock_ar")


@dataclass(frozen=True)
class HarnessSettings:
    """How a model answers.

    Attributes:
        mode: How text is generated.
        scoring: `ar`, by the context tower; `bound`, by a lower bound on the likelihood under the
            denoiser, from `bound_draws` draws of noise for each block; `mock_ar`, by the denoiser
            as a next-token model.
        batch_size: Rows at a time.
        max_length_tokens: Maximum number of tokens of context and answer together; a longer
            context loses its beginning. None for the maximum of the model.
        max_new_tokens: Maximum tokens of an answer, if the task does not say.
        block_size: Tokens of a block, which the denoiser fills together; None for that of the
            folder.
        steps_per_block: Maximum number of denoiser passes for a block.
        confidence_threshold: Mask diffusion commits every token more probable than this at once.
        draft_steps: Denoiser passes for a draft; only for speculative generation.
        bound_draws: Draws of noise for each block, in scoring `bound`.
        seed: Seed of the sampling and the noise.
        prefill_chunk_size: Positions of each context that the context tower reads at a time.
        sampler: Rule by which mask diffusion commits tokens, in place of the confidence threshold;
            see `GenerationSettings`.
    """

    mode: str = "mask_diffusion"
    scoring: str = "ar"
    batch_size: int = 8
    max_length_tokens: int | None = None
    max_new_tokens: int = 256
    block_size: int | None = None
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    draft_steps: int = 1
    bound_draws: int = 16
    seed: int = 1234
    prefill_chunk_size: int = 4096
    sampler: str | None = None

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.confidence_threshold)
        for name, found, choices in (("mode", self.mode, MODES), ("scoring", self.scoring, SCORINGS)):
            if found not in choices:
                raise UserError(f"{name}: found {found!r}, expected one of {', '.join(choices)}")
        for name in (
            "batch_size",
            "max_new_tokens",
            "bound_draws",
            "block_size",
            "draft_steps",
            "steps_per_block",
            "prefill_chunk_size",
        ):
            found = getattr(self, name)
            fits = found is None or (isinstance(found, int) and found >= 1)
            require(fits, f"{name}: found {found!r}, expected at least 1")


@dataclass(frozen=True)
class Compared:
    """What is compared with AR on tasks.

    Attributes:
        thresholds: Confidence thresholds of mask diffusion.
        block_sizes: Its block sizes, each at the confidence threshold of the settings.
        samplers: Its samplers.
        drafts: Tokens that the denoiser sees for a draft, which the context tower verifies.
    """

    thresholds: tuple[float, ...] = ()
    block_sizes: tuple[int, ...] = ()
    samplers: tuple[str, ...] = ()
    drafts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A draft has the last token of the text and at least one new one.
        for name, kind, least, most in (
            ("thresholds", float, 0, 1),
            ("block_sizes", int, 1, math.inf),
            ("drafts", int, 2, math.inf),
        ):
            for found in getattr(self, name):
                fits = isinstance(found, (int, kind)) and not isinstance(found, bool) and least <= found <= most
                expected = f"{least} to {most}" if most == 1 else f"at least {least}"
                require(fits, f"{name}: found {found!r}, expected {expected}")
        for sampler in self.samplers:
            require(isinstance(sampler, str), f"samplers: found {sampler!r}, expected a name and numbers")
            check_sampler(sampler, HarnessSettings.confidence_threshold)


@dataclass(frozen=True)
class AnswerSettings:
    """How a task wants an answer to be generated: its `generation_kwargs`.

    Attributes:
        until: Strings that end the answer.
        max_new_tokens: Maximum tokens of the answer; None if the task does not say.
        temperature: 0 is greedy.
        top_k: Number of most probable tokens to sample among; None for all.
        top_p: Probability mass of the most probable tokens to sample among; None for all.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def read_generation_kwargs(kwargs: Mapping[str, Any]) -> AnswerSettings:
    """Read the `generation_kwargs` of a task.

    Raises:
        UserError: a key that no mode supports.
    """
    known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(kwargs.keys() - known):
        raise UserError(f"generation_kwargs: found {', '.join(unknown)}, expected of {', '.join(sorted(known))}")
    until = kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    max_new_tokens = kwargs.get("max_gen_toks", kwargs.get("max_new_tokens"))
    do_sample = kwargs.get("do_sample", kwargs.get("temperature", 0.0) > 0)
    if not do_sample:
        return AnswerSettings(until, max_new_tokens)
    temperature = kwargs.get("temperature", 1.0)
    return AnswerSettings(until, max_new_tokens, temperature, kwargs.get("top_k"), kwargs.get("top_p"))


def text_before_stop(text: str, until: Sequence[str]) -> str | None:
    """The text before the first of the strings that end it; None if it has none of them."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None
