"""Figures of an exported folder, against direct computations on small models."""

import itertools
import json
import math
import shutil

import pytest
import torch
from test_hf import MASK, become_backbone, random_ids, save, tiny_model

from megatron_twotower import evaluate
from megatron_twotower.evaluate import BOUND_NOISE, EvaluationSettings, ar_loss, diffusion_bound, masked_loss_by_noise
from megatron_twotower.records import UserError

VOCABULARY = 512
SMALL = EvaluationSettings(
    sequences=3, sequence_length_tokens=48, block_size_tokens=8, levels=(0.25, 1.0), bound_draws=2,
    thresholds=(0.2, 0.9), prompts=2, prompt_tokens=12, new_tokens=16, samples=1,
)  # fmt: skip


def cross_entropy(logits, target):
    return float(-logits.detach().double().log_softmax(-1)[target])


# --- likelihoods --------------------------------------------------------------------------------------------------


def test_ar_loss_is_that_of_the_context_tower(monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 2)
    model, ids = tiny_model(), random_ids(5, 12)
    with torch.no_grad():
        logits = model(ids).logits
    for start in (1, 4):
        nats = torch.tensor([[cross_entropy(logits[i, j - 1], ids[i, j]) for j in range(start, 12)] for i in range(5)])
        found = ar_loss(model, ids, start=start)
        assert found.nats_per_token == pytest.approx(float(nats.mean()))
        assert found.stderr == pytest.approx(float(nats.mean(1).std() / 5**0.5))
        assert found.tokens == 5 * (12 - start)


def test_masked_loss_is_the_denoiser_s_at_masked_positions(monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 2)
    model, ids, levels = tiny_model(), random_ids(3, 12), (0.0, 0.3, 0.7, 1.0)
    found = masked_loss_by_noise(model, ids, block_size=4, levels=levels, seed=5, mask_id=MASK)
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5))
    for entry, level in zip(found, levels, strict=True):
        nats = []
        for row, block in itertools.product(range(3), range(3)):
            columns = slice(4 * block, 4 * block + 4)
            clean, masked = ids[row : row + 1, columns], uniform[row, columns] < level
            cache = model.prefill(ids[row : row + 1, : 4 * block])
            logits = model.denoise_block(clean.masked_fill(masked, MASK), torch.tensor([level]), cache)[0]
            nats += [cross_entropy(logits[j], clean[0, j]) for j in range(4) if masked[j]]
        assert entry["t"] == level
        assert entry["count"] == len(nats)
        assert entry["loss"] == (pytest.approx(sum(nats) / len(nats)) if nats else None)
    assert [entry["count"] for entry in found][::3] == [0, 36]
    assert 0 < found[1]["count"] < found[2]["count"] < 36


def exact_bound(model, ids, block):
    """The bound of blocks after the first, by every mask: sum over masks of (k - 1)! (s - k)! / s! x masked nats."""
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
    found = diffusion_bound(model, ids.repeat(50, 1), block_size=4, draws=20, seed=0, mask_id=MASK)
    assert found.tokens == 2 * 50 * 8
    assert found.nats_per_token == pytest.approx(exact_bound(model, ids, 4), rel=0.02)


def test_both_ways_of_drawing_noise_estimate_one_bound():
    """They agree where the denoiser does not look at t, which is where the integral over t can be done exactly."""
    model, ids = tiny_model("M*"), random_ids(2, 12)
    with torch.no_grad():
        model.t_block[1].weight.zero_()
    exact, many = exact_bound(model, ids, 4), ids.repeat(80, 1)
    for noise, tolerance in (("count", 0.01), ("time", 0.04)):
        found = diffusion_bound(model, many, block_size=4, draws=25, seed=0, mask_id=MASK, noise=noise)
        assert found.nats_per_token == pytest.approx(exact, rel=tolerance)


def test_a_uniform_denoiser_has_the_bound_of_its_vocabulary_without_error():
    model, ids = tiny_model(), random_ids(3, 12)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = diffusion_bound(model, ids, block_size=4, draws=1, seed=0, mask_id=MASK)
    assert found.nats_per_token == pytest.approx(math.log(model.config.vocab_size))
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("noise", BOUND_NOISE)
def test_weights_make_every_position_count_once_on_average(noise):
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    masked, t, weight = BOUND_NOISE[noise](u, torch.rand(20000, 8, generator=torch.Generator().manual_seed(0)))
    often = (weight.unsqueeze(-1) * masked).mean(0)
    torch.testing.assert_close(often, torch.ones(8, dtype=torch.float64), atol=0.1, rtol=0)
    assert t.min() > 0 and t.max() <= 1
    if noise == "count":
        torch.testing.assert_close(masked.double().mean(-1), t)
        assert set(masked.sum(-1).tolist()) == set(range(1, 9))


