"""The cross-entropy against its reference implementation, all gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.references import draw
from megatron_twotower.ops import cross_entropy
from megatron_twotower.ops.cross_entropy import Teacher, linear_cross_entropy, linear_cross_entropy_ref


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=50, deadline=None)
def test_linear_cross_entropy(positions, vocabulary, chunk, seed):
    hidden, weight = (draw(n, 6, seed=seed + n, grad=False).float() for n in (positions, vocabulary))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(positions) % vocabulary
    weights = torch.rand(positions, generator=torch.Generator().manual_seed(seed))
    weights[::5] = 0  # padding of the list of positions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights)
    want, each = linear_cross_entropy_ref(hidden, weight, targets, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * want, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=20, deadline=None)
def test_linear_cross_entropy_in_bfloat16(positions, vocabulary, chunk, seed):
    targets, weights = torch.arange(positions) % vocabulary, torch.ones(positions)
    narrow = [draw(n, 6, seed=seed + n, grad=False).bfloat16() for n in (positions, vocabulary)]
    hidden, weight = (tensor.requires_grad_() for tensor in narrow)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights)
    want, each = linear_cross_entropy_ref(*wide, targets, weights)
    assert got.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(losses, each, rtol=0.02, atol=0.05)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, wide), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=50, deadline=None)
def test_certainty(positions, vocabulary, chunk, seed):
    hidden, weight = (draw(n, 6, seed=seed + n, grad=False).float() for n in (positions, vocabulary))
    targets = (hidden @ weight.t()).argmax(-1) if positions else torch.zeros(0, dtype=torch.long)
    targets[1::2] = torch.arange(positions)[1::2] % vocabulary  # every other one is often wrong
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    weights = torch.rand(positions, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights, certainty=0.7)
    want, each = linear_cross_entropy_ref(hidden, weight, targets, weights, certainty=0.7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * want, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=50, deadline=None)
def test_soft_targets_of_a_teacher(positions, vocabulary, chunk, seed):
    hidden, weight, other, head = (
        draw(n, 6, seed=seed + i, grad=False).float() for i, n in enumerate((positions, vocabulary) * 2)
    )
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(positions) % vocabulary
    weights, shares = torch.rand(2, positions, generator=torch.Generator().manual_seed(seed))
    shares[::3], weights[::5] = 1, 0
    teacher = Teacher(other, head, shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights, teacher=teacher)
    want, each = linear_cross_entropy_ref(hidden, weight, targets, weights, teacher)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * want, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_own_distribution_as_target_has_no_gradient():
    hidden, weight = draw(5, 6, seed=1).float(), draw(9, 6, seed=2).float()
    teacher = Teacher(hidden.detach(), weight.detach(), torch.ones(5))
    total, _ = linear_cross_entropy(hidden, weight, torch.arange(5), torch.ones(5), teacher=teacher)
    for gradient in torch.autograd.grad(total, (hidden, weight)):
        assert gradient.abs().max() < 1e-6


def test_a_second_backward_pass_is_refused():
    """The first one overwrites the saved gradients."""
    hidden, weight = torch.ones(3, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, torch.arange(3), torch.ones(3))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def test_no_scored_position_gives_zero_loss_and_zero_gradients():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert total.item() == 0 and losses.numel() == 0 and weight.grad is not None and not weight.grad.any()
