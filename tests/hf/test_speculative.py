"""Speculative generation: the denoiser drafts, and the context tower alone decides the text."""

import pytest
import torch

from helpers.modeling import PATTERNS, random_ids, tiny_model
from megatron_twotower.hf.modeling_nemotron_h_twotower import ArgumentError, ContextCache, Sampling


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_text_is_that_of_ar(pattern, seed):
    """In float32, as the towers are used; rows accept different numbers of tokens."""
    model, ids = tiny_model(pattern, seed=seed, dtype=torch.float32), random_ids(4, 5, seed=seed)
    expected = model.generate_ar(ids, 40)
    for block_size, draft_steps in ((16, 1), (5, 3), (2, 1)):
        found = model.generate_speculative(ids, 40, block_size, draft_steps)
        assert torch.equal(found, expected)
        stats = model.last_generation
        assert stats.draft_passes == stats.passes * draft_steps
        assert stats.new_tokens == 160 <= stats.accepted + stats.row_passes


@pytest.mark.parametrize("new", [1, 2, 17])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_any_prompt_and_number_of_tokens(length, new):
    model, ids = tiny_model(), random_ids(3, length)
    assert torch.equal(model.generate_speculative(ids, new), model.generate_ar(ids, new))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_drafts_that_are_often_right(pattern):
    """Drafts are mostly the text of AR: many tokens are accepted, a different number per row."""
    model, ids = tiny_model(pattern, dtype=torch.float32), random_ids(4, 3)
    expected = model.generate_ar(ids, 48)
    accepted = set()

    def draft(cache, last, block_size, steps, mask_token_id, sampling):
        """The text of AR, with errors at chosen places."""
        columns = cache.ends if cache.ends is not None else torch.full((4,), cache.length)
        whole = torch.cat([expected, torch.zeros(4, block_size, dtype=torch.int64)], dim=1)
        at = (columns.unsqueeze(-1) + 1 + torch.arange(block_size - 1)).clamp(max=whole.shape[1] - 1)
        ids = whole.gather(1, at)
        wrong = (at + torch.arange(4).unsqueeze(-1)) % 7 == 0
        return torch.where(wrong, (ids + 1) % 48, ids), torch.zeros(4, block_size - 1, 48)

    model._draft = draft
    assert torch.equal(
        model.generate_speculative(ids, 48, 8, on_tokens=lambda _, new: accepted.update(new.sum(-1).tolist())), expected
    )
    assert len(accepted) > 3
    assert model.last_generation.passes < 24


@pytest.mark.parametrize("pattern", PATTERNS)
def test_settled_states_are_those_of_reading_no_more(pattern):
    """Verify and settle at different positions per row; the states equal those of a plain read."""
    model, ids, t = tiny_model(pattern), random_ids(3, 40), torch.tensor([0.3, 0.6, 1.0])
    block = random_ids(3, 4, seed=5)
    copied = ContextCache(model.context_tower.states(), model.context_tower.states())  # as on two devices
    for cache in (model.prefill(ids[:, :3]), model.extend(copied, ids[:, :3])):
        ends = torch.full((3,), 3)
        for counts in ((12, 0, 5), (1, 9, 7), (0, 4, 1), (11, 11, 11)):
            columns = (ends.unsqueeze(-1) + torch.arange(12)).clamp(max=39)
            logits = model.verify(cache, ids.gather(1, columns))
            with torch.no_grad():
                expected = model(ids).logits
            for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
                torch.testing.assert_close(logits[row, :count], expected[row, end : end + count])
            model.settle(cache, torch.tensor(counts), 12)
            ends = ends + torch.tensor(counts)
            found = model.denoise_block(block, t, cache)
            for row, end in enumerate(ends.tolist()):
                alone = model.denoise_block(
                    block[row : row + 1], t[row : row + 1], model.prefill(ids[row : row + 1, :end])
                )
                torch.testing.assert_close(found[row], alone[0])
    assert ends.tolist() == [27, 27, 27]
    assert cache.ends is None
    assert cache.length == 27


