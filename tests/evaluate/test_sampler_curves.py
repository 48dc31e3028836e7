"""Curves of samplers and recommended settings, from rows whose figures are given by hand."""

import math
from statistics import fmean

import pytest

from megatron_twotower.evaluate.sampler_curves import area, area_with_error, fastest_as_good, sampler_curves

TOKENS = 100


def row(agreements, passes, *, sampler=None, threshold=None, seconds=None, nats=None):
    count = len(agreements)
    costs = zip(agreements, passes, seconds or [1.0] * count, nats or [0.5] * count, strict=True)
    by_prompt = [
        {"agreement": a, "passes": p, "seconds": s, "nats_per_token": n, "new_tokens": TOKENS, "repeated_4": a / 2}
        for a, p, s, n in costs
    ]
    size = None if sampler is threshold is None else 16
    rule = {"sampler": sampler, "confidence_threshold": threshold, "block_size": size, "steps_per_block": size}
    return rule | {"prompts": count, "by_prompt": by_prompt}


def test_area_of_a_curve():
    """Against the sum written out, with the weights of the definition."""
    assert area([(2.0, 100.0)]) == 200.0
    assert area([(1.0, 100.0), (3.0, 100.0)]) == 300.0

    def weighted(y):
        return y * math.exp(-3 * (1 - y / 100))

    points = [(4.0, 96.0), (2.0, 98.0), (6.0, 92.0), (7.0, 94.0)]
    strips = [(4 - 2) * (weighted(96) + weighted(98)) / 2, (7 - 4) * (weighted(94) + weighted(96)) / 2]
    assert area(points) == pytest.approx(2 * 98 + sum(strips))  # 92 is more than 5 below 98
    assert area(points, best=90.0) == pytest.approx(2 * 98 + 2 * 97 + 3 * 95)  # no weight is above 1


def test_error_of_an_area_is_that_of_leaving_out_one_prompt():
    rows = [row([1.0, 0.9, 0.8], [50, 40, 45]), row([0.95, 0.9, 0.9], [20, 25, 30])]
    found, error = area_with_error(rows, [0, 1, 2])

    def alone(kept):
        sums = [[each["by_prompt"][i] for i in kept] for each in rows]
        return area(
            [(TOKENS * len(of) / sum(e["passes"] for e in of), 100 * fmean(e["agreement"] for e in of)) for of in sums]
        )

    assert found == pytest.approx(alone([0, 1, 2]))
    left_out = [alone(kept) for kept in ([1, 2], [0, 2], [0, 1])]
    assert error == pytest.approx(math.sqrt(2 / 3 * sum((each - fmean(left_out)) ** 2 for each in left_out)))


def test_the_setting_is_chosen_on_even_prompts_and_measured_on_odd_ones():
    ar = row([1.0] * 4, [TOKENS] * 4)
    base = row([0.95, 0.9, 0.95, 0.8], [30, 40, 30, 40], threshold=0.8, seconds=[9, 3, 9, 3], nats=[0, 0.4, 0, 0.6])
    slow = row([0.99, 1.0, 0.99, 1.0], [60, 60, 60, 60], threshold=0.9)
    # On even prompts `factor:1` is as good as the base and fastest; on odd ones it is not as good.
    good = row(
        [0.95, 0.8, 0.96, 0.8], [20, 30, 20, 20], sampler="factor:1", seconds=[9, 1, 9, 2], nats=[0, 0.5, 0, 0.5]
    )
    fast = row([0.9, 1.0, 0.95, 1.0], [10, 10, 10, 10], sampler="factor:2")
    bad = row([0.5, 1.0, 0.5, 1.0], [10, 10, 10, 10], sampler="prefix:0.1")
    unlikely = row([1.0, 1.0, 1.0, 1.0], [10, 10, 10, 10], sampler="factor:3", nats=[0, 0, 0.1, 0])
    found = sampler_curves([ar, base, slow, good, fast, bad, unlikely], block=16, threshold=0.8)
    assert (found["tuning_prompts"], found["prompts"]) == (2, 2)
    assert found["base"]["tokens_per_pass"] == pytest.approx(200 / 80) and found["base"]["setting"] == "0.8"
    threshold, factor, prefix = found["curves"]
    assert [each["name"] for each in found["curves"]] == ["threshold", "factor", "prefix"]
    assert threshold["recommended"]["setting"] == "0.8" and threshold["recommended"]["gain"] == 1.0
    assert prefix["recommended"] is None
    best = factor["recommended"]
    assert best["setting"] == "factor:1"
    assert best["tokens_per_pass"] == pytest.approx(200 / 50) and best["gain"] == pytest.approx(80 / 50)
    residuals = [40 - 1.6 * 30, 40 - 1.6 * 20]
    assert best["gain_stderr"] == pytest.approx(math.sqrt(2 * sum(each**2 for each in residuals)) / 50)
    assert best["speed_gain"] == pytest.approx((3 + 3) / (1 + 2))
    assert best["repeated_4"] == pytest.approx(0.4)
    assert best["agreement"] == pytest.approx(0.8) and best["agreement_gain"] == pytest.approx(-0.05)
    assert best["agreement_gain_stderr"] == pytest.approx(0.05)  # of -0.1 and 0
    assert best["nats_gain"] == pytest.approx(0.0) and best["nats_gain_stderr"] == pytest.approx(0.1)
    assert [point["setting"] for point in factor["points"]] == ["factor:1", "factor:2", "factor:3"]
    assert fastest_as_good([fast, good], base, [1, 3]) is fast
