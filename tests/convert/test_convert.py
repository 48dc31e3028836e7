"""Hugging Face folders to Megatron modules and back, and parity with `transformers`."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import TINY, build_two_tower, random_noisy_batch, tiny_config
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.hf_config import model_from_hf, read_hf_config
from megatron_twotower.convert import hf_folder, initial_weights, load, model_card
from megatron_twotower.mcore import transformer_config
from megatron_twotower.model import parameter_map, towers
from megatron_twotower.train.losses import next_tokens
from megatron_twotower.types import Batch


def transformers_model(model, *, clamp=1e-30, seed=0):
    """A NemotronH of `transformers` with random weights, norms, biases and router corrections."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    fields = model_card.backbone_config_json(model, dtype=torch.float32) | {"time_step_min": clamp}
    for key in ("model_type", "architectures"):
        del fields[key]
    torch.manual_seed(seed)
    reference = NemotronHForCausalLM(NemotronHConfig(**fields)).eval()
    with torch.no_grad():
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            if "norm" in name or name.endswith(".D"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return reference


def backbone_from(folder, config, groups):
    model = towers.BackboneModel(config, transformer_config.transformer_config(config), groups)
    entries = parameter_map.backbone_entries(config.model)
    load.load_weights(model.tower, entries, hf_folder.HfFolder.open(folder), model=config.model, groups=groups)
    return model.eval()


def tensors_of(module, entries, model):
    """The Hugging Face tensors of a module, by name."""
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    found = {}
    for entry in entries:
        parts = parameter_map.hf_from_parameter(entry, parameters[entry.megatron_name].detach(), model)
        found |= dict(zip(entry.hf_names, parts, strict=True))
    return found.__getitem__


@torch.no_grad()
def logits_of(model, tokens):
    numbers = torch.arange(len(tokens))
    hidden = model(next_tokens(Batch(tokens, numbers, numbers, numbers)))
    return (hidden @ model.tower.output_layer.weight.t()).transpose(0, 1)


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M*EM"])
def test_logits_equal_those_of_transformers_also_after_an_export(groups, tmp_path, monkeypatch, pattern):
    from transformers import AutoModelForCausalLM

    config = tiny_config(pattern, objective="ar")
    reference = transformers_model(config.model)
    reference.save_pretrained(tmp_path / "theirs")
    found = model_from_hf(read_hf_config(tmp_path / "theirs"), source="config.json")
    assert found.hybrid_override_pattern == pattern
    tokens = torch.randint(0, 48, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens, use_cache=False).logits
    ours = backbone_from(tmp_path / "theirs", config, groups)
    torch.testing.assert_close(logits_of(ours, tokens), want, rtol=0, atol=1e-4)

    entries = parameter_map.backbone_entries(config.model)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 4000)
    hf_folder.write_folder(
        tmp_path / "ours",
        hf_folder.lazy_tensors(
            tensors_of(ours.tower, entries, config.model), entries, config.model, dtype=torch.float32
        ),
        config=model_card.backbone_config_json(config.model, dtype=torch.float32),
        files={},
        copies=[],
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens, use_cache=False).logits, want, rtol=0, atol=1e-4)
    back, theirs = hf_folder.HfFolder.open(tmp_path / "ours"), hf_folder.HfFolder.open(tmp_path / "theirs")
    for entry in entries:
        for name in entry.hf_names:
            assert torch.equal(back(name), theirs(name)), name


def test_the_time_step_clamp_of_transformers_is_a_setting(groups, tmp_path):
    config = tiny_config("M", objective="ar")
    clamped = dataclasses.replace(config, model=dataclasses.replace(config.model, time_step_clamp=0.4))
    reference = transformers_model(config.model, clamp=0.4)
    reference.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 48, (1, 9))
    with torch.no_grad():
        want = reference(tokens, use_cache=False).logits
    torch.testing.assert_close(
        logits_of(backbone_from(tmp_path / "theirs", clamped, groups), tokens), want, rtol=0, atol=1e-4
    )
    free = logits_of(backbone_from(tmp_path / "theirs", config, groups), tokens)
    assert not torch.allclose(free, want, atol=1e-4), "at 0.4 the clamp must show"


