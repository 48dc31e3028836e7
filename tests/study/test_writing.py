"""Tokens per pass at an agreement, from a curve over thresholds."""

import pytest

from megatron_twotower.study.figures import mean
from megatron_twotower.study.writing import _speed_at, tokens_per_pass_at

CURVE = [
    {"tokens_per_pass": speed, "agreement": agreement} for speed, agreement in ((4.0, 0.5), (1.0, 0.95), (2.0, 0.75))
]


@pytest.mark.parametrize(
    ("agreement", "expected"), [(0.96, None), (0.95, 1.0), (0.85, 1.5), (0.75, 2.0), (0.6, 3.2), (0.51, 3.92)]
)
def test_tokens_per_pass_are_linear_between_thresholds(agreement, expected):
    found = tokens_per_pass_at(agreement, CURVE)
    assert found == (None if expected is None else (pytest.approx(expected), False))


@pytest.mark.parametrize("agreement", [0.5, 0.4])
def test_where_the_fastest_setting_agrees_enough_there_may_be_a_faster_one(agreement):
    assert tokens_per_pass_at(agreement, CURVE) == (4.0, True)


def test_one_seed_that_does_not_agree_leaves_no_mean_and_one_without_an_end_makes_it_a_least():
    better = [{**row, "agreement": row["agreement"] + 0.04} for row in CURVE]
    assert _speed_at(0.97, [CURVE, better]) is None
    found = _speed_at(0.52, [CURVE, better])
    assert found.at_least and found.tokens_per_pass.value == pytest.approx(mean([3.84, 4.0]).value)
    assert not _speed_at(0.6, [CURVE, better]).at_least


def test_a_faster_setting_that_agrees_again_counts():
    """A curve need not fall: the fastest point that agrees enough is the start."""
    curve = [*CURVE, {"tokens_per_pass": 3.0, "agreement": 0.8}]
    assert tokens_per_pass_at(0.8, curve) == (pytest.approx(3.0), False)
    assert tokens_per_pass_at(0.65, curve) == (pytest.approx(3.5), False)
