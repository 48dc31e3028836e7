"""The modelling file against transformers, against a per-token reference, and by itself."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from helpers import models, reference
from helpers.modeling import (
    HIDDEN,
    LONG,
    MASK,
    PATTERNS,
    VOCABULARY,
    become_backbone,
    random_ids,
    randomise,
    save,
    tiny_config,
    tiny_fields,
    tiny_model,
)
from megatron_twotower.config.hf_config import model_from_hf
from megatron_twotower.config.schema import ConditioningConfig
from megatron_twotower.hf import MODELING_FILE, twotower_config_json
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    LOOPS,
    ArgumentError,
    ContextCache,
    NemotronHTwoTowerForCausalLM,
    Sampling,
    fill_after_eos,
    positions_to_commit,
    time_features,
)
from megatron_twotower.model.adaln import sinusoid
from megatron_twotower.model.parameter_map import context_entries, denoiser_entries

# --- against transformers ---


def context_names(name):
    return name.replace("model.", "context_tower.", 1) if name.startswith("model.") else f"context_{name}"


@pytest.mark.parametrize("length", [1, 7, 21 if LONG else 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_context_logits_are_those_of_transformers(pattern, length):
    reference = randomise(NemotronHForCausalLM(tiny_config(pattern)))
    model, state = tiny_model(pattern, dtype=torch.float32), {}
    for name, tensor in reference.state_dict().items():
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            before, projection = context_names(name).rsplit(".", 1)
            state |= {f"{before}.{expert}.{projection}.weight": row for expert, row in enumerate(tensor)}
        else:
            state[context_names(name)] = tensor
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if name.startswith("context")]
    ids = random_ids(2, length)
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)


def test_tensor_names_and_shapes_are_those_of_the_table():
    shape = model_from_hf(tiny_fields(), source="config.json")
    entries = [*context_entries(shape), *denoiser_entries(shape, 256)]
    named = {name for entry in entries for name in entry.hf_names}
    state = tiny_model().state_dict()
    assert named == set(state)
    assert state["t_embedder.mlp.0.weight"].shape == (HIDDEN, 256)
    assert state["t_block.1.weight"].shape == (3 * HIDDEN, HIDDEN)
    assert state["scale_shift_tables.4"].shape == (3, HIDDEN)
    assert state["denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"].shape == (24, HIDDEN)


def test_time_features_are_those_of_training():
    times = torch.rand(9)
    torch.testing.assert_close(time_features(times), sinusoid(times, ConditioningConfig()), atol=0, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_are_those_of_the_one_pass_training_forward(groups, pattern, dtype, tolerance):
    """This file with the tensors of towers on Megatron Core; every row and block has its own t."""
    config = dataclasses.replace(models.tiny_config(pattern), conditioning=ConditioningConfig())
    trained, source = models.build_two_tower(config, groups, dtype=dtype)
    batch = models.random_noisy_batch(config)
    with torch.no_grad():
        expected = (trained(batch) @ trained.tower.output_layer.weight.t()).transpose(0, 1)
    shape = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    fields = {key: value for key, value in shape.items() if key != "time_step_clamp"}
    model = NemotronHTwoTowerForCausalLM(NemotronHConfig(**fields)).to(dtype)
    model.load_state_dict({name: source(name) for name in model.state_dict()})
    cache, block = model.prefill(batch.tokens[:, :0]), config.noise.block_size_tokens
    for number, start in enumerate(range(0, batch.tokens.shape[1], block)):
        columns = slice(start, start + block)
        logits = model.denoise_block(batch.noisy[:, columns], batch.times[:, number], cache)
        torch.testing.assert_close(logits, expected[:, columns], atol=tolerance, rtol=tolerance)
        model.extend(cache, batch.tokens[:, columns])


# --- against the reference: one row, one position at a time ---


def plain_block(model, clean, block, t):
    """Logits (s, v) of the block of one row after clean ids (l,), from the state dict."""
    weights, shape = model.state_dict(), model_from_hf(tiny_fields(model.config.hybrid_override_pattern), source="")
    caches, _ = reference.context_caches(weights.__getitem__, shape, clean)
    return reference.denoise_block(weights.__getitem__, shape, 256, block, t, caches)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_from_the_cache_equals_the_reference(pattern):
    model = tiny_model(pattern, seed=3)
    clean, block, t = random_ids(2, 11), random_ids(2, 5, seed=2), torch.tensor([0.3, 0.85])
    block[:, 1::2] = MASK
    # 11 = 6 + 1 + 4: the cache is built by a prefill, a step and a block, over the boundary of a
    # chunk.
    cache = model.prefill(clean[:, :6])
    model.extend(model.extend(cache, clean[:, 6:7]), clean[:, 7:])
    logits, first = model.denoise_block(block, t, cache), model.denoise_block(block, t, model.prefill(clean[:, :0]))
    for row in range(2):
        expected = plain_block(model, clean[row], block[row], t[row])
        torch.testing.assert_close(logits[row], expected, atol=1e-8, rtol=1e-8)
        expected = plain_block(model, clean[row, :0], block[row], t[row])
        torch.testing.assert_close(first[row], expected, atol=1e-8, rtol=1e-8)


# --- the cache ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reading_in_pieces_equals_reading_at_once(pattern):
    model, ids = tiny_model(pattern), random_ids(2, 90)
    with torch.no_grad():
        expected = model(ids).logits
    cache = model.prefill(ids[:, :3])
    for start, stop in ((3, 4), (4, 20), (20, 75), (75, 76), (76, 90)):
        model.extend(cache, ids[:, start:stop])
        torch.testing.assert_close(model.context_lm_head(cache.hidden), expected[:, stop - 1])
    assert cache.length == 90


def test_a_block_leaves_the_cache_as_it_was():
    model, ids, t = tiny_model(), random_ids(2, 20), torch.tensor([0.5, 1.0])
    untouched, used = model.prefill(ids), model.prefill(ids)
    first = model.denoise_block(random_ids(2, 16, seed=5), t, used)
    model.denoise_block(random_ids(2, 16, seed=6), t, used)
    torch.testing.assert_close(model.denoise_block(random_ids(2, 16, seed=5), t, used), first, atol=0, rtol=0)
    following = random_ids(2, 16, seed=7)
    for cache in (untouched, used):
        model.extend(cache, following)
    torch.testing.assert_close(used.hidden, untouched.hidden, atol=0, rtol=0)


def test_the_past_of_a_block_is_read_without_a_copy():
    model = tiny_model("*")
    cache = model.prefill(random_ids(1, 20))
    (keys, _), state = cache.context[0].buffers, cache.context[0]
    assert cache.denoiser[0] is state
    model.denoise_block(random_ids(1, 16), torch.ones(1), cache)
    assert state.buffers[0] is keys
    assert state.length == 20


def test_logits_of_a_block_depend_on_all_of_it_and_all_before_it():
    model, t = tiny_model("M*E"), torch.ones(1)
    clean, block = random_ids(1, 12), random_ids(1, 4, seed=2)
    base = model.denoise_block(block, t, model.prefill(clean))
    for position in (0, 11):
        other = clean.clone()
        other[0, position] = 4 + (clean[0, position] - 3) % (VOCABULARY - 4)
        assert ((model.denoise_block(block, t, model.prefill(other)) - base).abs().amax(-1) > 1e-6).all()
    other = block.clone()
    other[0, 3] = MASK
    changed = (model.denoise_block(other, t, model.prefill(clean)) - base).abs().amax(-1)
    assert (changed > 1e-6).all()  # the first position too: attention goes both ways within the block
    assert ((model.denoise_block(block, t * 0.5, model.prefill(clean)) - base).abs().amax(-1) > 1e-6).all()


# --- identity ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_identity_modulation_a_block_of_one_is_the_backbone(pattern):
    model, ids = become_backbone(tiny_model(pattern)), random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
    cache = model.prefill(ids[:, :0])
    for i in range(ids.shape[1]):
        token = ids[:, i : i + 1]
        logits = model.denoise_block(token, torch.tensor([0.2, 0.9]), cache)
        torch.testing.assert_close(logits[:, 0], expected[:, i])
        model.extend(cache, token)


@pytest.mark.parametrize("length", [1, 10])
def test_mock_ar_of_a_copied_denoiser_writes_what_ar_writes(length):
    model, ids = become_backbone(tiny_model()), random_ids(2, length)
    written = model.generate_ar(ids, 24)
    assert torch.equal(model.generate_mock_ar(ids, 24), written)
    different = tiny_model(seed=9)
    different.context_tower.load_state_dict(model.context_tower.state_dict())
    different.context_lm_head.load_state_dict(model.context_lm_head.state_dict())
    assert torch.equal(different.generate_ar(ids, 24), written)
    assert not torch.equal(different.generate_mock_ar(ids, 24), written)


# --- autoregressive generation ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_ar_equals_uncached_argmax(pattern):
    model, ids = tiny_model(pattern), random_ids(2, 5)
    written, expected = model.generate_ar(ids, 20), ids
    for _ in range(20):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, expected)
    stats = model.last_generation
    assert (stats.passes, stats.row_passes, stats.new_tokens, stats.tokens_per_pass) == (20, 40, 40, 1.0)
    assert stats.seconds > 0


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mock_ar", "generate_mask_diffusion"])
def test_rows_end_by_themselves(mode):
    model, ids = tiny_model(), random_ids(4, 6)
    full = getattr(model, mode)(ids, 32)[:, 6:]
    # An end that one row meets early, and another late or never.
    eos = int(full[0, 4])
    first = [int((row == eos).nonzero()[0]) if (row == eos).any() else None for row in full]
    assert first[0] is not None and first[0] <= 4
    assert len(set(first)) > 1
    new = getattr(model, mode)(ids, 32, eos_token_id=eos)[:, 6:]
    for row, whole, end in zip(new, full, first, strict=True):
        kept = len(whole) if end is None else end + 1
        assert torch.equal(row[:kept], whole[:kept])
        assert (row[kept:] == eos).all()
    assert model.last_generation.new_tokens == sum(32 if end is None else end + 1 for end in first)


def test_rows_after_their_end():
    new = torch.tensor([[5, 2, 7, 2, 9], [5, 6, 7, 2, 9], [2, 2, 2, 2, 2]])
    cut, count = fill_after_eos(new, 2)
    assert cut.tolist() == [[5, 2, 2, 2], [5, 6, 7, 2], [2, 2, 2, 2]]
    assert count == 2 + 4 + 1
    assert fill_after_eos(new, None)[1] == 15


def test_rows_after_they_were_stopped():
    new, counts = torch.tensor([[5, 2, 7, 2, 9], [5, 6, 7, 8, 9], [4, 4, 3, 4, 4]]), torch.tensor([5, 3, 1])
    cut, count = fill_after_eos(new, (3, 2), counts)
    assert cut.tolist() == [[5, 2, 2], [5, 6, 7], [4, 3, 3]] and count == 2 + 3 + 1
    cut, count = fill_after_eos(new, (), counts)
    assert cut.tolist() == [[5, 2, 7, 2, 9], [5, 6, 7, 7, 7], [4, 4, 4, 4, 4]] and count == 5 + 3 + 1


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mask_diffusion"])
def test_prompts_that_were_read_before_are_not_read_again(mode, monkeypatch):
    model, ids = tiny_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    cache, expected = model.prefill(ids, mask), getattr(model, mode)(ids, 20, attention_mask=mask)
    monkeypatch.setattr(model, "prefill", None)
    for _ in range(2):
        found = getattr(model, mode)(ids, 20, attention_mask=mask, cache=copy.deepcopy(cache))
        assert torch.equal(found, expected)
    for rows, length in ((1, 6), (2, 5)):
        with pytest.raises(
            ArgumentError, match=rf"^cache: found rows and columns \(2, 6\), expected \({rows}, {length}\)"
        ):
            getattr(model, mode)(ids[:rows, :length], 20, cache=cache)


@pytest.mark.parametrize("eos", [(), (7, 12)])
@pytest.mark.parametrize("mode", LOOPS.values())
def test_a_function_stops_rows_when_text_has_grown(mode, eos):
    model, ids = tiny_model(), random_ids(3, 6)
    whole = getattr(model, mode)(ids, 24, eos_token_id=eos)[:, 6:]
    seen = []

    def stop(new, counts):
        for row, count, expected in zip(new, counts, whole, strict=True):
            assert torch.equal(row[:count], expected[:count])
        seen.append(counts)
        return counts >= torch.tensor([5, 100, 9])

    new = getattr(model, mode)(ids, 24, eos_token_id=eos, stop=stop)[:, 6:]
    # Each row ends at the first growth that is long enough, the second one at its length or EOS.
    ends = torch.stack(seen)
    assert (ends[1:] >= ends[:-1]).all()
    for row, expected, counts in zip(new, whole, ends.T, strict=True):
        end = int(counts[-1])
        assert torch.equal(row[:end], expected[:end])
        filler = row[end - 1] if not eos or row[end - 1] in eos else eos[0]
        assert (row[end:] == filler).all()
    if mode in ("generate_ar", "generate_mock_ar") and not eos:
        assert ends[-1].tolist() == [5, 24, 9]
        assert model.last_generation.passes == 24 and model.last_generation.row_passes == 5 + 24 + 9
    assert model.last_generation.new_tokens == int(ends[-1].sum())
    first = getattr(model, mode)(ids, 24, eos_token_id=(), stop=lambda new, counts: torch.ones(3, dtype=torch.bool))
    assert first.shape[1] < 6 + 24 and model.last_generation.passes <= model.block_size


# --- mask diffusion ---


@pytest.mark.parametrize("by", ["eos", "stop"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_a_row_that_ends_within_a_block_gets_no_further_passes(by, token_shift):
    """From the left, one token a pass: so a row has as many passes as tokens."""
    model, ids = tiny_model(token_shift=token_shift), random_ids(2, 6)
    settings = {"block_size": 8, "sampler": "prefix:1"}
    whole = model.generate_mask_diffusion(ids, 24, eos_token_id=(), **settings)[:, 6:]
    row = whole[0].tolist()
    end = next(place for place in range(9, 24) if row[place] not in row[:place] and place % 8 < 6)
    lengths = torch.tensor([end + 1, 3])
    if by == "eos":
        found = model.generate_mask_diffusion(ids[:1], 24, eos_token_id=row[end], **settings)[:, 6:]
        expected_passes = end + 1
    else:
        found = model.generate_mask_diffusion(
            ids, 24, eos_token_id=(), stop=lambda new, counts: counts >= lengths, **settings
        )[:, 6:]
        assert torch.equal(found[1], torch.cat([whole[1, :3], whole[1, 2].expand(end - 2)]))
        expected_passes = end + 1 + 3
    assert torch.equal(found[0], whole[0, : end + 1])
    stats = model.last_generation
    assert (stats.passes, stats.row_passes, stats.new_tokens) == (end + 1, expected_passes, expected_passes)


def test_commit_takes_the_most_confident_as_many_as_the_rule_says():
    confidence = torch.tensor([[0.95, 0.2, 0.99, 0.5], [0.1, 0.3, 0.2, 0.4], [0.9] * 4, [1.0] * 4])
    masked = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)

    def rule(threshold, steps_left):
        return positions_to_commit(masked, confidence, masked & (confidence > threshold), steps_left=steps_left)

    few = rule(0.9, 16)
    assert few.long().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    half = rule(0.9, 2)  # ceil(3 / 2) = 2 of the second row
    assert half.long().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert torch.equal(rule(0.9, 1), masked)
    assert torch.equal(rule(0.0, 16), masked)


def record_steps(model, ids, *, new, **settings):
    steps = []
    return model.generate_mask_diffusion(ids, new, on_step=steps.append, **settings), steps


@pytest.mark.parametrize(("steps", "threshold"), [(16, 0.3), (5, 0.9), (1, 0.9), (16, 1.0), (40, 0.2)])
def test_the_rule_of_committing(steps, threshold):
    model, prompt = tiny_model(), random_ids(3, 7)
    with torch.no_grad():
        model.lm_head.weight[MASK] *= 50  # a model that would often choose the mask token
    settings = {"block_size": 16, "steps_per_block": steps, "confidence_threshold": threshold}
    written, recorded = record_steps(model, prompt, new=32, **settings)
    assert written.shape == (3, 7 + 32)
    assert (written != MASK).all()
    passes = 0
    for block in range(2):
        masked, before = torch.ones(3, 16, dtype=torch.bool), torch.full((3, 16), MASK)
        for number, seen in enumerate(each for each in recorded if each.block == block):
            step, ids, now, confidence = seen.step, seen.ids, seen.committed, seen.confidence
            assert step == number
            passes += 1
            active = masked.any(-1)
            torch.testing.assert_close(seen.t, masked.float().mean(-1))
            assert not (now & ~masked).any()
            assert torch.equal(ids[~now], before[~now])  # committed tokens stay, the others stay masked
            assert torch.equal(ids[now], seen.predicted[now])
            assert (seen.predicted != MASK).all()
            assert torch.equal(confidence > 0, masked)
            above = (masked & (confidence > threshold)).sum(-1)
            share = -(-masked.sum(-1) // (steps - step))
            assert torch.equal(now.sum(-1), torch.maximum(above.clamp(min=1), share) * active)
            for row in range(3):
                if now[row].any() and (masked & ~now)[row].any():
                    assert confidence[row][now[row]].min() >= confidence[row][(masked & ~now)[row]].max()
            masked, before = masked & ~now, ids
        assert not masked.any()
        assert torch.equal(before, written[:, 7 + 16 * block : 23 + 16 * block])
    assert model.last_generation.passes == passes <= 2 * min(steps, 16)
    assert model.last_generation.row_passes <= 3 * passes


def test_each_row_is_written_as_if_alone():
    """Rows commit different numbers of tokens, so every row must have its own noise level."""
    model, ids = tiny_model(), random_ids(4, 9)
    settings = {"block_size": 8, "confidence_threshold": 0.25}
    together, steps = record_steps(model, ids, new=24, **settings)
    assert any(len(set(step.committed.sum(-1).tolist())) > 1 for step in steps)
    row_passes = model.last_generation.row_passes
    alone = 0
    for row in range(4):
        single = model.generate_mask_diffusion(ids[row : row + 1], 24, **settings)
        assert torch.equal(single[0], together[row])
        alone += model.last_generation.passes
    assert alone == row_passes


def test_noise_level_and_context_of_every_step():
    """Each step recomputed: t is the masked fraction, the context is all text before the block."""
    model, ids = tiny_model(), random_ids(1, 5)
    written, steps = record_steps(model, ids, new=16, block_size=8, confidence_threshold=1.0)
    for seen in steps:
        cache = model.prefill(written[:, : 5 + 8 * seen.block])
        before = torch.where(seen.committed, MASK, seen.ids)
        logits = model.denoise_block(before, torch.tensor([(8 - seen.step) / 8]), cache)
        logits[..., MASK] = -torch.inf
        best, chosen = logits.softmax(-1).max(-1)
        torch.testing.assert_close(seen.confidence, best.masked_fill(before != MASK, 0.0))
        assert torch.equal(seen.predicted, torch.where(before == MASK, chosen, before))


@pytest.mark.parametrize("new", [1, 15, 16, 20])
def test_any_number_of_new_tokens(new):
    model, ids = tiny_model(), random_ids(2, 1)
    assert torch.equal(model.generate_mask_diffusion(ids, new), model.generate_mask_diffusion(ids, 32)[:, : 1 + new])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_denoiser_with_copies_of_the_states_sees_the_same(pattern):
    """As on two devices: the denoiser has states of its own, updated after every read."""
    model, ids, t = tiny_model(pattern), random_ids(2, 90), torch.tensor([0.5, 1.0])
    shared = model.prefill(ids[:, :0])
    copied = ContextCache(model.context_tower.states(), model.context_tower.states())
    for start, stop in ((0, 5), (5, 6), (6, 80), (80, 90)):
        for cache in (shared, copied):
            model.extend(cache, ids[:, start:stop])
        block = random_ids(2, 16, seed=stop)
        expected = model.denoise_block(block, t, shared)
        torch.testing.assert_close(model.denoise_block(block, t, copied), expected, atol=0, rtol=0)
    for own, theirs in zip(copied.denoiser, copied.context, strict=True):
        assert (own is None and theirs is None) or own is not theirs


def test_placing_both_towers_on_one_device_shares_the_states():
    model, ids = tiny_model(), random_ids(1, 6)
    expected = model.generate_mask_diffusion(ids, 16)
    assert model.place_towers_on_devices("cpu", "cpu") is model
    cache = model.prefill(ids)
    assert cache.denoiser is cache.context
    assert torch.equal(model.generate_mask_diffusion(ids, 16), expected)


# --- sampling ---


def test_sampled_tokens_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probabilities.log().expand(20000, -1)
    for temperature in (1.0, 0.5):
        sampling = Sampling(temperature, None, torch.Generator().manual_seed(0))
        found = torch.bincount(sampling.choose(logits), minlength=4) / 20000
        expected = probabilities ** (1 / temperature)
        torch.testing.assert_close(found, expected / expected.sum(), atol=0.015, rtol=0)
    among_two = Sampling(1.0, 2, torch.Generator().manual_seed(0)).choose(logits)
    assert set(Counter(among_two.tolist())) == {0, 1}


def test_sampling_is_seeded_and_top_1_is_greedy():
    model, ids = tiny_model(), random_ids(2, 5)

    def write(seed, **settings):
        return model.generate_mask_diffusion(ids, 16, generator=torch.Generator().manual_seed(seed), **settings)

    assert torch.equal(write(1, temperature=1.0), write(1, temperature=1.0))
    assert not torch.equal(write(1, temperature=1.0), write(2, temperature=1.0))
    assert torch.equal(write(1, temperature=1.0, top_k=1), write(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"block_size": 0},
        {"steps_per_block": 0},
        {"mask_token_id": VOCABULARY},
        {"temperature": -1.0},
        {"top_k": 0},
        {"confidence_threshold": 1.5},
    ],
)
def test_arguments_out_of_range_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ArgumentError, match=f"{name}: found {value}, expected"):
        tiny_model().generate_mask_diffusion(random_ids(1, 4), **changes)


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])
def test_prompts_of_a_wrong_shape(ids):
    for mode in ("generate_mask_diffusion", "generate_mock_ar", "generate_ar"):
        with pytest.raises(ArgumentError, match="input_ids: found shape"):
            getattr(tiny_model(), mode)(ids)


def test_a_configuration_that_is_not_built_is_refused():
    with pytest.raises(ArgumentError, match="moe_latent_size: found 8, expected None"):
        NemotronHTwoTowerForCausalLM(tiny_config(moe_latent_size=8))


# --- scoring ---


def test_scoring_with_labels_and_padding():
    model, ids = tiny_model(), random_ids(2, 10)
    labels = ids.clone()
    labels[1, 6:] = -100
    with torch.no_grad():
        whole = model(ids, labels=labels)
        expected = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(whole.loss, expected)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        padded = ids.clone()
        padded[1, 6:] = 0
        found = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(found[1, :6], whole.logits[1, :6])
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
        found = model(padded.flip(1), attention_mask=mask.flip(1)).logits
        torch.testing.assert_close(found[1, 4:], model(padded.flip(1)[1:, 4:]).logits[0])
        mask[1, 3] = 0
        with pytest.raises(ArgumentError, match="padding within text"):
            model(ids, attention_mask=mask)


def test_scores_are_those_of_the_logits(monkeypatch):
    model, ids = tiny_model(), random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, :4] = 0, 0
    expected = torch.zeros(3, 10, dtype=torch.float64)
    for row, (first, last) in enumerate(((0, 6), (4, 10), (0, 10))):
        with torch.no_grad():
            logits = model(ids[row : row + 1, first:last]).logits[0, :-1].log_softmax(-1)
        expected[row, first + 1 : last] = logits.gather(-1, ids[row, first + 1 : last].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model.score(ids, mask), expected)
    torch.testing.assert_close(model.score(ids)[2], expected[2])
    monkeypatch.setitem(type(model).score.__globals__, "SCORE_CHUNK", 4)
    torch.testing.assert_close(model.score(ids, mask), expected)
    assert model.score(ids[:, :1]).tolist() == [[0.0]] * 3


def test_the_context_tower_can_be_differentiated():
    model, ids = tiny_model(), random_ids(2, 10)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name == "context_lm_head.weight")
    assert model.context_tower.embeddings.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None


# --- as a folder ---

PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, ids = sys.argv[1], torch.load(sys.argv[2])
out = {}
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", "auto")):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        out[name] = {"dtype": str(model.dtype), "logits": model(ids).logits}
    out[name]["bias"] = str(model.context_tower.layers[1].mixer.gate.e_score_correction_bias.dtype)
    out[name]["written"] = model.generate_mask_diffusion(ids, max_new_tokens=16)
model.save_pretrained(sys.argv[4])
assert "megatron_twotower" not in sys.modules
torch.save(out, sys.argv[3])
"""