def test_stacked_experts_and_the_model_prefix_are_read(groups, tmp_path):
    config = tiny_config("ME", objective="ar")
    transformers_model(config.model).save_pretrained(tmp_path / "hub")
    hub = hf_folder.HfFolder.open(tmp_path / "hub")
    native = {}
    for key in hub.tensors:
        if ".experts." not in key or "shared" in key:
            native[key.replace("backbone.", "model.")] = hub(key)
    for projection in ("up_proj", "down_proj"):
        stack = [hub(f"backbone.layers.1.mixer.experts.{e}.{projection}.weight") for e in range(6)]
        native[f"model.layers.1.mixer.experts.{projection}"] = torch.stack(stack)
    (tmp_path / "native").mkdir()
    save_file(native, tmp_path / "native" / "model.safetensors")
    tokens = torch.randint(0, 48, (1, 9))
    want = logits_of(backbone_from(tmp_path / "hub", config, groups), tokens)
    assert torch.equal(logits_of(backbone_from(tmp_path / "native", config, groups), tokens), want)


def test_a_missing_or_misshapen_tensor_is_named(groups, tmp_path):
    config = tiny_config("-", objective="ar")
    transformers_model(config.model).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "down_proj" not in k}, file)
    with pytest.raises(UserError, match=r"layers\.0\.mixer\.down_proj\.weight not found"):
        backbone_from(tmp_path / "model", config, groups)
    key = "backbone.layers.0.mixer.down_proj.weight"
    save_file(tensors | {key: tensors[key][:, :-1].contiguous()}, file)
    with pytest.raises(UserError, match=r"found shape \(24, 31\), expected \(24, 32\)"):
        backbone_from(tmp_path / "model", config, groups)
    os.truncate(file, 1000)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        hf_folder.HfFolder.open(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "found model_type 'llama', expected 'nemotron_h'"),
        ("attention_bias", True, "attention_bias: found True, expected False"),
        ("hybrid_override_pattern", "MX", "hybrid_override_pattern: found 'MX'"),
    ],
)
def test_another_models_configuration_is_refused(key, value, message):
    fields = model_card.backbone_config_json(TINY, dtype=torch.float32) | {key: value}
    with pytest.raises(UserError, match=message):
        model_from_hf(fields, source="config.json")


def test_random_weights_depend_on_name_and_seed_alone():
    first, again, other = (initial_weights.random_backbone(TINY, seed=seed) for seed in (1, 1, 2))
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(first(name), again(name)) and not torch.equal(first(name), other(name))
    assert abs(first(name).std() / TINY.initializer_range - 1) < 0.1
    assert abs(first(name).mean()) < 0.003
    assert (torch.nn.functional.softplus(first("backbone.layers.0.mixer.dt_bias")) <= 0.1001).all()


@torch.no_grad()
def test_shipped_model_equals_training_model(groups, tmp_path):
    """For each block, context and noise level, logits of the exported denoiser equal training's."""
    from transformers import AutoModelForCausalLM

    from megatron_twotower.hf import MODELING_FILE, twotower_config_json

    config = tiny_config("ME*-M*")
    config = dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, frequencies=256))
    model, source = build_two_tower(config, groups, dtype=torch.float32)
    entries = parameter_map.denoiser_entries(config.model, 256)

    tensors = hf_folder.lazy_tensors(
        source, parameter_map.context_entries(config.model), config.model, dtype=torch.float32
    )
    trained = tensors_of(model, entries, config.model)
    tensors |= hf_folder.lazy_tensors(trained, entries, config.model, dtype=torch.float32)
    described = twotower_config_json(model_card.backbone_config_json(config.model, dtype=torch.float32))
    hf_folder.write_folder(tmp_path / "model", tensors, config=described, files={}, copies=[MODELING_FILE])
    shipped = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True, dtype=torch.float32
    ).eval()
    batch = random_noisy_batch(config)
    want = (model(batch) @ model.tower.output_layer.weight.t()).transpose(0, 1)
    for b in range(1, 4):
        block = slice(4 * b, 4 * b + 4)
        cache = shipped.prefill(batch.tokens[:, : 4 * b])
        got = shipped.denoise_block(batch.noisy[:, block], batch.times[:, b], cache)
        torch.testing.assert_close(got, want[:, block], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "nemotron_h_twotower"
