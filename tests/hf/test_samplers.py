"""Samplers of mask diffusion: expected commits are computed in plain Python, row by row."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from helpers.modeling import MASK, PATTERNS, TYPICAL_SAMPLERS, VOCABULARY, random_ids, tiny_model
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    SAMPLERS,
    ArgumentError,
    BlockView,
    ByPosition,
    ByStep,
    Credit,
    EarlyEnd,
    EntropyBound,
    Factor,
    Klass,
    Prefix,
    Routed,
    Sampler,
    Sampling,
    Threshold,
    chosen_sampler,
    positions_to_commit,
    read_sampler,
)

ROWS, SIZE, TOKENS = 5, 6, 4


def test_every_sampler_is_tried():
    assert [text.split(":")[0] for text in TYPICAL_SAMPLERS] == list(SAMPLERS)


# --- one pass, with given probabilities ---


def random_pass(seed, rows=ROWS, size=SIZE):
    """Probabilities (b, s, v), of which some are sure, and the masked positions (b, s)."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(rows, size, 1, generator=generator, dtype=torch.float64) * 8
    probabilities = (torch.randn(rows, size, TOKENS, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)
    masked = torch.rand(rows, size, generator=generator) < 0.7
    masked[-1] = False  # a row that has ended
    masked[-2] = True
    return probabilities, masked


def seen(probabilities, masked, step=0):
    """The view of a block, and the confidences of greedy predictions."""
    places = masked.flatten().nonzero().squeeze(-1)
    view = BlockView(masked, places, probabilities.log().flatten(0, 1)[places], step)
    return view, probabilities.amax(-1).masked_fill(~masked, 0.0)


def committed(sampler, passes, masked):
    """What a sampler wants in each of some passes over the same masked positions, as lists."""
    history, found = None, []
    for step, probabilities in enumerate(passes):
        view, _ = seen(probabilities, masked, step)
        logits, history = sampler.observe(view, history)
        confidence = view.over_block(logits.softmax(-1).amax(-1))
        found.append(sampler.commit(dataclasses.replace(view, logits=logits), confidence, history).tolist())
    return found


def entropy(distribution):
    return -sum(p * math.log(p) for p in distribution if p > 0)


def divergence(now, before):
    return sum(p * math.log(p / q) for p, q in zip(now, before, strict=True) if p > 0)


def softmax(logits):
    whole = sum(map(math.exp, logits))
    return [math.exp(x) / whole for x in logits]


def expected_factor(factor, passes, masked):
    (row,) = passes
    ranked = sorted((j for j, is_masked in enumerate(masked) if is_masked), key=lambda j: -max(row[j]))
    counts = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - max(row[ranked[n - 1]])) < factor]
    return set(ranked[: max(counts, default=0)])


def expected_entropy_bound(bound, passes, masked):
    (row,) = passes
    ranked = sorted((j for j, is_masked in enumerate(masked) if is_masked), key=lambda j: entropy(row[j]))
    best = set()
    for n in range(1, len(ranked) + 1):
        chosen = [entropy(row[j]) for j in ranked[:n]]
        if sum(chosen) - max(chosen) <= bound:
            best = set(ranked[:n])
    return best


def expected_klass(threshold, most, count, passes, masked):
    found = set()
    for j, is_masked in enumerate(masked):
        steps = [divergence(now[j], before[j]) < most for before, now in itertools.pairwise(passes)]
        stable = len(list(itertools.takewhile(bool, reversed(steps))))
        if is_masked and max(passes[-1][j]) > threshold and stable >= count:
            found.add(j)
    return found


def expected_credit(threshold, weight, decay, power, passes, masked):
    found = set()
    for j, is_masked in enumerate(masked):
        credit = [0.0] * TOKENS
        for row in passes:
            best = max(range(TOKENS), key=lambda token, row=row: row[j][token])
            credit = [decay * each for each in credit]
            credit[best] += row[j][best] ** power
        fused = softmax([math.log(p) + weight * math.log(1 + c) for p, c in zip(passes[-1][j], credit, strict=True)])
        if is_masked and max(fused) > threshold:
            found.add(j)
    return found


def expected_prefix(threshold, passes, masked):
    places = [j for j, is_masked in enumerate(masked) if is_masked]
    return {*itertools.takewhile(lambda j: max(passes[-1][j]) > threshold, places), *places[:1]}


