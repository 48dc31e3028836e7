"""Noise: what it depends on, its distribution, and its exact values."""

import dataclasses

import pytest
import torch

from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.train.noise import SCORED_MULTIPLE, corrupt, sample_times, teacher_shares
from megatron_twotower.types import Batch

NOISE = NoiseConfig(block_size_tokens=4)


def batch_of(samples, epoch=0, length=16):
    samples = torch.as_tensor(samples)
    tokens = (torch.arange(length) + samples.unsqueeze(-1)) % 50 + 4
    return Batch(tokens, samples, torch.full_like(samples, epoch), samples)


@pytest.mark.parametrize("time_per", ["sequence", "block"])
@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(time_per, sampling):
    noise = dataclasses.replace(NOISE, time_per=time_per, time_sampling=sampling)
    together = corrupt(batch_of(range(8)), noise, seed=1)
    for i in range(8):
        alone = corrupt(batch_of([i]), noise, seed=1)
        assert torch.equal(alone.noisy[0], together.noisy[i]) and torch.equal(alone.times[0], together.times[i])
    again = corrupt(batch_of(range(8), epoch=1), noise, seed=1)
    assert not torch.equal(again.noisy, together.noisy), "another epoch, other noise"
    assert not torch.equal(corrupt(batch_of(range(8)), noise, seed=2).noisy, together.noisy)
    rows = {tuple(row.tolist()) for row in together.noisy == noise.mask_token_id}
    assert len(rows) > 4, "samples differ from each other"


def test_mask_fraction_is_the_noise_level_at_every_position():
    batch = batch_of(range(20000))
    noisy = corrupt(batch, NOISE, seed=3)
    masked = noisy.noisy == NOISE.mask_token_id
    for low in (0.0, 0.25, 0.5, 0.75):
        rows = (noisy.times[:, 0] > low) & (noisy.times[:, 0] <= low + 0.25)
        expected = noisy.times[rows].mean()
        assert (masked[rows].float().mean(dim=0) - expected).abs().max() < 0.03
    assert torch.equal(noisy.noisy[~masked], batch.tokens[~masked])


def test_scored_positions_are_the_masked_ones_then_padding():
    padding = torch.zeros(6, 16, dtype=torch.bool)
    padding[:, 13:] = True
    for draws in (1, 3):
        noise = dataclasses.replace(NOISE, draws_per_context=draws)
        noisy = corrupt(dataclasses.replace(batch_of(range(6)), padding=padding), noise, seed=3)
        masked = (noisy.noisy == noise.mask_token_id) & ~padding.repeat(draws, 1)
        count = int(noisy.num_scored)
        assert torch.equal(noisy.scored_positions[:count], masked.flatten().nonzero().squeeze(-1))
        assert (
            len(noisy.scored_positions) % SCORED_MULTIPLE == 0 and len(noisy.scored_positions) - count < SCORED_MULTIPLE
        )
        assert int(noisy.num_tokens) == 13 * 6 * draws
        assert (noisy.noisy[:, 13:] == noise.mask_token_id).any(), "padding is masked like the rest"


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize("time_per", ["sequence", "block"])
def test_draws_of_a_sequence_have_independent_noise(sampling, time_per):
    noise = dataclasses.replace(NOISE, time_per=time_per, time_sampling=sampling, time_min=1e-6)
    one, three = (
        corrupt(batch_of(range(200)), dataclasses.replace(noise, draws_per_context=k), seed=3) for k in (1, 3)
    )
    assert torch.equal(three.noisy[:200], one.noisy) and torch.equal(three.times[:200], one.times)
    assert three.tokens.shape == one.tokens.shape
    draws = three.noisy.view(3, 200, 16) == noise.mask_token_id
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    if sampling == "stratified":  # the three times of a place are a third of the range apart
        levels = three.times.view(3, 200, -1).sort(dim=0).values
        torch.testing.assert_close(levels.diff(dim=0), torch.full_like(levels[:2], 1 / 3), rtol=1e-4, atol=1e-4)


