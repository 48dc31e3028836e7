"""The speed and quality of mask diffusion by threshold, sampler, block size and steps per block.

Every setting continues the same prompts. Cached AR generation continues them in the same run: the
speed is relative to it, and the text is compared with its text.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_twotower.common.progress import OnProgress, silent
from megatron_twotower.evaluate.likelihood import token_nats
from megatron_twotower.generate.engine import GenerationSettings, generate_ids
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# --- quality ---


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n consecutive ids."""
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def distinct_fraction(ids: Sequence[int], n: int) -> float:
    """The number of different n-grams of a text over the number of all; 1 if none is repeated."""
    found = ngrams(ids, n)
    return len(set(found)) / len(found) if found else 1.0


@torch.no_grad()
def text_quality(model: TwoTowerModel, ids: Tensor, prompt_tokens: int, ar_text: Tensor) -> dict[str, float]:
    """The quality of one generated text, as means over its new tokens.

    Args:
        model: Two-tower model.
        ids: (1, l) prompt and new tokens.
        prompt_tokens: Tokens of the prompt.
        ar_text: (n,) the new tokens of AR generation from the same prompt.

    Returns:
        nats_per_token: under the context tower.
        agreement: fraction of the tokens that the context tower would choose greedily after the
            same text.
        same_as_ar: fraction of the tokens that AR has at the same position. It falls off after the
            first difference.
        distinct_2: fraction of different pairs of tokens.
        repeated_4: fraction of runs of four tokens that are repetitions.
    """
    logits, new = model(ids).logits[:, prompt_tokens - 1 : -1], ids[:, prompt_tokens:]
    new_ids = new[0].tolist()
    return {
        "nats_per_token": float(token_nats(logits, new).double().mean()),
        "agreement": float((logits.argmax(-1) == new.to(logits.device)).double().mean()),
        "same_as_ar": float((new[0].cpu() == ar_text.cpu()).double().mean()),
        "distinct_2": distinct_fraction(new_ids, 2),
        "repeated_4": 1 - distinct_fraction(new_ids, 4),
    }


# --- the sweep ---


@dataclass(frozen=True)
class SweepPoint:
    """One setting of mask diffusion in a sweep.

    Attributes:
        threshold: Confidence threshold; None with a sampler.
        block_size: Tokens in a block.
        steps: Maximum number of denoiser passes for a block; None for one for each token.
        sampler: See `GenerationSettings`.
    """

    threshold: float | None
    block_size: int
    steps: int | None = None
    sampler: str | None = None

    def settings(self, new_tokens: int) -> GenerationSettings:
        """The settings of a generation of `new_tokens` tokens."""
        settings = GenerationSettings(
            max_new_tokens=new_tokens,
            block_size=self.block_size,
            steps_per_block=self.steps or self.block_size,
            sampler=self.sampler,
        )
        return settings if self.threshold is None else replace(settings, confidence_threshold=self.threshold)


def sweep_points(
    *,
    thresholds: Sequence[float],
    block_sizes: Sequence[int],
    steps: Sequence[int],
    trained_block: int,
    threshold: float,
    samplers: Sequence[str] = (),
    every: bool = False,
) -> list[SweepPoint]:
    """The settings to try.

    Args:
        thresholds: Confidence thresholds, tried at the trained block size with a step per token.
        block_sizes: Tried at `threshold` with a step per token.
        steps: Steps per block, tried at `threshold` and the trained block size. Numbers above the
            block size change nothing and are left out.
        trained_block: The block size that the denoiser was trained with.
        threshold: Confidence threshold of the points that vary block size or steps. It is tried at
            the trained block size if there are samplers, to be compared with them.
        samplers: Samplers, tried as the thresholds are.
        every: Try all combinations of rules (thresholds and samplers), block sizes and steps
            instead.
    """
    if every:
        rules: list[tuple[float | None, str | None]] = [(each, None) for each in thresholds]
        rules += [(None, each) for each in samplers]
        return [
            SweepPoint(each, size, count, sampler)
            for (each, sampler), size, count in itertools.product(rules, block_sizes, (None, *steps))
            if count is None or count < size
        ]
    star = [SweepPoint(each, trained_block) for each in (*thresholds, *([threshold] if samplers else []))]
    star += [SweepPoint(None, trained_block, None, each) for each in samplers]
    star += [SweepPoint(threshold, size) for size in block_sizes if size != trained_block]
    star += [SweepPoint(threshold, trained_block, count) for count in steps if count < trained_block]
    return list(dict.fromkeys(star))


