"""The objectives: what they score, what divides the sum, and that a step waits for no count."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.data.dataset import split_batch
from megatron_twotower.ops import attention
from megatron_twotower.ops.convolution import block_history, seeded_block_conv
from megatron_twotower.ops.scan import chunk_scan, two_stream_scan
from megatron_twotower.train.losses import autoregressive_loss, masked_diffusion_loss, next_tokens
from megatron_twotower.train.noise import corrupt, distance_weights, teacher_shares
from megatron_twotower.types import Batch, noise_buckets

GROUPS = SimpleNamespace(tp=None, cp=None)
NOISE = NoiseConfig(block_size_tokens=4, mask_token_id=3)


def tower_of(weight):
    return SimpleNamespace(output_layer=lambda: weight, vocabulary_start=lambda: 0)


def batch_of(**more):
    tokens = torch.randint(4, 20, (3, 16), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(3)
    return Batch(tokens, numbers, numbers, numbers, **more)


def hidden_and_weight(draws=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3 * draws, 8, generator=generator), torch.randn(20, 8, generator=generator)


@pytest.mark.parametrize("weighting", ["masked_mean", "elbo"])
@pytest.mark.parametrize("draws", [1, 2])
def test_masked_positions_that_are_not_padding_are_scored(weighting, draws):
    padding = torch.zeros(3, 16, dtype=torch.bool)
    padding[1, 10:] = True
    noise = NoiseConfig(block_size_tokens=4, weighting=weighting, draws_per_context=draws, time_per="block")
    noisy = corrupt(batch_of(padding=padding), noise, seed=5)
    hidden, weight = hidden_and_weight(draws)
    report = masked_diffusion_loss(tower_of(weight), hidden, noisy, noise, GROUPS)

    targets, times = noisy.tokens.repeat(draws, 1), noisy.times.repeat_interleave(4, dim=1)
    scored = (noisy.noisy == 3) & ~padding.repeat(draws, 1)
    each = F.cross_entropy((hidden.transpose(0, 1) @ weight.t()).flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view_as(scored)
    elbo = weighting == "elbo"
    torch.testing.assert_close(report.total, ((each / times if elbo else each) * scored).sum())
    assert report.count == (int((~padding).sum()) * draws if elbo else scored.sum())
    for bucket in range(noise.report_buckets):
        inside = scored & (noise_buckets(times, noise.report_buckets) == bucket)
        torch.testing.assert_close(report.bucket_sums[bucket], each[inside].sum())
        assert report.bucket_counts[bucket] == inside.sum()


@pytest.mark.parametrize("weighting", ["masked_mean", "elbo"])
def test_targets_are_shared_with_the_next_token_distributions_of_the_context_tower(weighting):
    noise = NoiseConfig(
        block_size_tokens=4,
        weighting=weighting,
        draws_per_context=2,
        time_per="block",
        distillation=0.75,
        distillation_elsewhere=0.25,
    )
    batch = batch_of()
    noisy = corrupt(batch, noise, seed=5)
    hidden, weight = hidden_and_weight(draws=3)  # two noisy streams, and the clean one
    hidden.requires_grad_()
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    report = masked_diffusion_loss(tower_of(weight), hidden, noisy, noise, GROUPS, context=tower_of(head))

    masked = noisy.noisy == 3
    streams, clean = hidden.detach().requires_grad_().transpose(0, 1).split([6, 3])
    logits, teacher = streams @ weight.t(), (clean @ head.t()).softmax(-1).roll(1, dims=1).repeat(2, 1, 1)
    shares = teacher_shares(batch, masked, noise).unsqueeze(-1)
    targets = (1 - shares) * F.one_hot(batch.tokens.repeat(2, 1), 20) + shares * teacher.detach()
    each = -(targets * logits.log_softmax(-1)).sum(-1)
    if weighting == "elbo":
        each = each / noisy.times.repeat_interleave(4, dim=1)
    want = (each * masked).sum()
    torch.testing.assert_close(report.total, want)
    ours, theirs = torch.autograd.grad(report.total, hidden)[0], torch.autograd.grad(want, streams)[0]
    torch.testing.assert_close(ours[:, :6].transpose(0, 1), theirs)
    assert not ours[:, 6:].any(), "no gradient reaches the context tower"
    plain = masked_diffusion_loss(
        tower_of(weight), hidden, dataclasses.replace(noisy, teacher_shares=None), noise, GROUPS
    )
    torch.testing.assert_close(report.bucket_sums, plain.bucket_sums)


def test_positions_have_weights_and_are_counted_once():
    noise = NoiseConfig(block_size_tokens=4, time_per="block", distance_decay=2.0)
    batch, (hidden, weight) = batch_of(), hidden_and_weight()
    hidden.requires_grad_()
    noisy = corrupt(batch, noise, seed=5)
    report = masked_diffusion_loss(tower_of(weight), hidden, noisy, noise, GROUPS)
    masked = noisy.noisy == 3
    stream = hidden.detach().requires_grad_().transpose(0, 1)
    each = F.cross_entropy((stream @ weight.t()).flatten(0, 1), batch.tokens.flatten(), reduction="none").view(3, 16)
    want = (each * distance_weights(masked, noise) * masked).sum()
    torch.testing.assert_close(report.total, want)
    assert want < 0.95 * (each * masked).sum()
    ours, theirs = torch.autograd.grad(report.total, hidden)[0], torch.autograd.grad(want, stream)[0]
    torch.testing.assert_close(ours.transpose(0, 1), theirs)
    assert report.count == masked.sum() == report.bucket_counts.sum()
    torch.testing.assert_close(report.bucket_sums.sum(), (each * masked).sum())


def test_next_tokens_are_scored_within_their_document():
    documents = torch.zeros(3, 16, dtype=torch.int32)
    documents[0, 8:] = 1
    padding = torch.zeros(3, 16, dtype=torch.bool)
    padding[0, 6:8] = True
    hidden, weight = hidden_and_weight()
    batch = batch_of(documents=documents, padding=padding)
    report = autoregressive_loss(tower_of(weight), hidden, next_tokens(batch), GROUPS)
    logits = hidden.transpose(0, 1)[:, :-1] @ weight.t()
    each = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none").view(3, 15)
    scored = torch.ones(3, 15, dtype=torch.bool)
    scored[0, 5:8] = False  # the two that fill up, and the first of the next document
    torch.testing.assert_close(report.total, each[scored].sum())
    assert report.count == scored.sum() == report.bucket_counts.sum()


@pytest.mark.parametrize("weighting", ["masked_mean", "elbo"])
def test_scored_positions_of_the_global_batch_divide_the_loss(weighting):
    """The sums of any parts of a batch add up: what divides them is counted, not averaged."""
    scored = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    scored[1] = False
    noise = NoiseConfig(block_size_tokens=4, weighting=weighting, time_per="block")
    batch, (hidden, weight) = batch_of(scored=scored), hidden_and_weight()
    noisy = corrupt(batch, noise, seed=5)
    report = masked_diffusion_loss(tower_of(weight), hidden, noisy, noise, GROUPS)
    masked, times = noisy.noisy == 3, noisy.times.repeat_interleave(4, dim=1)
    assert not (masked & ~scored).any()
    each = F.cross_entropy(
        (hidden.transpose(0, 1) @ weight.t()).flatten(0, 1), batch.tokens.flatten(), reduction="none"
    )
    elbo, each = weighting == "elbo", each.view(3, 16)
    torch.testing.assert_close(report.total, ((each / times if elbo else each) * masked).sum())
    assert report.count == (scored if elbo else masked).sum()
    parts = [
        masked_diffusion_loss(tower_of(weight), hidden[:, row : row + 1], corrupt(part, noise, seed=5), noise, GROUPS)
        for row, part in enumerate(split_batch(batch, 1))
    ]
    torch.testing.assert_close(sum(part.total for part in parts), report.total)
    assert sum(part.count for part in parts) == report.count and parts[1].count == 0


def test_next_tokens_that_are_scored_are_the_answers():
    scored = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    documents = torch.zeros(3, 16, dtype=torch.int32)
    documents[:, 8:] = 1
    hidden, weight = hidden_and_weight()
    batch = batch_of(scored=scored, documents=documents)
    report = autoregressive_loss(tower_of(weight), hidden, next_tokens(batch), GROUPS)
    logits = hidden.transpose(0, 1)[:, :-1] @ weight.t()
    each = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none").view(3, 15)
    targets = scored[:, 1:].clone()
    targets[:, 7] = False  # the first of a document has no text before it
    torch.testing.assert_close(report.total, each[targets].sum())
    assert report.count == targets.sum() == report.bucket_counts.sum()


def test_no_operation_of_a_step_asks_for_a_value():
    """With fake tensors an operation that needs a value, such as a count, raises an error."""
    noisy = corrupt(batch_of(), NOISE, seed=5)
    attention._masked_pairs.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        with pytest.raises(DataDependentOutputException):
            torch.ones(3).sum().item()
        batch = type(noisy)(**{k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in vars(noisy).items()})

        def fake(*shape):
            return torch.randn(*shape, requires_grad=True)

        weight, hidden = fake(20, 8), fake(16, 3, 8)
        masked_diffusion_loss(tower_of(weight), hidden, batch, NOISE, GROUPS).total.backward()
        x, dt, B, C = fake(3, 16, 4, 4), fake(3, 16, 4), fake(3, 16, 2, 4), fake(3, 16, 2, 4)
        A, D, clean = fake(4), fake(4), [fake(*t.shape).detach() for t in (x, dt, B, C)]
        _, states, _ = chunk_scan(clean[0], clean[1], A.detach(), clean[2], clean[3], D.detach(), chunk=8)
        y = two_stream_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            clean_x=clean[0],
            clean_dt=clean[1],
            clean_A=A.detach(),
            clean_B=clean[2],
            states=states,
            block=4,
            chunk=8,
        )
        y.sum().backward()
        query, key = fake(3, 4, 16, 4), fake(3, 2, 16, 4)
        clean = {"clean_key": key.detach(), "clean_value": key.detach()}
        attention.block_attention(query, key, key, **clean, block=4).sum().backward()
        inputs, filters, bias = fake(3, 16, 6), fake(6, 4), fake(6)
        history = block_history(inputs.detach(), taps=4, block=4)
        seeded_block_conv(inputs, history, filters, bias).sum().backward()
        assert all(t.grad is not None for t in (weight, hidden, x, dt, A, B, C, D, query, key, inputs, filters, bias))
    attention._masked_pairs.cache_clear()