def expected_early_end(threshold, count, passes, masked):
    places = [j for j, is_masked in enumerate(masked) if is_masked]
    best = [[max(range(TOKENS), key=lambda token, row=row, j=j: row[j][token]) for j in places] for row in passes]
    same = len(list(itertools.takewhile(lambda tokens: tokens == best[-1], reversed(best))))
    return {j for j in places if same >= count or max(passes[-1][j]) > threshold}


def expected_by_position(first, last, passes, masked):
    places = [j for j, is_masked in enumerate(masked) if is_masked]
    return {j for m, j in enumerate(places) if max(passes[-1][j]) > first + (last - first) * m / (SIZE - 1)}


def expected_by_step(first, last, count, passes, masked):
    threshold = first + (last - first) * min((len(passes) - 1) / count, 1)
    return {j for j, is_masked in enumerate(masked) if is_masked and max(passes[-1][j]) > threshold}


def expected_threshold(threshold, passes, masked):
    return {j for j, is_masked in enumerate(masked) if is_masked and max(passes[-1][j]) > threshold}


CASES = [
    (Threshold, expected_threshold, ((0.9,), (0.5,)), 1),
    (Factor, expected_factor, ((0.6,), (1.0,), (3.0,)), 1),
    (EntropyBound, expected_entropy_bound, ((0.0,), (0.3,), (1.0,), (9.0,)), 1),
    (Klass, expected_klass, ((0.6, 0.3, 1), (0.6, 0.3, 2), (0.3, 2.0, 1)), 4),
    (Credit, expected_credit, ((0.8, 0.7, 0.8, 0.2), (0.9, 2.0, 0.5, 1.0)), 4),
    (Prefix, expected_prefix, ((0.5,), (0.9,), (0.0,)), 1),
    (EarlyEnd, expected_early_end, ((0.9, 2), (0.95, 3), (0.5, 1)), 4),
    (ByPosition, expected_by_position, ((0.4, 0.95), (0.95, 0.4)), 1),
    (ByStep, expected_by_step, ((0.95, 0.4, 2), (0.4, 0.95, 3)), 4),
    (Routed, lambda threshold, _, *block: expected_threshold(threshold, *block), ((0.7, 2.0),), 1),
]


def similar_passes(seed, count):
    """Passes that differ little, so that some positions are stable."""
    (first, masked), generator = random_pass(seed), torch.Generator().manual_seed(seed + 1000)
    noise = torch.randn(count, ROWS, SIZE, TOKENS, generator=generator, dtype=torch.float64)
    return [(first.log() + 0.5 * each).softmax(-1) for each in noise], masked


@pytest.mark.parametrize(("kind", "expected", "settings", "count"), CASES, ids=[case[0].__name__ for case in CASES])
def test_commits_are_those_of_the_rule(kind, expected, settings, count):
    sizes = set()
    for numbers, seed in itertools.product(settings, range(30)):
        passes, masked = similar_passes(seed, count)
        for step, wanted in enumerate(committed(kind(*numbers), passes, masked)):
            for row in range(ROWS):
                seen_by_row = [each[row].tolist() for each in passes[: step + 1]]
                want = expected(*numbers, seen_by_row if count > 1 else seen_by_row[-1:], masked[row].tolist())
                assert {j for j, is_wanted in enumerate(wanted[row]) if is_wanted} == want
                sizes.add(len(want))
    assert len(sizes) > 2  # the cases are not all alike


def test_a_block_of_the_entropy_bound_cannot_be_larger():
    """The next position would exceed the bound, and none of the others has less entropy."""
    for seed in range(20):
        probabilities, masked = random_pass(seed)
        view, confidence = seen(probabilities, masked)
        wanted = EntropyBound(0.5).commit(view, confidence, None)
        found = view.entropy()
        for row in range(ROWS):
            inside, outside = found[row][wanted[row]], found[row][masked[row] & ~wanted[row]]
            assert inside.sum() - inside.max() <= 0.5 if len(inside) else not masked[row].any()
            if len(outside):
                assert outside.min() >= inside.max() and inside.sum() > 0.5


