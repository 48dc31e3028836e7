"""Modulation and gate against the plain formulas, all gradients included."""

import torch

from helpers.references import assert_same_gradients, draw
from megatron_twotower.ops.modulation import add_gated, modulate


def test_each_row_is_applied_to_its_segment():
    x, out, first, second = draw(12, 2, 5), draw(12, 2, 5, seed=1), draw(3, 2, 5, seed=2), draw(3, 2, 5, seed=3)
    shift, scale = (torch.repeat_interleave(row, 4, dim=0) for row in (first, second))
    assert_same_gradients(modulate(x, first, second), x * (1 + scale) + shift, (x, first, second))
    assert_same_gradients(add_gated(x, first, out), x + shift * out, (x, first, out))