def test_rows_end_by_themselves():
    model, ids = tiny_model(), random_ids(4, 6)
    full = model.generate_ar(ids, 32)[:, 6:]
    for place in (0, 3, 10):
        eos = int(full[0, place])
        expected = model.generate_ar(ids, 32, eos_token_id=eos)
        new_tokens = model.last_generation.new_tokens
        assert torch.equal(model.generate_speculative(ids, 32, eos_token_id=eos), expected)
        assert model.last_generation.new_tokens == new_tokens


def total_variation(found, expected):
    return 0.5 * float((found - expected).abs().sum())


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"temperature": 1.0}, marks=pytest.mark.slow),
        {"temperature": 0.7, "draft_steps": 2},
        pytest.param({"temperature": 1.3, "top_k": 4}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.5, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_sampled_text_is_distributed_as_that_of_ar(settings):
    """The first three tokens of 20,000 rows against the exact probabilities of all 6^3 texts."""
    rows, words = 20_000, 6
    model = tiny_model("M*", dtype=torch.float32, vocab_size=words)
    with torch.no_grad():
        for head in (model.context_lm_head, model.lm_head):
            head.weight.mul_(0.7)
    prompt = torch.tensor([[4, 5, 1]])
    sampling = Sampling(settings["temperature"], settings.get("top_k"), None, settings.get("top_p"))
    texts = torch.cartesian_prod(*[torch.arange(words)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], dim=1)).logits[:, 2:5]
    each = sampling.scores(logits).softmax(-1).gather(-1, texts.unsqueeze(-1)).squeeze(-1)
    expected = each.prod(-1).double()
    generator = torch.Generator().manual_seed(0)
    written = model.generate_speculative(
        prompt.expand(rows, -1), 3, 4, mask_token_id=0, generator=generator, **settings
    )
    codes = (written[:, 3:] * torch.tensor([words**2, words, 1])).sum(-1)
    found = torch.bincount(codes, minlength=words**3).double()
    assert not found[expected == 0].any()
    # Pearson's statistic over the texts that are expected five times or more: its mean is the
    # degrees of freedom, k, its standard deviation sqrt(2 k).
    often = expected * rows >= 5
    statistic = ((found - expected * rows) ** 2 / (expected * rows))[often].sum()
    freedom = int(often.sum()) - 1
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    stats = model.last_generation
    assert 0.05 < stats.accepted / (3 * stats.row_passes) < 0.95  # the rule was put to use, both ways


def test_the_rule_accepts_as_often_as_the_distributions_overlap():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, 1, 8, generator=generator).expand(50_000, -1, -1) for _ in range(2))
    sampling = Sampling(1.0, None, generator)
    accepted, following = sampling.accept(sampling.choose(q), q, torch.cat([p, p], dim=1))
    overlap = float(torch.minimum(p[0, 0].softmax(-1), q[0, 0].softmax(-1)).sum())
    assert abs(float(accepted.float().mean()) - overlap) < 0.01
    after = torch.bincount(following[accepted == 1], minlength=8) / int(accepted.sum())
    assert total_variation(after, p[0, 0].softmax(-1)) < 0.02


def test_a_draft_from_the_same_distribution_always_stays():
    p = torch.randn(1000, 1, 8, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(0.8, 3, torch.Generator().manual_seed(0))
    assert (sampling.accept(sampling.choose(p), p, torch.cat([p, p], dim=1))[0] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block_size: found 1, expected at least 2"),
        ({"draft_steps": 0}, "draft_steps: found 0, expected 1 to block_size - 1, 15"),
        ({"draft_steps": 16}, "draft_steps: found 16"),
        ({"mask_token_id": -1}, "mask_token_id: found -1"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_model().generate_speculative(random_ids(1, 4), **changes)