def test_expected_tokens_of_a_verification():
    """By all outcomes: every prediction is accepted with its confidence, until one is not."""
    for seed in range(20):
        probabilities, masked = random_pass(seed)
        view, confidence = seen(probabilities, masked)
        for row in range(ROWS):
            chances, want = confidence[row][masked[row]].tolist(), 0.0
            for accepted in itertools.product((True, False), repeat=len(chances)):
                chance = math.prod(c if ok else 1 - c for c, ok in zip(chances, accepted, strict=True))
                want += chance * min(len(list(itertools.takewhile(bool, accepted))) + 1, len(chances))
            committed = masked.clone()
            committed[row] = False
            committed[row, :2] = True
            for ratio, asks in ((want / 2 - 1e-5, bool(chances)), (want / 2 + 1e-5, False)):
                assert bool(Routed(0.9, max(ratio, 0.0)).asks(view, confidence, committed)[row]) == asks


# --- at least one, and the released rule ---


def released_rule(masked, confidence, *, threshold, steps_left):
    """The released rule: the most confident, as many as the largest of three numbers."""
    above = (masked & (confidence > threshold)).sum(-1)
    share = (masked.sum(-1) + steps_left - 1) // steps_left
    count = torch.maximum(above, share).clamp(min=1)
    order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(masked.shape[1], device=masked.device) < count.unsqueeze(-1)
    return masked & torch.empty_like(masked).scatter_(1, order, first)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_the_released_rule_is_unchanged(threshold):
    generator = torch.Generator().manual_seed(0)
    for steps_left in (1, 2, 3, 7, 16):
        confidence = (torch.rand(400, 16, generator=generator) * 20).round() / 20  # with many ties
        masked = torch.rand(400, 16, generator=generator) < torch.rand(400, 1, generator=generator)
        confidence = confidence.masked_fill(~masked, 0.0)
        wanted = Threshold(threshold).commit(BlockView(masked, None, None, 0), confidence, None)
        found = positions_to_commit(masked, confidence, wanted, steps_left=steps_left)
        assert torch.equal(found, released_rule(masked, confidence, threshold=threshold, steps_left=steps_left))


def test_too_few_wanted_positions_are_completed_by_the_most_confident():
    confidence = torch.tensor([[0.9, 0.2, 0.8, 0.5]]).expand(3, -1)
    masked = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    wanted = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)  # some are not masked
    many = positions_to_commit(masked, confidence, wanted, steps_left=16)
    assert many.long().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    half = positions_to_commit(masked, confidence, wanted, steps_left=2)
    assert half.long().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]


# --- a scripted model ---


def scripted(script):
    """A model whose pass n over a block gives the probabilities `script[n]` (b, s, v)."""
    model, numbers = tiny_model(), itertools.count()

    def denoise_hidden(ids, modulations, cache, experts):
        given = script[next(numbers)].log()
        padded = torch.full((*given.shape[:2], VOCABULARY), -math.inf, dtype=given.dtype)
        padded[..., 10 : 10 + TOKENS] = given
        return padded

    model.denoise_hidden, model.lm_head = denoise_hidden, nn.Identity()
    return model


def table(*rows):
    """Probabilities (1, s, v): token 0 has the given one, the others share the rest."""
    return torch.tensor([[[p, *[(1 - p) / (TOKENS - 1)] * (TOKENS - 1)] for p in rows]], dtype=torch.float64)


