"""Samplers compared: curves of agreement with AR against tokens per pass, and a setting of each.

The setting is chosen on every second prompt, and its figures are those of the other prompts.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from megatron_twotower.evaluate.likelihood import ratio
from megatron_twotower.evaluate.speed_quality import rule_name, threshold_rows

# Two to choose on and two to measure on, which is the least that has an error.
LEAST_PROMPTS = 4
# The weight of a point of `area`, and how much worse than the first point it may be, in percent.
AREA_ALPHA, AREA_LOSS = 3.0, 5.0
THRESHOLD = "threshold"

# A row of `speed_quality.sweep`.
Row = dict[str, Any]


def _each(row: Row, key: str, prompts: Sequence[int]) -> list[float]:
    return [row["by_prompt"][number][key] for number in prompts]


def tokens_per_pass(row: Row, prompts: Sequence[int]) -> float:
    """New tokens of some prompts over their passes."""
    return sum(_each(row, "new_tokens", prompts)) / sum(_each(row, "passes", prompts))


def agreement(row: Row, prompts: Sequence[int]) -> float:
    """Mean over prompts of the share of tokens that AR would have chosen."""
    return fmean(_each(row, "agreement", prompts))


def nats(row: Row, prompts: Sequence[int]) -> float:
    """Mean over prompts of the nats per token under the context tower."""
    return fmean(_each(row, "nats_per_token", prompts))


def area(points: Sequence[tuple[float, float]], best: float = 100.0) -> float:
    """The area under a curve of accuracy against parallelism, weighted by accuracy.

    This is the metric AUP of the project d3LLM (hao-ai-lab). With parallelism r and accuracy y in
    percent, r ascending, and w(y) = exp(-3 (1 - y / best)), at most 1:

        r_1 y_1 + sum over i > 1 of (r_i - r_(i-1)) (y_i w(y_i) + y_(i-1) w(y_(i-1))) / 2

    Points whose accuracy is more than 5 below that of the first one are left out.

    Args:
        points: Tokens per pass and accuracy in percent.
        best: The best accuracy of all methods; AR agrees with itself.
    """
    (first, accuracy), *others = sorted(points)
    kept = [(first, accuracy), *(each for each in others if each[1] >= accuracy - AREA_LOSS)]
    weighted = [(r, y * min(math.exp(-AREA_ALPHA * (1 - y / best)), 1.0)) for r, y in kept]
    strips = ((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(weighted))
    return first * accuracy + sum(strips)


def _area_of(rows: Sequence[Row], prompts: Sequence[int]) -> float:
    return area([(tokens_per_pass(row, prompts), 100 * agreement(row, prompts)) for row in rows])


def area_with_error(rows: Sequence[Row], prompts: Sequence[int]) -> tuple[float, float]:
    """The area of a sampler and its standard error by the jackknife: one prompt is left out."""
    n = len(prompts)
    without = [_area_of(rows, [*prompts[:i], *prompts[i + 1 :]]) for i in range(n)]
    return _area_of(rows, prompts), math.sqrt((n - 1) / n * sum((each - fmean(without)) ** 2 for each in without))


def fastest_as_good(rows: Sequence[Row], base: Row, prompts: Sequence[int]) -> Row | None:
    """The row with most tokens per pass among those that are as good as the base.

    As good: it agrees with AR at least as much, and has at most its nats per token.
    """
    good = [
        row
        for row in rows
        if agreement(row, prompts) >= agreement(base, prompts) and nats(row, prompts) <= nats(base, prompts)
    ]
    return max(good, key=lambda row: tokens_per_pass(row, prompts), default=None)


def _difference(row: Row, base: Row, key: str, prompts: Sequence[int]) -> tuple[float, float]:
    """The mean over prompts of a figure less that of the base, and its standard error."""
    pairs = zip(_each(row, key, prompts), _each(base, key, prompts), strict=True)
    found = [own - other for own, other in pairs]
    return fmean(found), stdev(found) / math.sqrt(len(found))


def _point(row: Row, prompts: Sequence[int]) -> dict[str, Any]:
    values = _each(row, "agreement", prompts)
    return {
        "setting": rule_name(row),
        "tokens_per_pass": tokens_per_pass(row, prompts),
        "agreement": fmean(values),
        "agreement_stderr": stdev(values) / math.sqrt(len(values)),
        "nats_per_token": nats(row, prompts),
        "repeated_4": fmean(_each(row, "repeated_4", prompts)),
    }


def _against(row: Row, base: Row, prompts: Sequence[int]) -> dict[str, Any]:
    """The figures of a setting on some prompts against the base; texts have the same lengths."""
    passes = (torch.tensor(_each(each, "passes", prompts)) for each in (base, row))
    gain, gain_stderr, _ = ratio(*passes)
    more, more_stderr = _difference(row, base, "agreement", prompts)
    less_likely, less_likely_stderr = _difference(row, base, "nats_per_token", prompts)
    return _point(row, prompts) | {
        "gain": gain,
        "gain_stderr": gain_stderr,
        "speed_gain": sum(_each(base, "seconds", prompts)) / sum(_each(row, "seconds", prompts)),
        "agreement_gain": more,
        "agreement_gain_stderr": more_stderr,
        "nats_gain": less_likely,
        "nats_gain_stderr": less_likely_stderr,
    }


def sampler_curves(rows: Sequence[Row], *, block: int, threshold: float) -> dict[str, Any]:
    """Compare samplers with the released rule.

    Args:
        rows: Rows of `speed_quality.sweep`, AR first, with at least `LEAST_PROMPTS` prompts.
        block: Block size of the samplers.
        threshold: Threshold of the released rule that the samplers are compared with.

    Returns:
        `base`, the figures of the released rule, and `curves`: of each sampler, the thresholds
        first, its points, their area and the recommended setting, None if no setting is as good as
        the base.
    """
    count = rows[0]["prompts"]
    tuning, measured = range(0, count, 2), range(1, count, 2)
    by_threshold = threshold_rows(rows, block)
    named: dict[str, list[Row]] = {THRESHOLD: by_threshold}
    for row in rows:
        if row["sampler"] is not None:
            named.setdefault(row["sampler"].partition(":")[0], []).append(row)
    base = next(row for row in by_threshold if row["confidence_threshold"] == threshold)
    curves = []
    for name, settings in named.items():
        best, (found, error) = fastest_as_good(settings, base, tuning), area_with_error(settings, measured)
        points = sorted((_point(row, measured) for row in settings), key=lambda point: point["tokens_per_pass"])
        recommended = None if best is None else _against(best, base, measured)
        curves.append({"name": name, "area": found, "area_stderr": error, "points": points, "recommended": recommended})
    return {
        "tuning_prompts": len(tuning),
        "prompts": len(measured),
        "base": _point(base, measured) | {"confidence_threshold": threshold},
        "curves": curves,
    }
