"""Tokens per pass at an agreement, from a curve over thresholds."""

import pytest

from megatron_twotower.study.writing import tokens_per_pass_at

CURVE = [
    {"tokens_per_pass": speed, "agreement": agreement} for speed, agreement in ((4.0, 0.5), (1.0, 0.95), (2.0, 0.75))
]


@pytest.mark.parametrize(
    ("agreement", "expected"), [(0.96, None), (0.95, 1.0), (0.85, 1.5), (0.75, 2.0), (0.6, 3.2), (0.5, 4.0), (0.4, 4.0)]
)
def test_tokens_per_pass_are_linear_between_thresholds(agreement, expected):
    assert tokens_per_pass_at(agreement, CURVE) == (expected if expected is None else pytest.approx(expected))


def test_a_faster_setting_that_agrees_again_counts():
    """A curve need not fall: the fastest point that agrees enough is the start."""
    curve = [*CURVE, {"tokens_per_pass": 3.0, "agreement": 0.8}]
    assert tokens_per_pass_at(0.8, curve) == pytest.approx(3.0)
    assert tokens_per_pass_at(0.65, curve) == pytest.approx(3.5)