SCRIPTS = {
    # Confidences of each pass, and the positions that it commits.
    "factor:1.2": [([0.9, 0.5, 0.8, 0.7], {0, 2}), ([0.0, 0.9, 0.0, 0.3], {1}), ([0.0, 0.0, 0.0, 0.4], {3})],
    "prefix:0.6": [([0.7, 0.5, 0.9, 0.9], {0}), ([0.0, 0.5, 0.9, 0.4], {1}), ([0.0, 0.0, 0.9, 0.8], {2, 3})],
    "by_position:0.4,1.0": [([0.45, 0.55, 0.9, 0.9], {0, 2}), ([0.0, 0.5, 0.0, 0.5], {1}), ([0, 0, 0, 0.5], {3})],
    "by_step:0.8,0.4,2": [([0.9, 0.7, 0.5, 0.3], {0}), ([0.0, 0.7, 0.5, 0.3], {1}), ([0, 0, 0.5, 0.45], {2, 3})],
    "early_end:0.8,2": [([0.9, 0.5, 0.4, 0.3], {0}), ([0.0, 0.5, 0.45, 0.3], {1, 2, 3})],
    # Position 3 changes in the second pass and stands still in the third one.
    "klass:0.5,0.05,1": [([0.9, 0.8, 0.7, 0.4], {0}), ([0, 0.82, 0.72, 0.9], {1, 2}), ([0, 0, 0, 0.9], {3})],
    # 0.8 grows to 0.87 at once, and 0.6 by what two passes have added to it.
    "credit:0.85,0.7,1.0,0.2": [([0.8, 0.6, 0.6, 0.5], {0}), ([0, 0.76, 0.6, 0.5], {1}), ([0, 0, 0.9, 0.5], {2})],
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_blocks_of_a_scripted_model(text):
    steps = []
    passes, places = zip(*SCRIPTS[text], strict=True)
    extra = [passes[-1]] * 2  # what is left is committed one by one
    model = scripted([table(*each) for each in [*passes, *extra]])
    written = model.generate_mask_diffusion(random_ids(1, 3), 4, 4, sampler=text, on_step=steps.append)
    found = [set(step.committed[0].nonzero().flatten().tolist()) for step in steps]
    assert found[: len(places)] == list(places)
    assert written[0, 3:].tolist() == [10] * 4  # token 0 of the script


def test_early_end_needs_the_same_tokens_at_all_positions():
    other = table(0.5, 0.5, 0.5).flip(-1)
    passes = [table(0.5, 0.5, 0.5), torch.cat([table(0.5, 0.5, 0.5)[:, :2], other[:, 2:]], dim=1)] * 3
    steps = []
    scripted(passes).generate_mask_diffusion(random_ids(1, 3), 3, 3, sampler="early_end:0.9,2", on_step=steps.append)
    # The last position changes from pass to pass, until it is the only one and committed as such.
    assert [int(step.committed.sum()) for step in steps] == [1, 1, 1]


# --- whole texts ---


def steps_of(model, ids, new=32, **settings):
    steps = []
    return model.generate_mask_diffusion(ids, new, 8, on_step=steps.append, **settings), steps


@pytest.mark.parametrize(
    "text",
    ["klass:0.3,inf,0", "credit:0.3,0", "early_end:0.3,99", "by_position:0.3,0.3", "by_step:0.3,0.3", "routed:0.3,inf"],
)
def test_samplers_that_are_the_released_rule(text):
    model, ids = tiny_model(), random_ids(3, 7)
    expected = model.generate_mask_diffusion(ids, 32, 8, confidence_threshold=0.3)
    passes = model.last_generation.passes
    assert torch.equal(model.generate_mask_diffusion(ids, 32, 8, sampler=text), expected)
    assert model.last_generation.passes == passes < 32


def test_extremes():
    model, ids = tiny_model(), random_ids(2, 7)
    most_confident = model.generate_mask_diffusion(ids, 24, 8, confidence_threshold=1.0)
    assert torch.equal(model.generate_mask_diffusion(ids, 24, 8, sampler="factor:0"), most_confident)
    assert model.last_generation.passes == 24
    at_once = model.generate_mask_diffusion(ids, 24, 8, confidence_threshold=0.0)
    for text in ("factor:inf", "entropy_bound:inf", "prefix:0", "early_end:1,1"):
        assert torch.equal(model.generate_mask_diffusion(ids, 24, 8, sampler=text), at_once)
        assert model.last_generation.passes == 3
    for text in ("entropy_bound:0", "prefix:1"):
        _, steps = steps_of(model, ids, 24, sampler=text)
        assert all((step.committed.sum(-1) == 1).all() for step in steps)
        if text == "prefix:1":
            assert all((step.committed[:, step.step]).all() for step in steps)


@pytest.mark.parametrize("text", TYPICAL_SAMPLERS)
def test_each_row_is_written_as_if_alone(text):
    model, ids = tiny_model(), random_ids(4, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    together, steps = steps_of(model, ids, sampler=text, attention_mask=mask)
    assert len({tuple(step.committed.sum(-1).tolist()) for step in steps}) > 2
    row_passes, alone = model.last_generation.row_passes, 0
    for row in range(4):
        prompt = ids[row : row + 1, 4 if row == 1 else 0 :]
        single = model.generate_mask_diffusion(prompt, 32, 8, sampler=text)
        assert torch.equal(single[0, -32:], together[row, -32:])
        alone += model.last_generation.row_passes
    assert alone == row_passes


@pytest.mark.parametrize("text", [*TYPICAL_SAMPLERS, "routed:1,0"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_step_commits_and_blocks_end_in_time(text, temperature):
    model, ids = tiny_model(), random_ids(3, 5)
    with torch.no_grad():
        model.lm_head.weight[MASK] *= 50  # models that would often choose the mask token
        model.context_lm_head.weight[MASK] *= 50
    generator = torch.Generator().manual_seed(0)
    settings = {"steps_per_block": 3, "temperature": temperature, "generator": generator}
    written, steps = steps_of(model, ids, 30, sampler=text, **settings)
    assert written.shape == (3, 35) and (written != MASK).all()
    left = torch.ones(3, 8, dtype=torch.bool)
    for number, step in enumerate(steps):
        left = torch.ones_like(left) if step.step == 0 else left
        assert not (step.committed & ~left).any() and (step.committed.any(-1) == left.any(-1)).all()
        left = left & ~step.committed
        if number + 1 == len(steps) or steps[number + 1].step == 0:
            assert step.step < 3 and not left.any()


def decisions(sampler):
    """All that a sampler decides about many blocks."""
    found = []
    for seed in range(30):
        passes, masked = similar_passes(seed, 4)
        view, confidence = seen(passes[0], masked)
        wanted = committed(sampler, passes, masked)
        found.append((wanted, sampler.asks(view, confidence, torch.tensor(wanted[0])).tolist()))
    return found


@pytest.mark.parametrize("text", TYPICAL_SAMPLERS)
def test_every_number_of_a_sampler_matters(text):
    other = {"threshold": 0.9, "passes": 3, "divergence": 0.01, "weight": 3.0, "decay": 0.1, "power": 3.0}
    other |= {"factor": 5.0, "bound": 0.1, "first": 0.9, "last": 0.9, "ratio": 0.0}
    # Of four tokens one has more than 0.3 nearly always.
    sampler = read_sampler(text.replace("credit:0.3", "credit:0.7"))
    for each in dataclasses.fields(sampler):
        changed = dataclasses.replace(sampler, **{each.name: other[each.name]})
        assert changed != sampler and decisions(changed) != decisions(sampler), each.name


class Rightmost(Sampler):
    """The masked position that is farthest to the right."""

    def commit(self, view, confidence, history):
        after = view.masked.flip(-1).cumsum(-1).flip(-1)
        return view.masked & (after == 1)


def test_a_sampler_of_ones_own():
    _, steps = steps_of(tiny_model(), random_ids(2, 4), 8, sampler=Rightmost())
    assert [step.committed.long().argmax(-1).tolist() for step in steps] == [[7 - n] * 2 for n in range(8)]


# --- verification by the context tower ---


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_verifying_always_gives_the_text_of_ar(pattern, seed):
    model, ids = tiny_model(pattern, seed=seed, dtype=torch.float32), random_ids(4, 5, seed=seed)
    # AR may choose the mask token, mask diffusion may not.
    is_mask = torch.arange(VOCABULARY) == MASK
    model.context_lm_head.register_forward_hook(lambda _, inputs, logits: logits.masked_fill(is_mask, -math.inf))
    expected = model.generate_ar(ids, 40)
    for size in (1, 5, 8):
        found = model.generate_mask_diffusion(ids, 40, size, sampler="routed:1,0")
        assert torch.equal(found, expected)
        stats = model.last_generation
        assert stats.passes == 2 * stats.verifications and stats.new_tokens == 160


def test_what_a_verification_decides():
    """Each is the tower's choice after the text on its left, and later ones stay open."""
    model, ids = tiny_model(), random_ids(4, 6)
    written, steps = steps_of(model, ids, 32, sampler="routed:0.5,1.6")
    stats, verified, others = model.last_generation, 0, 0
    assert 0 < stats.verifications < stats.passes // 2
    for step in steps:
        before = torch.where(step.committed, MASK, step.ids)
        masked = before == MASK
        text = torch.cat([written[:, : 6 + 8 * step.block], step.ids], dim=1)
        cache = model.prefill(written[:, : 6 + 8 * step.block])
        plain = model.denoise_block(before, masked.double().mean(-1), cache)
        plain[..., MASK] = -torch.inf
        confidence = plain.softmax(-1).amax(-1).masked_fill(~masked, 0.0)
        view, _ = seen(confidence.unsqueeze(-1), masked)
        sampler = Routed(0.5, 1.6)
        alone = positions_to_commit(masked, confidence, sampler.commit(view, confidence, None), steps_left=16)
        asks = sampler.asks(view, confidence, alone)
        logits = model(text).logits
        logits[..., MASK] = -torch.inf
        for row in range(4):
            places = step.committed[row].nonzero().flatten().tolist()
            if not asks[row]:
                assert places == alone[row].nonzero().flatten().tolist()
                assert torch.equal(step.ids[row][places], plain[row].argmax(-1)[places])
                others += bool(places)
                continue
            verified += 1
            assert places == masked[row].nonzero().flatten().tolist()[: len(places)]  # from the left
            chosen = logits[row, 5 + 8 * step.block :].argmax(-1)
            assert all(int(step.ids[row, j]) == int(chosen[j]) for j in places)
            drafts = plain[row].argmax(-1)
            assert all(int(step.ids[row, j]) == int(drafts[j]) for j in places[:-1])
            last = len(places) == int(masked[row].sum())
            assert last or int(step.ids[row, places[-1]]) != int(drafts[places[-1]])
    assert verified > 5 and others > 5
    assert stats.row_passes == verified + sum(
        int((torch.where(step.committed, MASK, step.ids) == MASK).any(-1).sum()) for step in steps
    )


def test_known_tokens_are_accepted_and_the_others_follow_the_tower():
    """Of two drafted tokens around a known one, the first has the distribution of the tower."""
    count = 40000
    q = torch.tensor([[0.7, 0.2, 0.1], [1 / 3] * 3, [0.1, 0.1, 0.8]]).log().expand(count, -1, -1)
    p = torch.tensor([[0.3, 0.5, 0.2], [0.9, 0.1, 0.0], [0.2, 0.6, 0.2], [0.5, 0.5, 0.0]]).log().expand(count, -1, -1)
    sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
    draft = sampling.draw(q)
    draft[:, 1] = 2  # impossible for the tower, but it stands
    known = torch.tensor([False, True, False]).expand(count, -1)
    accepted, token = sampling.accept(draft, q, p, known=known)
    assert set(accepted.tolist()) == {0, 2, 3}
    for place in (0, 2):
        reached = accepted >= place
        ids = torch.where(accepted == place, token, draft[:, place])[reached]
        share = torch.bincount(ids, minlength=3) / len(ids)
        torch.testing.assert_close(share, p[0, place].exp(), atol=0.015, rtol=0)
    greedy = Sampling().accept(torch.tensor([[1, 2, 1]]), q[:1], p[:1], known=known[:1])
    assert [each.tolist() for each in greedy] == [[3], [0]]


# --- arguments ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none", "found 'none', expected one of factor, entropy_bound"),
        ("threshold:0.9", "expected one of"),
        ("factor:x", "found 'factor:x', expected factor:FACTOR"),
        ("factor:", "found 'factor:', expected factor:FACTOR"),
        ("factor:1,2", "found 'factor:1,2', expected factor:FACTOR"),
        ("klass:0.9,0.01,1.5", "expected klass:THRESHOLD,DIVERGENCE,PASSES"),
        ("factor:-1", "factor: found -1.0, expected 0 to inf"),
        ("factor:nan", "factor: found nan, expected 0 to inf"),
        ("prefix:1.5", "threshold: found 1.5, expected 0 to 1"),
        ("early_end:0.5,0", "passes: found 0, expected 1 to inf"),
    ],
)
def test_samplers_that_are_refused(text, words):
    with pytest.raises(ArgumentError, match=f"sampler: .*{words}"):
        tiny_model().generate_mask_diffusion(random_ids(1, 4), sampler=text)


def test_names_and_defaults():
    assert read_sampler("klass:0.7,0.02") == Klass(0.7, 0.02, Klass.passes)
    assert read_sampler("early_end") == EarlyEnd()
    assert read_sampler("early_end:0.5,3") == EarlyEnd(0.5, 3)
    assert chosen_sampler(None, None) == Threshold(0.9)
    assert chosen_sampler(None, 0.25) == Threshold(0.25)
    assert chosen_sampler("factor:2", None) == Factor(2.0)
    with pytest.raises(ArgumentError, match=r"confidence_threshold: found 0.9 with a sampler, .*: factor"):
        tiny_model().generate_mask_diffusion(random_ids(1, 4), confidence_threshold=0.9, sampler="factor")
