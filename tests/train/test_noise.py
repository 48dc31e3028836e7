"""Noise: what it depends on, its distribution, and its exact values."""

import dataclasses
import math

import pytest
import torch

from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.train.noise import SCORED_MULTIPLE, corrupt, distance_weights, sample_times, teacher_shares
from megatron_twotower.types import Batch

NOISE = NoiseConfig(block_size_tokens=4)


def batch_of(samples, epoch=0, length=16):
    samples = torch.as_tensor(samples)
    tokens = (torch.arange(length) + samples.unsqueeze(-1)) % 50 + 4
    return Batch(tokens, samples, torch.full_like(samples, epoch), samples)


def test_a_masked_token_counts_less_with_its_distance_from_the_last_visible_one():
    noise = NoiseConfig(block_size_tokens=8, draws_per_context=2, distance_decay=3.0)
    batch = batch_of(range(40))
    noisy = corrupt(batch, noise, seed=3)
    masked = noisy.noisy == noise.mask_token_id
    weights = distance_weights(masked, noise)
    distances = set()
    for row in range(80):
        for i in range(16):
            visible = [j for j in range(i) if j // 8 < i // 8 or not masked[row, j]]
            distance = min(i - max(visible, default=-1), i % 8 + 1) if masked[row, i] else 1
            assert weights[row, i].item() == pytest.approx(math.exp(-(distance - 1) / 3.0)), (row, i)
            distances.add(distance)
    assert distances == set(range(1, 9))
    assert torch.equal(noisy.distance_weights, weights.flatten()[noisy.scored_positions])
    assert corrupt(batch, NOISE, seed=3).distance_weights is None


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


@pytest.mark.parametrize("per", ["sequence", "block"])
def test_exact_counts_are_rounded_at_random_and_every_token_has_its_probability(per):
    noise = dataclasses.replace(NOISE, mask_counts="exact", block_size_tokens=8, time_per=per)
    batch = batch_of(range(4000))
    noisy = corrupt(batch, noise, seed=3)
    masked = (noisy.noisy == noise.mask_token_id).unflatten(1, (-1, 8))
    expected = 8 * noisy.times.expand(-1, masked.shape[1])
    counts = masked.sum(-1)
    assert ((counts == expected.floor()) | (counts == expected.ceil())).all()
    assert (counts - expected).mean().abs() < 0.01
    torch.testing.assert_close(masked.double().mean((0, 1)), torch.full((8,), 0.5).double(), atol=0.02, rtol=0)


def test_at_least_one_token_of_every_block_is_masked():
    low = dataclasses.replace(NOISE, time_max=0.01, block_size_tokens=8)
    counts = {}
    for kind in ("exact", "at_least_one"):
        noisy = corrupt(batch_of(range(200)), dataclasses.replace(low, mask_counts=kind), seed=3)
        counts[kind] = (noisy.noisy == low.mask_token_id).unflatten(1, (-1, 8)).sum(-1)
    assert (counts["exact"] == 0).any() and (counts["at_least_one"] == 1).all()


@pytest.mark.parametrize("kind", ["exact", "at_least_one"])
def test_exact_counts_are_of_the_tokens_that_may_be_scored(kind):
    noise = dataclasses.replace(NOISE, mask_counts=kind, block_size_tokens=8, time_per="block")
    scored = torch.rand(500, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    scored[0, :8] = False
    noisy = corrupt(dataclasses.replace(batch_of(range(500)), scored=scored), noise, seed=3)
    masked = noisy.noisy == noise.mask_token_id
    assert not (masked & ~scored).any()
    counts, of = (each.unflatten(1, (-1, 8)).sum(-1) for each in (masked, scored))
    low = 1 if kind == "at_least_one" else 0
    expected = noisy.times * of
    near = (counts == expected.floor().clamp(min=low)) | (counts == expected.ceil().clamp(min=low))
    assert (near | (of == 0)).all() and not counts[of == 0].any()
    assert kind == "exact" or (counts[of > 0] >= 1).all()


def test_later_tokens_of_a_block_are_masked_more_often():
    """With one mask in a block, token i has it with probability exp(b (1 - t) i) over their sum."""
    level, bias = 0.125, 0.4
    noise = dataclasses.replace(
        NOISE, time_min=level, time_max=level, mask_counts="exact", late_bias=bias, block_size_tokens=8
    )
    noisy = corrupt(batch_of(range(5000)), noise, seed=3)
    masked = (noisy.noisy == noise.mask_token_id).unflatten(1, (-1, 8))
    assert (masked.sum(-1) == 1).all()
    expected = torch.softmax(bias * (1 - level) * torch.arange(8).double(), dim=0)
    torch.testing.assert_close(masked.double().mean((0, 1)), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("counts", ["random", "exact"])
def test_the_second_draw_of_a_pair_follows_from_the_first(counts):
    base = dataclasses.replace(NOISE, draws_per_context=4, time_per="block", mask_counts=counts, time_min=1e-9)

    def of(kind):
        noisy = corrupt(batch_of(range(400)), dataclasses.replace(base, paired_draws=kind), seed=3)
        return (noisy.noisy == base.mask_token_id).chunk(4), noisy.times.chunk(4)

    free, free_times = of("independent")
    mirrored, times = of("mirrored")
    assert torch.equal(mirrored[0], free[0]) and torch.equal(mirrored[2], free[2]) and not torch.equal(*mirrored[::2])
    assert torch.equal(times[0], times[1]) and torch.equal(times[0], free_times[0])
    # Two masks of level t have as little in common as they can: max(0, 2 t - 1).
    level = times[0].repeat_interleave(base.block_size_tokens, dim=1)
    common = (mirrored[0] & mirrored[1]).double().mean()
    torch.testing.assert_close(common, (2 * level - 1).clamp(min=0).double().mean(), atol=0.02, rtol=0)
    assert common < level.double().square().mean() - 0.05, "less than of independent masks of one level"
    complementary, times = of("complementary")
    assert torch.equal(complementary[0], free[0])
    torch.testing.assert_close(times[0] + times[1], torch.ones_like(times[0]))
    assert (complementary[0] ^ complementary[1]).double().mean() > 0.999


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
@pytest.mark.parametrize("counts", ["random", "at_least_one"])
def test_only_scored_positions_are_masked_and_the_others_stand_clean(time_per, sampling, weighting, draws, counts):
    scored = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    padding = torch.zeros(6, 16, dtype=torch.bool)
    padding[:, 13:] = True
    scored, scored[3] = scored & ~padding, False
    noise = NoiseConfig(
        block_size_tokens=4,
        time_per=time_per,
        time_sampling=sampling,
        weighting=weighting,
        draws_per_context=draws,
        mask_counts=counts,
    )
    batch = dataclasses.replace(batch_of(range(6)), padding=padding, scored=scored)
    noisy, everything = corrupt(batch, noise, seed=3), corrupt(batch_of(range(6)), noise, seed=3)
    masked = noisy.noisy == noise.mask_token_id
    assert not (masked & ~scored.repeat(draws, 1)).any()
    if counts == "random":  # the noise itself is that of the whole sequence
        assert torch.equal(masked, (everything.noisy == noise.mask_token_id) & scored.repeat(draws, 1))
    assert torch.equal(noisy.times, everything.times)
    assert torch.equal(noisy.noisy[~masked], batch.tokens.repeat(draws, 1)[~masked])
    assert torch.equal(noisy.scored_positions[: int(noisy.num_scored)], masked.flatten().nonzero().squeeze(-1))
    assert int(noisy.num_scored) == int(masked.sum()) and int(noisy.num_tokens) == int(scored.sum()) * draws
    counted = scored.repeat(draws, 1) if weighting == "elbo" else masked
    assert torch.equal(noisy.sequence_weights, counted.sum(1).float()) and noisy.sequence_weights[3] == 0
