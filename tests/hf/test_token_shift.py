"""A denoiser whose positions predict the next token (`token_shift` of config.json)."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig

from helpers import models
from helpers.modeling import MASK, PATTERNS, VOCABULARY, become_backbone, random_ids, save, tiny_model
from megatron_twotower.config.schema import ConditioningConfig
from megatron_twotower.evaluate.likelihood import (
    ar_nats,
    ar_scores,
    bound_nats,
    bound_scores,
    masked_loss_by_noise,
    mock_ar_scores,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import ArgumentError, NemotronHTwoTowerForCausalLM


def shifted_model(*arguments, **settings):
    return tiny_model(*arguments, token_shift=True, **settings)


def without_mask_token(model):
    """AR may choose the mask token, mask diffusion may not: now neither does."""
    is_mask = torch.arange(VOCABULARY) == MASK
    for head in (model.context_lm_head, model.lm_head):
        head.register_forward_hook(lambda _, inputs, logits: logits.masked_fill(is_mask, -math.inf))
    return model


def left_padded(rows):
    """Rows of different lengths: ids and attention mask."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return ids, torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_are_those_of_the_one_pass_training_forward(groups, pattern):
    """Positions of the training forward predict a block that begins one token later."""
    config = dataclasses.replace(models.tiny_config(pattern), conditioning=ConditioningConfig())
    config = dataclasses.replace(config, noise=dataclasses.replace(config.noise, token_shift=True))
    trained, source = models.build_two_tower(config, groups)
    batch = models.random_noisy_batch(config)
    with torch.no_grad():
        expected = (trained(batch) @ trained.tower.output_layer.weight.t()).transpose(0, 1)
    shape = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    fields = {key: value for key, value in shape.items() if key != "time_step_clamp"}
    model = NemotronHTwoTowerForCausalLM(NemotronHConfig(**fields, token_shift=True)).double()
    model.load_state_dict({name: source(name) for name in model.state_dict()})
    cache = model.prefill(batch.tokens[:, :1], for_denoiser=True)
    for number, start in enumerate(range(0, 16, 4)):
        last = torch.full((2, 1), 7 + number)  # no position reads the last token of a block
        block = torch.cat([batch.noisy[:, start + 1 : start + 4], last], dim=1)
        logits = model.denoise_block(block, batch.times[:, number], cache)
        torch.testing.assert_close(logits, expected[:, start : start + 4], atol=1e-6, rtol=1e-6)
        model.extend(cache, batch.tokens[:, start + 1 : start + 5])


@pytest.mark.parametrize("copied", [False, True], ids=["one device", "as on two devices"])
def test_a_cache_keeps_the_last_token_however_the_text_is_read(copied):
    model, block, t = shifted_model(), random_ids(3, 4, seed=2), torch.tensor([0.3, 0.6, 1.0])
    rows = [random_ids(1, length, seed=length)[0] for length in (13, 5, 1)]
    more = random_ids(3, 3, seed=4)
    expected = [
        model.denoise_block(
            block[row : row + 1],
            t[row : row + 1],
            model.prefill(torch.cat([ids, more[row]]).unsqueeze(0), for_denoiser=True),
        )
        for row, ids in enumerate(rows)
    ]
    if copied:
        same = model.denoiser_tower.device
        model._empty_cache = lambda: _separate(model, NemotronHTwoTowerForCausalLM._empty_cache(model), same)
    cache = model.prefill(*left_padded(rows), for_denoiser=True)
    model.extend(model.extend(cache, more[:, :1]), more[:, 1:])
    assert torch.equal(cache.last, more[:, 2:])
    torch.testing.assert_close(model.denoise_block(block, t, cache), torch.cat(expected))


