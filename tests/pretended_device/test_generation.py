"""Generation and evaluation on a pretended device.

The numbers of the host, and every wait is counted.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from helpers.modeling import MASK, TYPICAL_SAMPLERS, random_ids, tiny_model
from helpers.pretended_device import Pretended, as_there, on_host, pretended_cuda
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import load_tokenizer
from megatron_twotower.evaluate import held_out, likelihood
from megatron_twotower.evaluate.held_out import EvaluationSettings
from megatron_twotower.generate import distil, loaded
from megatron_twotower.generate.engine import GenerationSettings, generate_ids
from megatron_twotower.generate.replay.recording import Recorder
from megatron_twotower.generate.terminal import Canvas
from megatron_twotower.hf import modeling_nemotron_h_twotower as modeling

ROWS, PROMPT, NEW, BLOCK, EOS = 3, 9, 10, 4, 11
BLOCKS = -(-NEW // BLOCK)
COPY, PLACES = "a copy to the host: modeling_nemotron_h_twotower.{}", "nonzero: modeling_nemotron_h_twotower.{}"
NUMBER = "a number: modeling_nemotron_h_twotower.{}"


def written(mode, model, ids, **arguments):
    """Ids, and all figures without the time."""
    ids = getattr(model, f"generate_{mode}")(ids, NEW, **arguments)
    return ids, dataclasses.replace(model.last_generation, seconds=0.0)


# The other arguments of each mode, and how often the host waits, given the statistics and the id
# that ends a row.
MODES = {
    "mask_diffusion": (
        # Three passes finish a block, and no fourth looks for remaining masks.
        {"block_size": BLOCK, "steps_per_block": 3, "confidence_threshold": 1.0},
        lambda stats, eos: {
            PLACES.format("_fill_block"): stats.passes,
            NUMBER.format("generate_mask_diffusion"): 1 + (BLOCKS if eos else 0),
        },
    ),
    "ar": ({}, lambda stats, eos: {NUMBER.format("_generate_by_token"): 1 + (stats.passes if eos else 0)}),
    "mock_ar": ({}, lambda stats, eos: {NUMBER.format("_generate_by_token"): 1 + (stats.passes if eos else 0)}),
    "speculative": (
        {"block_size": BLOCK, "draft_steps": 2},
        lambda stats, eos: {
            COPY.format("settle"): stats.passes,
            NUMBER.format("generate_speculative"): stats.passes + 3,
        },
    ),
}


# In float32 the choices of experts are a batch of products, in bfloat16 a grouped product.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("mode", MODES)
def test_text_is_that_of_the_host_and_every_wait_is_expected(mode, eos, dtype):
    """A forward pass of the denoiser waits for remaining masks alone."""
    settings, waited_for = MODES[mode]
    settings, ids = settings | {"eos_token_id": eos}, random_ids(ROWS, PROMPT)
    with as_there():
        text, stats = written(mode, tiny_model(dtype=dtype), ids, **settings)
    with pretended_cuda() as waits:
        model, there = tiny_model(dtype=dtype).to("cuda"), ids.to("cuda")
        with waits.during() as waited:
            found, figures = written(mode, model, there, **settings)
    assert isinstance(found, Pretended) and torch.equal(on_host(found), text) and figures == stats
    expected = waited_for(stats, eos) | ({NUMBER.format("fill_after_eos"): 2} if eos else {})
    assert waited.counted() == expected


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_and_a_read_of_a_block_wait_for_nothing(dtype, capacity, monkeypatch):
    used = []
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: used.append(1) or product(*a, **k))
    with pretended_cuda() as waits:
        model = tiny_model(dtype=dtype).to("cuda")
        ids, block = random_ids(ROWS, PROMPT).to("cuda"), random_ids(ROWS, BLOCK).to("cuda")
        t = torch.ones(ROWS, device="cuda")
        cache = model.prefill(ids, capacity=capacity)
        with waits.during() as waited:
            for _ in range(2):
                model.denoise_block(block, t, cache)
                model.extend(cache, block)
                model.extend(cache, block[:, :1])
    assert waited.found == []
    assert bool(used) == (dtype == torch.bfloat16)


def test_long_texts_without_a_grouped_kernel_wait_once_a_layer():
    with pretended_cuda() as waits:
        model, ids = tiny_model(dtype=torch.float32).to("cuda"), random_ids(ROWS, 50).to("cuda")
        with waits.during() as waited:
            model.prefill(ids)
    assert waited.counted() == {COPY.format("parts"): 1}


@pytest.mark.parametrize("mode", MODES)
def test_the_clock_is_read_when_the_device_is_done(mode, monkeypatch):
    """The clock is read when a number has arrived, not when the last work is queued."""
    with pretended_cuda() as waits:
        model, ids = tiny_model(dtype=torch.float32).to("cuda"), random_ids(ROWS, PROMPT).to("cuda")
        readings = []
        clock = SimpleNamespace(perf_counter=lambda: readings.append(len(waits.found)) or 0.0)
        monkeypatch.setattr(modeling, "time", clock)
        written(mode, model, ids, **MODES[mode][0])
    assert readings[-1] == len(waits.found) and waits.found[-1].kind == "a number"


def test_a_block_that_is_done_early_is_checked_once_more():
    settings = {"block_size": BLOCK, "confidence_threshold": 0.05}
    with pretended_cuda() as waits:
        model, ids = tiny_model(dtype=torch.float32).to("cuda"), random_ids(ROWS, PROMPT).to("cuda")
        with waits.during() as waited:
            _, stats = written("mask_diffusion", model, ids, **settings)
    assert stats.passes < BLOCKS * BLOCK
    assert waited.counted()[PLACES.format("_fill_block")] == stats.passes + BLOCKS


@pytest.mark.parametrize("text", [None, *TYPICAL_SAMPLERS])
def test_samplers_wait_for_nothing_more(text):
    """But for the one that asks the context tower: it waits to know whether a row asks."""
    settings = {"block_size": BLOCK, "sampler": text}
    with as_there():
        expected, stats = written(
            "mask_diffusion", tiny_model(dtype=torch.float32), random_ids(ROWS, PROMPT), **settings
        )
    with pretended_cuda() as waits:
        model, ids = tiny_model(dtype=torch.float32).to("cuda"), random_ids(ROWS, PROMPT).to("cuda")
        with waits.during() as waited:
            found, figures = written("mask_diffusion", model, ids, **settings)
    assert torch.equal(on_host(found), expected) and figures == stats
    denoised = stats.passes - stats.verifications
    asked = {NUMBER.format("_fill_block"): denoised} if stats.verifications else {}
    assert bool(asked) == (text is not None and text.startswith("routed"))
    assert waited.counted() == asked | {
        PLACES.format("_fill_block"): denoised + BLOCKS,
        NUMBER.format("generate_mask_diffusion"): 1,
    }


@pytest.mark.parametrize("towers", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_verified_blocks_on_two_devices(towers):
    settings = {"block_size": BLOCK, "sampler": "routed:0.2,1"}
    with as_there():
        text, stats = written("mask_diffusion", tiny_model(dtype=torch.float32), random_ids(ROWS, PROMPT), **settings)
    with pretended_cuda(), as_there():
        model = tiny_model(dtype=torch.float32).place_towers_on_devices(*towers)
        ids = random_ids(ROWS, PROMPT).to(model.context_tower.device)
        found, figures = written("mask_diffusion", model, ids, **settings)
    assert torch.equal(on_host(found), text) and figures == stats and stats.verifications > 0


@pytest.mark.parametrize("towers", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("mode", MODES)
def test_padding_sampling_and_towers_on_two_devices(mode, towers):
    """The prompt is on the device of the context tower.

    The generator is on the device where the mode chooses tokens.
    """
    ids = random_ids(ROWS, PROMPT)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    wanted = GenerationSettings(NEW, BLOCK, 3, 0.2, temperature=0.9, top_k=20, top_p=0.95, draft_steps=2, seed=3)

    def once(model, ids, mask):
        return generate_ids(model, ids, mode=mode, settings=wanted, mask_id=MASK, eos_id=EOS, attention_mask=mask)

    with as_there():
        text, stats = once(tiny_model(dtype=torch.float32), ids, mask)
    with pretended_cuda(), as_there():
        model = tiny_model(dtype=torch.float32).place_towers_on_devices(*towers)
        device = model.context_tower.device
        found, figures = once(model, ids.to(device), mask.to(device))
    assert torch.equal(on_host(found), text)
    assert dataclasses.replace(figures, seconds=0.0) == dataclasses.replace(stats, seconds=0.0)


def test_those_who_watch_may_look(two_tower_folder):
    tokenizer = load_tokenizer(two_tower_folder)
    with pretended_cuda():
        model, ids = tiny_model(dtype=torch.float32).to("cuda"), random_ids(1, PROMPT).to("cuda")
        recorder, canvas = Recorder(), Canvas("", tokenizer)
        for seen in (recorder, canvas.on_step):
            text = model.generate_mask_diffusion(ids, NEW, BLOCK, on_step=seen)
        assert len(recorder.blocks) == BLOCKS
        assert (canvas.state[0] + canvas.state[1])[:NEW] == on_host(text)[0, PROMPT:].tolist()
        canvas = Canvas("", tokenizer)
        text = model.generate_speculative(ids, NEW, on_tokens=canvas.on_tokens)
        assert canvas.state[0] + canvas.state[1] == on_host(text)[0, PROMPT:].tolist()


# --- likelihoods ---

ALL = random_ids(4, 24)
MEASURES = {
    "next token": lambda model: likelihood.ar_nats(model, ALL),
    "by noise": lambda model: likelihood.masked_loss_by_noise(
        model, ALL, block_size=8, levels=(0.3, 1.0), seed=1, mask_id=MASK
    ),
    "bound": lambda model: likelihood.bound_nats(model, ALL, block_size=8, draws=2, seed=1, mask_id=MASK),
}
# What a call waits for, by reading it: two levels or draws of the two blocks that are denoised, and
# two that are read; what the towers are given and what they say go over at once.
DENOISED = 4
WAITED = {
    "next token": {
        "a copy from the host: modeling_nemotron_h_twotower.forward": 1,
        "a copy from the host: modeling_nemotron_h_twotower.score": 1,
        "a copy to the host: modeling_nemotron_h_twotower.score": 1,
    },
    **{
        name: {
            "a copy from the host: modeling_nemotron_h_twotower.forward": DENOISED + 2,
            "a copy from the host: modeling_nemotron_h_twotower.modulations": DENOISED,
            "a copy from the host: likelihood.token_nats": DENOISED,
            "a copy to the host: likelihood._masked_nats": DENOISED,
        }
        for name in ("by noise", "bound")
    },
}


@pytest.mark.parametrize("name", MEASURES)
def test_likelihoods_are_those_of_the_host(name):
    measure = MEASURES[name]
    with as_there():
        want = measure(tiny_model(dtype=torch.float32))
    with pretended_cuda() as waits:
        model = tiny_model(dtype=torch.float32).to("cuda")
        with waits.during() as waited:
            found = measure(model)
    assert torch.equal(found, want) if isinstance(want, torch.Tensor) else found == want
    assert waited.counted() == WAITED[name]


SMALL = EvaluationSettings(
    sequences=2,
    sequence_length_tokens=16,
    block_size_tokens=8,
    levels=(0.25, 1.0),
    bound_draws=1,
    thresholds=(0.2,),
    block_sizes=(),
    steps=(),
    prompts=1,
    prompt_tokens=8,
    new_tokens=8,
    samples=1,
)


def plain(figures):
    """The figures that depend neither on the clock nor on the device."""
    if isinstance(figures, list):
        return [plain(each) for each in figures]
    if not isinstance(figures, dict):
        return figures
    clock = {"seconds", "tokens_per_second", "speedup", "machine", "device"}
    return {key: plain(value) for key, value in figures.items() if key not in clock}


def test_an_evaluation_of_a_folder(two_tower_folder, tiny_data, monkeypatch):
    with as_there():
        want = held_out.evaluate(two_tower_folder, tiny_data, settings=SMALL)
    monkeypatch.setattr(held_out, "default_devices", lambda: ("cuda",))
    with pretended_cuda():
        found = held_out.evaluate(two_tower_folder, tiny_data, settings=SMALL)
    assert found["device"] == "cuda:0" and json.dumps(found)
    assert plain(found) == plain(want)


def test_distilled_text_is_that_of_the_host(two_tower_folder, tiny_data, monkeypatch, tmp_path):
    small = distil.DistilSettings(sequences=3, prompt_tokens=8, new_tokens=6, batch_size=2)
    with as_there():
        distil.distil(two_tower_folder, tiny_data, tmp_path / "host", small)
    monkeypatch.setattr(loaded, "default_devices", lambda: ("cuda",))
    with pretended_cuda() as waits:
        distil.distil(two_tower_folder, tiny_data, tmp_path / "there", small)
    for split in ("train", "validation"):
        there, here = (Corpus.open(tmp_path / name / split) for name in ("there", "host"))
        assert there.fingerprint == here.fingerprint
    counted = waits.counted("ours")
    assert counted.pop("a copy from the host: modeling_nemotron_h_twotower._apply") > 0  # weights
    # Three batches, one of them for validation: prompts are copied to the device and text back. A
    # token waits to see whether all texts have ended.
    assert counted == {
        "a copy from the host: distil.continue_windows": 3,
        "a copy to the host: distil.continue_windows": 3,
        NUMBER.format("_generate_by_token"): 3 * (6 + 1),
        NUMBER.format("fill_after_eos"): 3 * 2,
    }


@pytest.mark.parametrize("scoring", ["ar", "bound", "mock_ar"])
def test_the_harness_scores_and_writes_as_on_the_host(scoring, two_tower_folder):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`): the harness is not tested")
    from megatron_twotower.evaluate.harness import TwoTower
    from megatron_twotower.evaluate.harness_settings import AnswerSettings

    pairs = [([5, 9, 17], [4, 6]), ([5, 9, 17], [8]), ([21], [11, 30, 7]), ([6, 8], [7])]
    prompts, wanted = [[5, 9, 17], [21]], AnswerSettings(max_new_tokens=8)

    def all_of(device):
        lm = TwoTower(
            two_tower_folder,
            device=device,
            scoring=scoring,
            block_size=4,
            steps_per_block=4,
            batch_size=2,
            bound_draws=2,
        )
        return lm.score(pairs, quiet=True), lm.write(prompts, wanted), lm.passes

    with as_there():
        want = all_of("cpu")
    with pretended_cuda() as waits:
        assert all_of("cuda") == want
    rows = {place for place in waits.counted("ours") if "_row_scores" in place}
    assert rows <= {"a copy to the host: answer_scores._row_scores"}
