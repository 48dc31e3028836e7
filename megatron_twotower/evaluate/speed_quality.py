"""What generation costs and what it writes, over confidence threshold, block size and passes per block.

Every setting continues the same prompts, and cached AR generation does in the same run: speed is
quoted against it, and what was written is held against what it would have written.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_twotower.common.progress import OnProgress, silent
from megatron_twotower.evaluate.likelihood import token_nats
from megatron_twotower.generate.engine import GenerationSettings, write
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

# --- quality ------------------------------------------------------------------------------------------------------


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def distinct(ids: Sequence[int], n: int) -> float:
    """Of the n-grams of a text, the share that differ from each other: 1 where none comes twice."""
    found = ngrams(ids, n)
    return len(set(found)) / len(found) if found else 1.0


@torch.no_grad()
def judge(model: Model, ids: Tensor, prompt_tokens: int, ar_text: Tensor) -> dict[str, float]:
    """What one text (1, l) is worth behind its prompt; every figure a mean over its new tokens.

    nats_per_token: under the context tower. agreement: of the tokens, the share that the context
    tower would have chosen, greedily, behind the same text. same_as_ar: the share that stands where
    AR's text (n,) has the same token; it falls to nothing behind the first that differs.
    distinct_2: of pairs of tokens, the share that are no repetition; repeated_4: of runs of four,
    the share that are one.
    """
    logits, new = model(ids).logits[:, prompt_tokens - 1 : -1], ids[:, prompt_tokens:]
    written = new[0].tolist()
    return {
        "nats_per_token": float(token_nats(logits, new).double().mean()),
        "agreement": float((logits.argmax(-1) == new.to(logits.device)).double().mean()),
        "same_as_ar": float((new[0].cpu() == ar_text.cpu()).double().mean()),
        "distinct_2": distinct(written, 2),
        "repeated_4": 1 - distinct(written, 4),
    }


# --- the sweep ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A setting of mask diffusion: None for steps is one for each token of the block."""

    threshold: float
    block_size: int
    steps: int | None = None

    def settings(self, new_tokens: int) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens=new_tokens,
            block_size=self.block_size,
            steps_per_block=self.steps or self.block_size,
            confidence_threshold=self.threshold,
        )


def points(
    *,
    thresholds: Sequence[float],
    block_sizes: Sequence[int],
    steps: Sequence[int],
    trained_block: int,
    threshold: float,
    every: bool = False,
) -> list[Point]:
    """What to try: each list alone, the others as `trained_block`, one step per token and `threshold` say; or, with
    `every`, all combinations. Steps beyond the block's size change nothing and are left out."""
    if every:
        return [
            Point(*chosen)
            for chosen in itertools.product(thresholds, block_sizes, (None, *steps))
            if chosen[2] is None or chosen[2] < chosen[1]
        ]
    star = [Point(each, trained_block) for each in thresholds]
    star += [Point(threshold, size) for size in block_sizes if size != trained_block]
    star += [Point(threshold, trained_block, count) for count in steps if count < trained_block]
    return list(dict.fromkeys(star))


@dataclass
class _Tally:
    """One row of the sweep: sums over prompts, and the judgement of each text."""

    passes: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    judged: list[dict[str, float]] = field(default_factory=list)

    def add(self, stats: GenerationStats, judged: dict[str, float]) -> None:
        self.passes += stats.passes
        self.new_tokens += stats.new_tokens
        self.seconds += stats.seconds
        self.judged.append(judged)

    def row(self, point: Point | None, ar_rate: float) -> dict[str, Any]:
        rate = self.new_tokens / self.seconds
        row: dict[str, Any] = {
            "mode": "ar" if point is None else "mask_diffusion",
            "confidence_threshold": None if point is None else point.threshold,
            "block_size": None if point is None else point.block_size,
            "steps_per_block": None if point is None else point.steps or point.block_size,
            "tokens_per_pass": self.new_tokens / self.passes,
            "passes": self.passes,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "speedup": rate / ar_rate,
            "prompts": len(self.judged),
        }
        for key in self.judged[0]:
            values = torch.tensor([each[key] for each in self.judged], dtype=torch.float64)
            row[key] = float(values.mean())
            row[f"{key}_stderr"] = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        return row


def sweep(
    model: Model,
    prompts: Tensor,
    *,
    points: Sequence[Point],
    max_new_tokens: int,
    mask_id: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Speed and quality of mask diffusion at each point, against cached AR generation in the same run.

    Greedy, one prompt at a time, always `max_new_tokens` long (no EOS, so that all write the same
    amount); for every prompt AR first and then all points, so that a drift of the machine meets all
    alike.

    Args:
        prompts: (n, l) int64.

    Returns: Rows, the first of which is AR's (confidence_threshold None, speedup 1): passes of the
        tower that predicts, new tokens, seconds, tokens per pass and per second, speedup over AR,
        and what `judge` says, each as a mean over prompts and its standard error (None of one
        prompt).
    """
    base = GenerationSettings(max_new_tokens=max_new_tokens)
    kinds: list[Point | None] = [None, *points]
    tallies = [_Tally() for _ in kinds]

    def once(ids: Tensor, point: Point | None, new_tokens: int) -> tuple[Tensor, GenerationStats]:
        mode = "ar" if point is None else "mask_diffusion"
        settings = replace(base, max_new_tokens=new_tokens) if point is None else point.settings(new_tokens)
        return write(model, ids, mode=mode, settings=settings, mask_id=mask_id, eos_id=None)

    for point in kinds[:2]:  # the first calls of any kind are slower
        once(prompts[:1], point, min(32, max_new_tokens))
    for number in range(len(prompts)):
        ids, ar_text = prompts[number : number + 1], None
        for i, point in enumerate(kinds):
            written, stats = once(ids, point, max_new_tokens)
            new = written[0, ids.shape[1] :]
            ar_text = new if ar_text is None else ar_text
            tallies[i].add(stats, judge(model, written, ids.shape[1], ar_text))
            progress("sweep", number * len(kinds) + i + 1, len(prompts) * len(kinds))
    ar_rate = tallies[0].new_tokens / tallies[0].seconds
    return [tally.row(kind, ar_rate) for kind, tally in zip(kinds, tallies, strict=True)]


def front(rows: Sequence[dict[str, Any]], quality: str) -> list[dict[str, Any]]:
    """The rows that none is both faster than and as good as, fastest last. quality: a key; more is better."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["speedup"], -row[quality])):
        if not best or row[quality] > best[-1][quality]:
            best.append(row)
    return best[::-1]