def _separate(model, cache, device):
    return dataclasses.replace(cache, denoiser=model.context_tower.states())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_copy_of_the_backbone_writes_its_text(pattern):
    """Blocks of one token, and blocks from the left where no position sees a later one."""
    model = without_mask_token(become_backbone(shifted_model(pattern)))
    for ids, mask in ((random_ids(3, 6), None), left_padded([random_ids(1, length)[0] for length in (7, 1, 3)])):
        expected = model.generate_ar(ids, 12, attention_mask=mask)
        assert torch.equal(model.generate_mask_diffusion(ids, 12, 1, attention_mask=mask), expected)
        if "*" not in pattern:
            written = model.generate_mask_diffusion(ids, 12, 4, attention_mask=mask, sampler="prefix:1")
            assert torch.equal(written, expected)
        assert torch.equal(model.generate_mock_ar(ids, 12, attention_mask=mask), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_the_context_tower_decides_is_its_own_text(pattern):
    model, ids = without_mask_token(shifted_model(pattern)), random_ids(3, 5)
    expected = model.generate_ar(ids, 16)
    assert torch.equal(model.generate_mask_diffusion(ids, 16, 4, sampler="routed:1,0"), expected)
    for size, steps in ((4, 1), (5, 3), (2, 1)):
        assert torch.equal(model.generate_speculative(ids, 16, size, steps), expected)


def test_drafts_of_a_copy_of_the_backbone_begin_with_its_token():
    model = without_mask_token(become_backbone(shifted_model("M")))
    model.generate_speculative(random_ids(4, 5), 24, 2, 1)
    stats = model.last_generation
    assert stats.accepted == stats.row_passes, "a block of two drafts one token, which is always right"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_likelihoods_of_a_copy_of_the_backbone_are_its_own(pattern):
    model, ids = become_backbone(shifted_model(pattern)), random_ids(3, 12)
    expected = ar_nats(model, ids)
    bound = bound_nats(model, ids, block_size=1, draws=1, seed=0, mask_id=MASK)
    torch.testing.assert_close(bound, expected, atol=1e-5, rtol=1e-5)
    (masked,) = masked_loss_by_noise(model, ids, block_size=1, levels=(1.0,), seed=0, mask_id=MASK)
    assert masked["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    scored = bound_scores(
        model,
        model.prefill(ids[:, :4], for_denoiser=True),
        ids[:, 4:],
        torch.full((3,), 8),
        block_size=1,
        draws=1,
        seed=0,
        mask_id=MASK,
    )
    torch.testing.assert_close(-scored, expected[:, 3:].sum(-1), atol=1e-4, rtol=1e-5)
    nats, _ = mock_ar_scores(model, model.prefill(ids[:, :3]), ids[:, 3:4], ids[:, 4:])
    torch.testing.assert_close(-nats.double(), expected[:, 3:], atol=1e-5, rtol=1e-5)


def test_scores_of_the_context_tower_do_not_depend_on_who_reads_the_last_token():
    model, ids = shifted_model(), random_ids(3, 12)
    for length in (1, 5):
        whole, kept = model.prefill(ids[:, :length]), model.prefill(ids[:, :length], for_denoiser=True)
        torch.testing.assert_close(ar_scores(model, kept, ids[:, length:]), ar_scores(model, whole, ids[:, length:]))


def test_a_cache_is_for_the_tower_that_it_was_read_for():
    model, ids, t = shifted_model(), random_ids(2, 5), torch.ones(2)
    whole, kept = model.prefill(ids), model.prefill(ids, for_denoiser=True)
    expected = model.generate_mask_diffusion(ids, 8, 4)
    assert torch.equal(model.generate_mask_diffusion(ids, 8, 4, cache=copy.deepcopy(kept)), expected)
    assert torch.equal(model.generate_ar(ids, 8, cache=copy.deepcopy(whole)), model.generate_ar(ids, 8))
    with pytest.raises(ArgumentError, match="cache: found a prefill with for_denoiser=False, expected True"):
        model.generate_mask_diffusion(ids, 8, 4, cache=whole)
    with pytest.raises(ArgumentError, match="cache: found a prefill with for_denoiser=True, expected False"):
        model.generate_ar(ids, 8, cache=kept)
    with pytest.raises(ArgumentError, match="cache: found a text that is read to its end, expected text"):
        model.denoise_block(ids, t, whole)
    with pytest.raises(ArgumentError, match="cache: found nothing, expected text"):
        model.denoise_block(ids, t, model.prefill(ids[:, :0], for_denoiser=True))
    with pytest.raises(ArgumentError, match=r"cache: found rows and columns \(2, 5\), expected \(2, 4\)"):
        model.generate_mask_diffusion(ids[:, 1:], 8, 4, cache=kept)
    without = tiny_model()
    plain = without.prefill(ids, for_denoiser=True)
    assert plain.last is None and not plain.keeps_last
    assert torch.equal(without.generate_ar(ids, 8, cache=plain), without.generate_ar(ids, 8))


def test_a_folder_says_it(tmp_path):
    model, ids = shifted_model(dtype=torch.float32), random_ids(2, 6)
    save(tmp_path / "own", model, token_shift=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True).eval()
    assert loaded.token_shift
    assert torch.equal(loaded.generate_mask_diffusion(ids, 8, 4), model.generate_mask_diffusion(ids, 8, 4))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.token_shift and not tiny_model().token_shift