@pytest.mark.parametrize("shape", [(1, 16), (4, 8), (4, 18)])
def test_sequences_must_be_blocks(shape):
    with pytest.raises(UserError, match="expected"):
        diffusion_bound(tiny_model("M"), random_ids(*shape), block_size=8, draws=1, seed=0, mask_id=MASK)


# --- generation ---------------------------------------------------------------------------------------------------


def test_the_sweep_counts_what_is_written():
    model, prompts = tiny_model(), random_ids(2, 6)
    rows = evaluate.threshold_sweep(
        model, prompts, thresholds=(0.0, 0.3, 1.0), max_new_tokens=16, block_size=8, mask_id=MASK
    )
    assert [row["confidence_threshold"] for row in rows] == [None, 0.0, 0.3, 1.0]
    ar, everything, some, single = rows
    assert (ar["passes"], ar["speedup"], ar["tokens_per_pass"]) == (32, 1.0, 1.0)
    assert (everything["passes"], everything["tokens_per_pass"]) == (4, 8.0)  # all at once: a pass per block
    assert (single["passes"], single["tokens_per_pass"]) == (32, 1.0)
    assert 4 < some["passes"] < 32
    for row in rows:
        assert row["new_tokens"] == 32
        assert row["prompts"] == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["speedup"] == pytest.approx(ar["seconds"] / row["seconds"])
    # What AR wrote, scored by itself: the greedy choices are its most probable tokens.
    nats = []
    for i in range(2):
        ids = model.generate_ar(prompts[i : i + 1], 16)
        with torch.no_grad():
            nats += [-float(x) for x in model(ids).logits[0, 5:-1].log_softmax(-1).amax(-1)]
    assert ar["nats_per_token"] == pytest.approx(sum(nats) / 32)
    written = model.generate_mask_diffusion(prompts[:1], 16, 8, 8, confidence_threshold=0.3)
    other = model.generate_mask_diffusion(prompts[1:], 16, 8, 8, confidence_threshold=0.3)
    expected = [cross_entropy(model(ids).logits[0, j - 1], ids[0, j]) for ids in (written, other) for j in range(6, 22)]
    assert some["nats_per_token"] == pytest.approx(sum(expected) / 32)


# --- all of it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "model"
    model = become_backbone(tiny_model(dtype=torch.float32, vocab_size=VOCABULARY))
    save(path, model, vocab_size=VOCABULARY)
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def test_evaluate_gives_every_figure_and_its_count(folder, tiny_data):
    stages = {}
    found = evaluate.evaluate(
        folder, tiny_data, settings=SMALL, progress=lambda stage, done, total: stages.update({stage: (done, total)})
    )
    assert json.loads(json.dumps(found)) == found | {"settings": json.loads(json.dumps(found["settings"]))}
    assert found["sequences"] == 3
    assert found["ar_loss_tokens"] == 3 * 47
    assert found["diffusion_bound_tokens"] == 3 * 40
    assert [(e["t"], e["count"]) for e in found["masked_loss_by_noise"]][1] == (1.0, 3 * 48)
    assert found["ar_loss_per_byte"] == pytest.approx(found["ar_loss"] / found["bytes_per_token"])
    assert found["bytes_per_token"] > 1
    assert [row["confidence_threshold"] for row in found["sweep"]] == [0.2, 0.9]
    assert found["ar_generation"]["speedup"] == 1.0
    assert [sample["mode"] for sample in found["samples"]] == ["mask_diffusion", "mock_ar", "ar"]
    assert found["samples"][1]["text"] == found["samples"][2]["text"]  # the denoiser is a copy of the context tower
    assert all(done == total for done, total in stages.values())
    again = evaluate.evaluate(folder, tiny_data, settings=SMALL)
    for key in ("ar_loss", "ar_loss_on_bound_tokens", "diffusion_bound", "masked_loss_by_noise"):
        assert again[key] == found[key]


def test_the_command_writes_json(folder, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.evaluate, "__kwdefaults__", evaluate.evaluate.__kwdefaults__ | {"settings": SMALL})
    output = tmp_path / "new" / "evaluation.json"
    evaluate.run(folder, data=tiny_data, output=output)
    assert json.loads(output.read_text())["sequences"] == 3
    assert [path.name for path in output.parent.iterdir()] == ["evaluation.json"]


def test_mistakes_are_named(folder, tiny_data, tmp_path):
    output = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match=r"index.json: not found"):
        evaluate.run(folder, data=tmp_path, output=output)
    with pytest.raises(UserError, match=r"config.json: not found"):
        evaluate.run(tmp_path, data=tiny_data, output=output)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="found a tokenizer with sha256"):
        evaluate.run(other, data=tiny_data, output=output)
    settings = EvaluationSettings(sequence_length_tokens=10**6)
    with pytest.raises(UserError, match="expected at least 2 x 1000000"):
        evaluate.evaluate(folder, tiny_data, settings=settings)
    assert not output.exists()
