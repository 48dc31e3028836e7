"""Likelihoods, against direct computations on small models."""

import itertools
import math

import pytest
import torch

from helpers.modeling import MASK, random_ids, tiny_model
from helpers.scores import cross_entropy, exact_score
from megatron_twotower.common.errors import UserError
from megatron_twotower.evaluate import likelihood
from megatron_twotower.evaluate.likelihood import (
    ar_nats,
    ar_scores,
    bound_nats,
    bound_scores,
    by_position,
    estimate,
    masked_loss_by_noise,
    masks_by_count,
    mock_ar_scores,
    ratio,
)


def estimate_bound(model, ids, **settings):
    return estimate(bound_nats(model, ids, **settings))


def test_a_ratio_of_sums_has_the_error_of_its_sequences():
    sums = torch.tensor([3.0, 5.0, 10.0], dtype=torch.float64)
    mean, stderr, tokens = ratio(sums, torch.tensor([2, 2, 2]))
    assert (mean, tokens) == (3.0, 6)
    assert stderr == pytest.approx(float((sums / 2).std() / 3**0.5))
    # Of unequal counts: no error where every sequence has the same mean, whatever its length.
    mean, stderr, tokens = ratio(torch.tensor([2.0, 8.0]), torch.tensor([1, 4]))
    assert (mean, stderr, tokens) == (2.0, 0.0, 5)
    assert ratio(torch.zeros(2), torch.zeros(2)) == (None, None, 0)


def test_the_error_of_a_ratio_is_its_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (2000, 40), generator=generator)
    sums = counts * (1 + torch.randn(2000, 40, generator=generator).double() * 0.3)
    found = [ratio(s, c) for s, c in zip(sums, counts, strict=True)]
    scatter = torch.tensor([mean for mean, _, _ in found]).std()
    assert float(torch.tensor([stderr for _, stderr, _ in found]).mean()) == pytest.approx(float(scatter), rel=0.06)


def test_positions_are_those_of_blocks():
    nats = torch.arange(12.0).view(1, 12).repeat(2, 1) + torch.tensor([[0.0], [2.0]])
    found = by_position(nats, 4)
    assert [each.nats_per_token for each in found] == [5.0, 6.0, 7.0, 8.0]
    assert {each.tokens for each in found} == {6} and {each.stderr for each in found} == {1.0}


def test_ar_loss_is_that_of_the_context_tower(monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_ROWS", 2)
    model, ids = tiny_model(), random_ids(5, 12)
    with torch.no_grad():
        logits = model(ids).logits
    for start in (1, 4):
        nats = torch.tensor([[cross_entropy(logits[i, j - 1], ids[i, j]) for j in range(start, 12)] for i in range(5)])
        found = estimate(ar_nats(model, ids)[:, start - 1 :])
        assert found.nats_per_token == pytest.approx(float(nats.mean()))
        assert found.stderr == pytest.approx(float(nats.mean(1).std() / 5**0.5))
        assert found.tokens == 5 * (12 - start)


def test_masked_loss_is_the_denoiser_s_at_masked_positions(monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_ROWS", 2)
    model, ids, levels = tiny_model(), random_ids(3, 12), (0.0, 0.3, 0.7, 1.0)
    found = masked_loss_by_noise(model, ids, block_size=4, levels=levels, seed=5, mask_id=MASK)
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5))
    for entry, level in zip(found, levels, strict=True):
        nats = []
        for row, block in itertools.product(range(3), range(1, 3)):
            columns = slice(4 * block, 4 * block + 4)
            clean, masked = ids[row : row + 1, columns], uniform[row, columns] < level
            cache = model.prefill(ids[row : row + 1, : 4 * block])
            logits = model.denoise_block(clean.masked_fill(masked, MASK), torch.tensor([level]), cache)[0]
            nats += [cross_entropy(logits[j], clean[0, j]) for j in range(4) if masked[j]]
        assert entry["t"] == level
        assert entry["count"] == len(nats)
        assert entry["loss"] == (pytest.approx(sum(nats) / len(nats)) if nats else None)
    assert [entry["count"] for entry in found][::3] == [0, 24]
    assert 0 < found[1]["count"] < found[2]["count"] < 24


