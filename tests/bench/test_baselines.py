"""The baselines compute what the operations compute, gradients included."""

import pytest
import torch

from megatron_twotower.bench import baselines
from megatron_twotower.ops.attention import block_attention
from megatron_twotower.ops.convolution import block_history, seeded_block_conv
from megatron_twotower.ops.cross_entropy import linear_cross_entropy
from megatron_twotower.ops.scan import chunk_length, chunk_scan, two_stream_scan


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*size, trained=False):
    return torch.randn(*size, dtype=torch.float64).requires_grad_(trained)


def stream(*, trained, length=48):
    x, B, C = (normal(2, length, *size, trained=trained) for size in ((4, 6), (2, 5), (2, 5)))
    dt = (torch.rand(2, length, 4, dtype=torch.float64) * 0.5).requires_grad_(trained)
    A = (-torch.rand(4, dtype=torch.float64) - 0.1).requires_grad_(trained)
    return x, dt, A, B, C, normal(4, trained=trained)


def assert_same(ours, baseline, inputs):
    grad = torch.randn_like(ours)
    torch.testing.assert_close(baseline, ours)
    for name, a, b in zip(
        range(len(inputs)),
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(baseline, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"gradient {name}: {text}")


@pytest.mark.parametrize("scan", [baselines.scan_of_sequences, baselines.scan_of_sequences_lean])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_a_state_at_every_block_gives_the_same(scan, block):
    clean, noisy = stream(trained=False), stream(trained=True)
    x, dt, A, B, _, _ = clean
    chunk = chunk_length(block, preferred=16)
    y, states, final = chunk_scan(*clean, chunk=chunk)
    baseline_y, baseline_states, baseline_final = baselines.chunked_scan(*clean, chunk=block)
    torch.testing.assert_close(baseline_y, y)
    torch.testing.assert_close(baseline_final, final)
    torch.testing.assert_close(baseline_states[:, :: chunk // block], states)
    ours = two_stream_scan(
        *noisy, clean_x=x, clean_dt=dt, clean_A=A, clean_B=B, states=states, block=block, chunk=chunk
    )
    assert_same(ours, scan(*noisy, states=baseline_states, block=block), noisy)


def test_shifted_copies_give_the_same_convolution():
    x, clean, weight, bias = normal(2, 24, 5, trained=True), normal(2, 24, 5), normal(5, 4), normal(5)
    history = block_history(clean, taps=4, block=8)
    inputs = (x, weight.requires_grad_(), bias.requires_grad_())
    assert_same(
        seeded_block_conv(x, history, weight, bias), baselines.shifted_block_conv(x, history, weight, bias), inputs
    )


@pytest.mark.parametrize("block", [4, 16])
def test_the_dense_mask_gives_the_same_attention(block):
    query, key, value = normal(2, 4, 32, 6, trained=True), *(normal(2, 2, 32, 6, trained=True) for _ in range(2))
    clean = {"clean_key": normal(2, 2, 32, 6), "clean_value": normal(2, 2, 32, 6)}
    ours = block_attention(query, key, value, **clean, block=block)
    mask = baselines.dense_mask(32, block, device=query.device)
    assert mask.shape == (32, 64)
    assert_same(ours, baselines.dense_mask_attention(query, key, value, **clean, mask=mask), (query, key, value))


def test_all_logits_and_those_of_masked_positions_give_the_same_loss():
    # The heads of both sides take their losses in float32.
    hidden, weight = (normal(*size).float().requires_grad_() for size in ((20, 6), (11, 6)))
    targets, places = torch.randint(11, (20,)), torch.tensor([0, 3, 4, 9, 17])
    weights = torch.zeros(20).index_fill(0, places, 1.0)
    ours, _ = linear_cross_entropy(hidden[places], weight, targets[places], weights[places])
    gradients = torch.autograd.grad(ours, (hidden, weight))
    for baseline in (
        baselines.full_logits_loss(hidden, weight, targets, weights),
        baselines.gathered_logits_loss(hidden, weight, targets, places),
    ):
        torch.testing.assert_close(baseline, ours)
        for a, b in zip(gradients, torch.autograd.grad(baseline, (hidden, weight)), strict=True):
            torch.testing.assert_close(b, a)
