"""Speed and quality of generation, against direct counts on small models."""

import pytest
import torch

from helpers.modeling import MASK, random_ids, tiny_model
from helpers.scores import cross_entropy
from megatron_twotower.evaluate.speed_quality import (
    SweepPoint,
    distinct_fraction,
    ngrams,
    pareto_front,
    sweep,
    sweep_points,
    text_quality,
)


def test_repetition_is_counted():
    assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert distinct_fraction([1, 2, 3, 4], 2) == 1.0
    assert distinct_fraction([1, 1, 1, 1, 1], 2) == 0.25
    assert distinct_fraction([1, 2, 1, 2, 1, 2, 1], 4) == 0.5
    assert distinct_fraction([1, 2], 4) == 1.0  # too short for a repetition


def test_the_points_of_a_star_and_of_a_grid():
    star = sweep_points(thresholds=(0.5, 0.8), block_sizes=(8, 16), steps=(4, 16), trained_block=16, threshold=0.8)
    assert star == [SweepPoint(0.5, 16), SweepPoint(0.8, 16), SweepPoint(0.8, 8), SweepPoint(0.8, 16, 4)]
    grid = sweep_points(
        thresholds=(0.5, 0.8), block_sizes=(8, 16), steps=(4, 8), trained_block=16, threshold=0.8, every=True
    )
    assert len(grid) == len(set(grid)) == 2 * (2 + 3)
    assert SweepPoint(0.5, 8, 8) not in grid and SweepPoint(0.5, 8, 4) in grid
    lists = {"thresholds": (0.5,), "block_sizes": (8,), "steps": (4,), "trained_block": 16, "threshold": 0.8}
    star = sweep_points(**lists, samplers=("factor", "prefix:0.5"))
    samplers = [SweepPoint(None, 16, None, "factor"), SweepPoint(None, 16, None, "prefix:0.5")]
    # With what samplers are compared with, which is none of the thresholds here.
    assert star == [
        *(SweepPoint(0.5, 16), SweepPoint(0.8, 16), *samplers),
        *(SweepPoint(0.8, 8), SweepPoint(0.8, 16, 4)),
    ]
    grid = sweep_points(**lists, samplers=("factor",), every=True)
    assert grid == [SweepPoint(t, 8, n, s) for t, s in ((0.5, None), (None, "factor")) for n in (None, 4)]


def test_text_of_ar_agrees_with_ar():
    model, prompt = tiny_model(), random_ids(1, 6)
    ids = model.generate_ar(prompt, 16)
    found = text_quality(model, ids, 6, ids[0, 6:])
    assert (found["agreement"], found["same_as_ar"]) == (1.0, 1.0)
    logits = model(ids).logits[0, 5:-1].detach()
    assert found["nats_per_token"] == pytest.approx(-float(logits.log_softmax(-1).amax(-1).mean()))
    # Replace one token by one that AR would not choose, and continue. Only this token
    # disagrees, and the tokens after it differ from those of the first text.
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % 48
    other = model.generate_ar(other[:, :11], 11)
    changed = text_quality(model, other, 6, ids[0, 6:])
    assert changed["agreement"] == pytest.approx(15 / 16)
    assert 4 / 16 <= changed["same_as_ar"] < 1
    assert changed["nats_per_token"] > found["nats_per_token"]


def test_the_sweep_counts_passes_and_tokens():
    model, prompts = tiny_model(), random_ids(2, 6)
    tried = [SweepPoint(0.0, 8), SweepPoint(0.3, 8), SweepPoint(1.0, 8), SweepPoint(1.0, 8, 2), SweepPoint(1.0, 4, 1)]
    rows = sweep(model, prompts, points=tried, max_new_tokens=16, mask_id=MASK)
    assert [row["confidence_threshold"] for row in rows] == [None, 0.0, 0.3, 1.0, 1.0, 1.0]
    assert [row["mode"] for row in rows] == ["ar"] + 5 * ["mask_diffusion"]
    assert [row["steps_per_block"] for row in rows] == [None, 8, 8, 8, 2, 1]
    ar, everything, some, single, halves, quarters = rows
    assert (ar["passes"], ar["speedup"], ar["tokens_per_pass"]) == (32, 1.0, 1.0)
    assert (ar["agreement"], ar["same_as_ar"]) == (1.0, 1.0)
    assert (everything["passes"], everything["tokens_per_pass"]) == (4, 8.0)  # all at once: a pass per block
    assert (single["passes"], single["tokens_per_pass"]) == (32, 1.0)
    assert (halves["passes"], quarters["passes"]) == (8, 8)
    assert 4 < some["passes"] < 32
    for row in rows:
        assert row["new_tokens"] == 32
        assert row["prompts"] == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["speedup"] == pytest.approx(ar["seconds"] / row["seconds"])
        assert 0 <= row["agreement"] <= 1 and row["nats_per_token_stderr"] >= 0
    texts = [model.generate_mask_diffusion(prompts[i : i + 1], 16, 8, 8, confidence_threshold=0.3) for i in range(2)]
    expected = [cross_entropy(model(ids).logits[0, j - 1], ids[0, j]) for ids in texts for j in range(6, 22)]
    assert some["nats_per_token"] == pytest.approx(sum(expected) / 32)
    ar_texts = [model.generate_ar(prompts[i : i + 1], 16) for i in range(2)]
    same = torch.cat([a[0, 6:] == b[0, 6:] for a, b in zip(texts, ar_texts, strict=True)])
    assert some["same_as_ar"] == pytest.approx(float(same.double().mean()))
    for number, text in enumerate(texts):
        of_one, one_alone = some["by_prompt"][number], text_quality(model, text, 6, ar_texts[number][0, 6:])
        assert {key: of_one[key] for key in one_alone} == one_alone and of_one["new_tokens"] == 16
    assert sum(each["passes"] for each in some["by_prompt"]) == some["passes"]
    one = sweep(model, prompts[:1], points=tried[:1], max_new_tokens=4, mask_id=MASK)
    assert one[0]["nats_per_token_stderr"] is None


def test_samplers_in_a_sweep():
    model, prompts = tiny_model(), random_ids(2, 6)
    tried = [SweepPoint(1.0, 8), SweepPoint(None, 8, None, "factor:0"), SweepPoint(None, 8, 2, "prefix:0.3")]
    _, single, same, halves = sweep(model, prompts, points=tried, max_new_tokens=16, mask_id=MASK)
    assert [row["sampler"] for row in (single, same, halves)] == [None, "factor:0", "prefix:0.3"]
    assert same["confidence_threshold"] is None and same["steps_per_block"] == 8
    assert (same["passes"], same["nats_per_token"]) == (single["passes"], single["nats_per_token"])
    assert halves["passes"] <= 8
    expected = sum(
        (model.generate_mask_diffusion(prompts[i : i + 1], 16, 8, 2, sampler="prefix:0.3"), model.last_generation)[
            1
        ].passes
        for i in range(2)
    )
    assert halves["passes"] == expected


def test_no_other_row_beats_a_row_of_the_pareto_front():
    rows = [{"speedup": s, "agreement": a} for s, a in ((1.0, 0.9), (2.0, 0.8), (1.5, 0.7), (3.0, 0.1), (0.5, 0.9))]
    assert [row["speedup"] for row in pareto_front(rows, "agreement")] == [1.0, 2.0, 3.0]
