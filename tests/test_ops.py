"""Convolution, attention and head against their slow twins, all gradients included."""

import pytest
import torch

from megatron_twotower.ops import attention, cross_entropy
from megatron_twotower.ops.attention import block_attention, block_attention_ref, causal_attention
from megatron_twotower.ops.convolution import causal_conv, seeded_block_conv, seeded_block_conv_ref
from megatron_twotower.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref


def draw(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def assert_same_gradients(got, want, tensors):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = draw(*got.shape, seed=99, grad=False)
    pairs = zip(torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 12])
def test_seeded_convolution(block):
    x, weight, bias = draw(2, 12, 5), draw(5, 4, seed=1), draw(5, seed=2)
    clean = draw(2, 12, 5, seed=3, grad=False)
    got = seeded_block_conv(x, clean, weight, bias, block=block)
    assert_same_gradients(got, seeded_block_conv_ref(x, clean, weight, bias, block=block), (x, weight, bias))


def test_causal_convolution_is_one_large_block():
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    want = seeded_block_conv_ref(x, torch.zeros_like(x), weight, bias, block=9)
    assert_same_gradients(causal_conv(x, weight, bias), want, (x, weight, bias))


@pytest.mark.parametrize(("length", "block"), [(12, 1), (12, 4), (12, 12), (24, 4)])
def test_block_attention(monkeypatch, length, block):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    query, key, value = draw(2, 4, length, 6), draw(2, 2, length, 6, seed=1), draw(2, 2, length, 6, seed=2)
    clean = {
        "clean_key": draw(2, 2, length, 6, seed=3, grad=False),
        "clean_value": draw(2, 2, length, 6, seed=4, grad=False),
    }
    got = block_attention(query, key, value, **clean, block=block)
    assert_same_gradients(got, block_attention_ref(query, key, value, **clean, block=block), (query, key, value))


def test_blocks_of_one_copied_token_are_causal_attention():
    query, key, value = draw(2, 4, 7, 6), draw(2, 2, 7, 6, seed=1), draw(2, 2, 7, 6, seed=2)
    got = block_attention(query, key, value, clean_key=key, clean_value=value, block=1)
    torch.testing.assert_close(got, causal_attention(query, key, value), rtol=1e-12, atol=1e-12)


def test_linear_cross_entropy(monkeypatch):
    monkeypatch.setattr(cross_entropy, "POSITION_CHUNK", 4)
    hidden, weight = draw(11, 6).float().detach().requires_grad_(), draw(9, 6, seed=1).float().detach().requires_grad_()
    targets, weights = torch.arange(11) % 9, torch.rand(11, generator=torch.Generator().manual_seed(2))
    got, losses = linear_cross_entropy(hidden, weight, targets, weights)
    want, each = linear_cross_entropy_ref(hidden, weight, targets, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * want, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_scored_position_gives_zero_loss_and_zero_gradients():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert total.item() == 0 and losses.numel() == 0 and weight.grad is not None and not weight.grad.any()