def exact_bound(model, ids, block):
    """The bound of later blocks: sum over masks of (k - 1)! (s - k)! / s! x masked nats."""
    total = 0.0
    for row, start in itertools.product(range(len(ids)), range(block, ids.shape[1], block)):
        clean = ids[row : row + 1, start : start + block]
        cache = model.prefill(ids[row : row + 1, :start])
        for bits in itertools.product([False, True], repeat=block):
            masked, k = torch.tensor(bits), sum(bits)
            if k:
                logits = model.denoise_block(clean.masked_fill(masked, MASK), torch.tensor([k / block]), cache)[0]
                nats = sum(cross_entropy(logits[j], clean[0, j]) for j in range(block) if bits[j])
                total += nats * math.factorial(k - 1) * math.factorial(block - k) / math.factorial(block)
    return total / (len(ids) * (ids.shape[1] - block))


def test_the_bound_is_the_sum_over_all_masks():
    model, ids = tiny_model(), random_ids(2, 12)
    found = estimate_bound(model, ids.repeat(50, 1), block_size=4, draws=20, seed=0, mask_id=MASK)
    assert found.tokens == 2 * 50 * 8
    assert found.nats_per_token == pytest.approx(exact_bound(model, ids, 4), rel=0.02)


def masks_by_time(u, noise):
    """Mask each token with probability t, uniform, weight 1 / t (MDLM; BD3-LM, section 3)."""
    t = 1 - u * (1 - 1e-3)
    return noise < t.unsqueeze(-1), t, 1 / t


@pytest.mark.parametrize(("draw_masks", "tolerance"), [(masks_by_count, 0.01), (masks_by_time, 0.04)])
def test_noise_by_count_and_by_time_estimate_the_same_bound(draw_masks, tolerance, monkeypatch):
    """They agree if the denoiser ignores t: then the integral over t can be computed exactly."""
    monkeypatch.setattr(likelihood, "masks_by_count", draw_masks)
    model, ids = tiny_model("M*"), random_ids(2, 12)
    with torch.no_grad():
        model.t_block[1].weight.zero_()
    found = estimate_bound(model, ids.repeat(80, 1), block_size=4, draws=25, seed=0, mask_id=MASK)
    assert found.nats_per_token == pytest.approx(exact_bound(model, ids, 4), rel=tolerance)


def test_a_uniform_denoiser_has_the_bound_of_its_vocabulary_without_error():
    model, ids = tiny_model(), random_ids(3, 12)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = estimate_bound(model, ids, block_size=4, draws=1, seed=0, mask_id=MASK)
    assert found.nats_per_token == pytest.approx(math.log(model.config.vocab_size))
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("draw_masks", [masks_by_count, masks_by_time])
def test_weights_make_every_position_count_once_on_average(draw_masks):
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    masked, t, weight = draw_masks(u, torch.rand(20000, 8, generator=torch.Generator().manual_seed(0)))
    counted = (weight.unsqueeze(-1) * masked).mean(0)
    torch.testing.assert_close(counted, torch.ones(8, dtype=torch.float64), atol=0.1, rtol=0)
    assert t.min() > 0 and t.max() <= 1
    if draw_masks is masks_by_count:
        torch.testing.assert_close(masked.double().mean(-1), t)
        assert set(masked.sum(-1).tolist()) == set(range(1, 9))


@pytest.mark.parametrize("shape", [(1, 16), (4, 8), (4, 18)])
def test_sequences_must_be_whole_blocks(shape):
    with pytest.raises(UserError, match="expected"):
        bound_nats(tiny_model("M"), random_ids(*shape), block_size=8, draws=1, seed=0, mask_id=MASK)


