"""The norms against their reference implementations, all gradients included."""

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.references import TOLERANCES, assert_follows, assert_same_gradients, draw
from megatron_twotower.ops.norm import gated_rms_norm, gated_rms_norm_ref, rms_norm, rms_norm_ref


def test_norms():
    x, weight = draw(3, 5, 12), draw(12, seed=1)
    assert_same_gradients(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), (x, weight))
    gate, by_group = draw(3, 5, 12, seed=2), draw(3, 4, seed=3)
    pair = (gated_rms_norm(x, gate, by_group, 1e-5), gated_rms_norm_ref(x, gate, by_group, 1e-5))
    assert_same_gradients(*pair, (x, gate, by_group))


@given(dtype=st.sampled_from(list(TOLERANCES)), length=st.integers(1, 32), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_gated_norm_in_narrow_dtypes(dtype, length, seed):
    normed = [draw(3, length, 8, seed=seed), draw(3, length, 8, seed=seed + 1), draw(2, 4, seed=seed + 2)]
    assert_follows(lambda *own: gated_rms_norm(*own, 1e-5), lambda *own: gated_rms_norm_ref(*own, 1e-5), normed, dtype)
