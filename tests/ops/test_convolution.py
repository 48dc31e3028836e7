"""The convolutions against their reference implementation, all gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.references import TOLERANCES, assert_follows, assert_same_gradients, draw, random_documents
from megatron_twotower.ops import convolution
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv, seeded_block_conv_ref


@given(
    block=st.sampled_from([1, 2, 3, 4, 12]),
    blocks=st.integers(1, 5),
    taps=st.integers(2, 5),
    packed=st.booleans(),
    elements=st.sampled_from([16, 1 << 20]),
    channels=st.sampled_from([5, 40]),
)
@settings(max_examples=50, deadline=None)
def test_seeded_convolution(block, blocks, taps, packed, elements, channels):
    length = block * blocks
    x, weight, bias = draw(2, length, channels), draw(channels, taps, seed=1), draw(channels, seed=2)
    clean = draw(2, length, channels, seed=3, grad=False)
    documents = random_documents(length, block) if packed else None
    history = block_history(clean, taps=taps, block=block)
    assert history.shape == (2, blocks, taps - 1, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "CPU_ELEMENTS", elements)
        got = seeded_block_conv(x, history, weight, bias, documents=documents)
        want = seeded_block_conv_ref(x, clean, weight, bias, block=block, documents=documents)
        assert_same_gradients(got, want, (x, weight, bias))


@given(
    dtype=st.sampled_from(list(TOLERANCES)),
    block=st.sampled_from([1, 3, 8]),
    blocks=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_seeded_convolution_in_narrow_dtypes(dtype, block, blocks, packed, seed):
    length = block * blocks
    documents = random_documents(length, seed) if packed else None
    filtered = [draw(2, length, 5, seed=seed), draw(5, 4, seed=seed + 1), draw(5, seed=seed + 2)]
    clean = draw(2, length, 5, seed=seed + 3, grad=False).to(dtype)
    history = block_history(clean, taps=4, block=block)
    assert_follows(
        lambda x, *own: seeded_block_conv(x, history, *own, documents=documents),
        lambda x, *own: seeded_block_conv_ref(x, clean.double(), *own, block=block, documents=documents),
        filtered,
        dtype,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_causal_convolution_is_one_large_block(packed):
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    documents = random_documents(9, 4) if packed else None
    want = seeded_block_conv_ref(x, torch.zeros_like(x), weight, bias, block=9, documents=documents)
    assert_same_gradients(causal_conv(x, weight, bias, documents=documents), want, (x, weight, bias))