def test_masked_loss_by_position_sums_to_that_by_noise():
    model, ids = tiny_model(), random_ids(4, 24)
    for entry in masked_loss_by_noise(model, ids, block_size=4, levels=(0.2, 0.9), seed=1, mask_id=MASK):
        cells = entry["by_position"]
        assert len(cells) == 4 and sum(cell["count"] for cell in cells) == entry["count"]
        total = sum(cell["loss"] * cell["count"] for cell in cells)
        assert total / entry["count"] == pytest.approx(entry["loss"])
        assert len({round(cell["loss"], 6) for cell in cells}) == 4
        assert all(cell["stderr"] > 0 for cell in cells if cell["count"] > 2)


# --- continuations ---


def padded(rows, fill=0):
    length = max(map(len, rows))
    ids = torch.tensor([[fill] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


CONTEXTS, CONTINUATIONS = ([5, 9, 17, 4, 6], [8, 21], [11, 30, 7]), ([7, 8, 9], [12], [4, 40])


def right(rows, fill=1):
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


def test_ar_scores_of_a_padded_batch_are_those_of_each_text_alone():
    model = tiny_model()
    ids, lengths = right(CONTINUATIONS)
    scores, greedy = ar_scores(model, model.prefill(*padded(CONTEXTS)), ids)
    for i, (context, continuation) in enumerate(zip(CONTEXTS, CONTINUATIONS, strict=True)):
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        for j in range(lengths[i]):
            assert float(scores[i, j]) == pytest.approx(-cross_entropy(logits[j], continuation[j]))
            assert bool(greedy[i, j]) == (int(logits[j].argmax()) == continuation[j])
    best = model(torch.tensor([CONTEXTS[0]])).logits[0, -1].argmax()
    assert ar_scores(model, model.prefill(torch.tensor([CONTEXTS[0]])), best.view(1, 1))[1].item()


def test_mock_ar_scores_are_the_denoiser_s_token_by_token():
    model = tiny_model()
    ids, lengths = right(CONTINUATIONS)
    contexts, mask = padded(CONTEXTS)
    scores, _ = mock_ar_scores(model, model.prefill(contexts[:, :-1], mask[:, :-1]), contexts[:, -1:], ids)
    for i, (context, continuation) in enumerate(zip(CONTEXTS, CONTINUATIONS, strict=True)):
        text = context + continuation
        for j in range(lengths[i]):
            last = len(context) + j - 1
            logits = model.denoise_block(torch.tensor([[text[last]]]), None, model.prefill(torch.tensor([text[:last]])))
            assert float(scores[i, j]) == pytest.approx(-cross_entropy(logits[0, 0], continuation[j]))


def test_bound_scores_are_the_sum_over_all_masks_of_the_text():
    model, continuations = tiny_model(), ([7, 8, 9, 30, 31, 4], [12], [4, 40])
    ids, lengths = right(continuations)
    found = bound_scores(
        model, model.prefill(*padded(CONTEXTS)), ids, lengths, block_size=4, draws=300, seed=0, mask_id=MASK
    )
    for i, (context, continuation) in enumerate(zip(CONTEXTS, continuations, strict=True)):
        exact = exact_score(model, context, continuation, 4)
        assert float(found[i]) == pytest.approx(exact, rel=1e-6 if len(continuation) == 1 else 0.05)


def test_bound_scores_do_not_depend_on_the_batch():
    model, continuations = tiny_model(), ([7, 8, 9, 30, 31, 4], [12], [4, 40])
    settings = {"block_size": 4, "draws": 3, "seed": 0, "mask_id": MASK}
    together = bound_scores(model, model.prefill(*padded(CONTEXTS)), *right(continuations), **settings)
    for i, (context, continuation) in enumerate(zip(CONTEXTS, continuations, strict=True)):
        alone = bound_scores(model, model.prefill(torch.tensor([context])), *right([continuation]), **settings)
        assert float(together[i]) == pytest.approx(float(alone[0]))