@dataclass
class _PointTotals:
    """The cost and the quality of each text of one point."""

    costs: list[dict[str, float]] = field(default_factory=list)
    qualities: list[dict[str, float]] = field(default_factory=list)

    def add(self, stats: GenerationStats, quality: dict[str, float]) -> None:
        self.costs.append({"passes": stats.passes, "new_tokens": stats.new_tokens, "seconds": stats.seconds})
        self.qualities.append(quality)

    def sum(self, cost: str) -> float:
        return sum(each[cost] for each in self.costs)

    def row(self, point: SweepPoint | None, ar_rate: float) -> dict[str, Any]:
        """The row of the sweep; `point` None is AR, and `ar_rate` its tokens per second."""
        rate = self.sum("new_tokens") / self.sum("seconds")
        row: dict[str, Any] = {
            "mode": "ar" if point is None else "mask_diffusion",
            "confidence_threshold": None if point is None else point.threshold,
            "sampler": None if point is None else point.sampler,
            "block_size": None if point is None else point.block_size,
            "steps_per_block": None if point is None else point.steps or point.block_size,
            "tokens_per_pass": self.sum("new_tokens") / self.sum("passes"),
            "passes": self.sum("passes"),
            "new_tokens": self.sum("new_tokens"),
            "seconds": self.sum("seconds"),
            "tokens_per_second": rate,
            "speedup": rate / ar_rate,
            "prompts": len(self.qualities),
        }
        row |= means({key: [each[key] for each in self.qualities] for key in self.qualities[0]})
        row["by_prompt"] = [cost | quality for cost, quality in zip(self.costs, self.qualities, strict=True)]
        return row


def sweep(
    model: TwoTowerModel,
    prompts: Tensor,
    *,
    points: Sequence[SweepPoint],
    max_new_tokens: int,
    mask_id: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Measure speed and quality of mask diffusion at each point, and of cached AR generation.

    Generation is greedy, one prompt at a time. It ignores EOS, so that every text has
    `max_new_tokens` tokens. For each prompt AR runs first and then all points, so that a drift of
    the speed of the machine affects all of them equally.

    Args:
        model: Two-tower model.
        prompts: (n, l) int64.
        points: The settings to try.
        max_new_tokens: New tokens of each text.
        mask_id: Id of the mask token.
        progress: Called after every text.

    Returns:
        One row for AR (confidence_threshold None, speedup 1) and one for each point: passes of the
        tower that decides on tokens, new tokens, seconds, tokens per pass and per second, speedup
        over AR, and the figures of `text_quality` as means over prompts with standard errors (None
        with one prompt). `by_prompt` has those of each prompt.
    """
    settings: list[SweepPoint | None] = [None, *points]
    totals = [_PointTotals() for _ in settings]

    def generate(ids: Tensor, point: SweepPoint | None, new_tokens: int) -> tuple[Tensor, GenerationStats]:
        if point is None:
            mode, own = "ar", GenerationSettings(max_new_tokens=new_tokens)
        else:
            mode, own = "mask_diffusion", point.settings(new_tokens)
        return generate_ids(model, ids, mode=mode, settings=own, mask_id=mask_id, eos_id=None)

    for point in settings[:2]:  # the first call in each mode is slower
        generate(prompts[:1], point, min(32, max_new_tokens))
    for number in range(len(prompts)):
        ids, ar_text = prompts[number : number + 1], None
        for i, point in enumerate(settings):
            output, stats = generate(ids, point, max_new_tokens)
            new = output[0, ids.shape[1] :]
            ar_text = new if ar_text is None else ar_text
            totals[i].add(stats, text_quality(model, output, ids.shape[1], ar_text))
            progress("sweep", number * len(settings) + i + 1, len(prompts) * len(settings))
    ar_rate = totals[0].sum("new_tokens") / totals[0].sum("seconds")
    return [each.row(point, ar_rate) for point, each in zip(settings, totals, strict=True)]


def means(figures: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The mean of each figure, and as NAME_stderr its standard error, `None` for one value."""
    found: dict[str, float | None] = {}
    for key, each in figures.items():
        values = torch.tensor(each, dtype=torch.float64)
        found[key] = float(values.mean())
        found[f"{key}_stderr"] = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return found


def pareto_front(rows: Sequence[dict[str, Any]], quality: str) -> list[dict[str, Any]]:
    """The rows for which no other row is both faster and as good, the fastest last.

    Args:
        rows: Rows of a sweep.
        quality: The key of a figure; more is better.
    """
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["speedup"], -row[quality])):
        if not best or row[quality] > best[-1][quality]:
            best.append(row)
    return best[::-1]


def rule_name(row: Mapping[str, Any]) -> str:
    """The rule by which a row's text was committed: its sampler or threshold; "-" without one."""
    threshold = row["confidence_threshold"]
    return row["sampler"] or ("-" if threshold is None else f"{threshold:g}")


def threshold_rows(rows: Sequence[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """The rows of a sweep that vary the threshold only."""
    return [row for row in rows[1:] if row["block_size"] == block == row["steps_per_block"] and row["sampler"] is None]