def test_the_folder_loads_with_plain_transformers(tmp_path):
    """In a process of its own, from a folder where this package cannot be imported."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, 12)
    save(tmp_path / "model", model)
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [tmp_path / name for name in ("model", "ids.pt", "out.pt", "again")]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, arguments)], check=True, env=environment, cwd=tmp_path, timeout=300
    )
    out = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(out["float32"]["logits"], expected)
    assert torch.equal(out["float32"]["written"], model.generate_mask_diffusion(ids, 16))
    assert out["auto"]["dtype"] == "torch.float32"
    assert out["bfloat16"]["dtype"] == "torch.bfloat16"
    assert {entry["bias"] for entry in out.values()} == {"torch.float32"}
    half = out["bfloat16"]["logits"]
    assert half.isfinite().all()
    assert F.cosine_similarity(half.flatten(), expected.flatten(), dim=0) > 0.99
    assert (out["bfloat16"]["written"] != MASK).all()
    # Saved again, the tensors and their names are the same: no conversion stands between disk and
    # modules.
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


SNIPPET = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.bfloat16, trust_remote_code=True)
model.place_towers_on_devices("DEVICE", "DEVICE")
model.eval()
inputs = tokenizer("France is a country ", return_tensors="pt").to("DEVICE")
outputs = model.generate_mask_diffusion(inputs["input_ids"], max_new_tokens=128, block_size=16, steps_per_block=16, mask_token_id=3,
    temperature=0.1, confidence_threshold=0.8, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(outputs[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""  # noqa: E501


def test_a_loaded_folder_says_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, 5)
    save(tmp_path / "model", model, mask_token_id=20)
    said = {"block_size": 8, "eos_token_id": [44, int(model.generate_ar(ids, 9)[0, 5 + 6])]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert (loaded.mask_token_id, loaded.block_size) == (20, 8)
    assert loaded.eos_token_ids == tuple(said["eos_token_id"])
    for mode, given in {"generate_ar": {}, "generate_mask_diffusion": {"block_size": 8, "mask_token_id": 20}}.items():
        expected = getattr(model, mode)(ids, 20, eos_token_id=said["eos_token_id"], **given)
        assert torch.equal(getattr(loaded, mode)(ids, 20), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (again["block_size"], again["eos_token_id"]) == (8, said["eos_token_id"])


def test_the_snippet_of_the_model_card_runs(tmp_path, tiny_data, monkeypatch, capsys):
    """Word for word, but for the devices."""
    save(tmp_path / "model", tiny_model(dtype=torch.float32, vocab_size=512), vocab_size=512)
    for file in (tiny_data / "tokenizer").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = {"model_name": str(tmp_path / "model")}
    exec(SNIPPET.replace("DEVICE", "cpu"), names)
    assert names["model"].dtype == torch.bfloat16
    assert type(names["model"]).__module__.startswith("transformers_modules.")
    prompt = names["inputs"]["input_ids"].shape[1]
    assert torch.equal(names["outputs"][:, :prompt], names["inputs"]["input_ids"])
    assert prompt < names["outputs"].shape[1] <= prompt + 128
    assert capsys.readouterr().out


def test_the_configuration_gains_only_the_class():
    backbone = tiny_fields()
    added = twotower_config_json(backbone)
    changed = {key for key in added if added[key] != backbone.get(key)}
    assert changed == {"architectures", "auto_map", "model_type"}
    assert added["auto_map"]["AutoModelForCausalLM"].startswith(f"{MODELING_FILE.stem}.")
    assert "architectures" not in backbone