def test_times_cover_the_clipped_range():
    noise = dataclasses.replace(NOISE, time_min=0.3, time_max=0.8)
    times = sample_times(batch_of(range(5000)), noise, seed=0)
    assert 0.3 <= times.min() < 0.31 and 0.79 < times.max() <= 0.8
    assert abs(times.mean() - 0.55) < 0.01


def test_stratified_times_of_a_sequence_fill_every_stratum_once():
    noise = dataclasses.replace(NOISE, time_per="block", time_sampling="stratified", time_min=1e-6)
    times = sample_times(batch_of(range(500), length=64), noise, seed=0)
    strata = ((1 - times) * 16).floor().clamp(max=15).sort(dim=-1).values
    assert torch.equal(strata, torch.arange(16.0).expand(500, 16))
    assert (times[:, 0] - 0.5).abs().mean() > 0.2, "the order is shuffled"


def test_stratified_times_of_consecutive_samples_are_spread_evenly():
    noise = dataclasses.replace(NOISE, time_sampling="stratified")
    even = [sample_times(batch_of(range(i, i + 8)), noise, seed=0).mean() for i in range(0, 4000, 8)]
    free = [sample_times(batch_of(range(i, i + 8)), NOISE, seed=0).mean() for i in range(0, 4000, 8)]
    assert torch.stack(even).std() < 0.5 * torch.stack(free).std()


@pytest.mark.parametrize("draws", [1, 2])
def test_a_token_with_nothing_visible_after_it_in_its_block_has_the_share_of_a_teacher(draws):
    noise = NoiseConfig(
        block_size_tokens=4, draws_per_context=draws, time_per="block", distillation=0.75, distillation_elsewhere=0.25
    )
    documents = torch.zeros(6, 16, dtype=torch.int32)
    documents[:, 8:] = 1
    batch = dataclasses.replace(batch_of(range(6)), documents=documents)
    noisy = corrupt(batch, noise, seed=3)
    masked = noisy.noisy == noise.mask_token_id
    shares = teacher_shares(batch, masked, noise)
    seen = set()
    for row in range(6 * draws):
        for i in range(16):
            later = [j for j in range(i + 1, 16) if j // 4 == i // 4 and not masked[row, j]]
            want = 0.0 if i in (0, 8) else 0.25 if later else 0.75
            assert shares[row, i] == want, (row, i)
            seen.add(want)
    assert seen == {0.0, 0.25, 0.75}
    assert torch.equal(noisy.teacher_shares, shares.flatten()[noisy.scored_positions])
    assert corrupt(batch, NOISE, seed=3).teacher_shares is None


@pytest.mark.parametrize("time_per", ["sequence", "block"])
@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize("weighting", ["masked_mean", "elbo"])
@pytest.mark.parametrize("draws", [1, 3])
def test_only_scored_positions_are_masked_and_the_others_stand_clean(time_per, sampling, weighting, draws):
    scored = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    padding = torch.zeros(6, 16, dtype=torch.bool)
    padding[:, 13:] = True
    scored, scored[3] = scored & ~padding, False
    noise = NoiseConfig(
        block_size_tokens=4, time_per=time_per, time_sampling=sampling, weighting=weighting, draws_per_context=draws
    )
    batch = dataclasses.replace(batch_of(range(6)), padding=padding, scored=scored)
    noisy, everything = corrupt(batch, noise, seed=3), corrupt(batch_of(range(6)), noise, seed=3)
    masked = noisy.noisy == noise.mask_token_id
    # The noise itself is that of the whole sequence.
    assert torch.equal(masked, (everything.noisy == noise.mask_token_id) & scored.repeat(draws, 1))
    assert torch.equal(noisy.times, everything.times)
    assert torch.equal(noisy.noisy[~masked], batch.tokens.repeat(draws, 1)[~masked])
    assert torch.equal(noisy.scored_positions[: int(noisy.num_scored)], masked.flatten().nonzero().squeeze(-1))
    assert int(noisy.num_scored) == int(masked.sum()) and int(noisy.num_tokens) == int(scored.sum()) * draws
    counted = scored.repeat(draws, 1) if weighting == "elbo" else masked
    assert torch.equal(noisy.sequence_weights, counted.sum(1).float()) and noisy.sequence_weights[3] == 0
