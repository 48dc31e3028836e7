"""Weight-only quantisation: which weights, their bytes, their loss, folders, and refusals."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.modeling import known, random_ids, save, tiny_model
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate import quantization
from megatron_twotower.generate.engine import load
from megatron_twotower.generate.quantization import KINDS, LEFT_OUT, Quantization, is_quantized
from megatron_twotower.generate.quantized_folder import quantize_folder
from megatron_twotower.hf.modeling_nemotron_h_twotower import MixtureOfExperts, NemotronHTwoTowerForCausalLM

installed = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (extra `quantize`)"
)
# Widths of a multiple of 64, as int4 needs.
SHAPE = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "intermediate_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "head_dim": 16,
    "vocab_size": 512,
}
PATTERN = known("ME*-")


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "model"
    save(path, tiny_model(PATTERN, dtype=torch.float32, **SHAPE), pattern=PATTERN, **SHAPE)
    for file in (tiny_data / "tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def towers_of(model):
    """The towers whose linear layers are quantised, all of them; and that nothing else is."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(name.partition(".")[0], set()).add(is_quantized(module.weight))
    assert not any(is_quantized(p) for n, p in model.named_parameters() if not n.endswith("proj.weight"))
    assert all(len(each) == 1 for each in found.values()), found
    return {name for name, (each,) in found.items() if each}


def plain(weight):
    return weight.dequantize() if is_quantized(weight) else weight


@torch.no_grad()
def dequantised(model):
    """A model of plain weights with the numbers of a quantised one."""
    other = NemotronHTwoTowerForCausalLM(model.config).to(torch.float32)
    other.load_state_dict({name: plain(tensor).float() for name, tensor in model.state_dict().items()})
    return other.eval()


@torch.no_grad()
def logits_of(model):
    ids, block = random_ids(2, 9), random_ids(2, 4, seed=3)
    return model(ids).logits, model.denoise_block(block, torch.ones(2), model.prefill(ids))


# The largest difference of a weight, in units of the largest of its row or group: half a step.
STEP = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 1 / 16}


@installed
@pytest.mark.parametrize("towers", LEFT_OUT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_towers_are_quantised(folder, kind, towers):
    expected, _ = load(folder)
    model, _ = load(folder, quantization=Quantization(kind, towers))
    assert towers_of(model) == {"both": {"context_tower", "denoiser_tower"}}.get(towers, {f"{towers}_tower"})
    for name, tensor in model.state_dict().items():
        wanted = expected.state_dict()[name]
        assert (plain(tensor) - wanted).abs().max() <= STEP[kind] * wanted.abs().max() * 1.01, name
    for found, wanted in zip(logits_of(model), logits_of(dequantised(model)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    ids = random_ids(2, 5)
    assert torch.equal(model.generate_mask_diffusion(ids, 8), dequantised(model).generate_mask_diffusion(ids, 8))


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_factors_for_each_row_are_in_one_tensor(folder, kind, monkeypatch):
    model, _ = load(folder, quantization=Quantization(kind))
    found = logits_of(model)
    stacks = [module._stack for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if kind == "int4":
        assert stacks == [None, None]
    else:
        assert all(stack.up.dtype == model.context_tower.layers[1].mixer.experts[0].up_proj.weight.qdata.dtype
                   for stack in stacks)  # fmt: skip
        assert quantization.weight_bytes(model) == quantization.expected_bytes(load(folder)[0], Quantization(kind))
    monkeypatch.setattr(MixtureOfExperts, "stack", lambda *_: None)
    for module in model.modules():
        monkeypatch.setattr(module, "_stack", None, raising=False)
    for own, modules in zip(found, logits_of(model), strict=True):
        torch.testing.assert_close(own, modules, atol=1e-3, rtol=1e-3)


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_pair_is_written_and_read(folder, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    output = tmp_path / "small"
    assert main.main(["convert", "quantize", "--from", str(folder), "--to", str(output), "--quantize", kind]) == 0
    assert f"in {kind}; weights" in capsys.readouterr().out
    expected, _ = load(folder, quantization=Quantization(kind))
    expected = logits_of(expected)
    again, _ = load(output)
    plainly = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    for model in (again, plainly):
        assert towers_of(model) == {"context_tower", "denoiser_tower"}
        for found, wanted in zip(logits_of(model), expected, strict=True):
            assert torch.equal(found, wanted)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    assert main.main(["generate", "--model", str(output), "--prompt", "def", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    words = ["generate", "--model", str(output), "--prompt", "def", "--quantize", "int8"]
    assert main.main(words) == 2
    assert capsys.readouterr().err == f"twotower: --quantize: found int8, expected none: {output} is quantised\n"
    assert main.main(["convert", "quantize", "--from", str(folder), "--to", str(output), "--quantize", kind]) == 2
    assert "exists, expected a folder that is not there yet" in capsys.readouterr().err


@installed
def test_a_quantised_folder_is_not_converted(folder, tmp_path, capsys):
    output = tmp_path / "small"
    quantize_folder(folder, output, Quantization("int8"))
    for verb in ("export", "import"):
        assert main.main(["convert", verb, "--from", str(output), "--to", str(tmp_path / verb)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "quantization_config" in error and not (tmp_path / verb).exists()


@installed
def test_the_text_of_a_command_is_that_of_the_quantised_model(folder, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "def main"}\n')
    words = ["generate", "--model", str(folder), "--max-new-tokens", "12", "--quantize", "int4"]
    assert main.main([*words, "--prompt", "def main"]) == 0
    shown = capsys.readouterr().out
    assert main.main([*words, "--prompts", str(prompts), "--output", str(output)]) == 0
    text = json.loads(output.read_text())["text"]
    assert text.strip() and text.split()[0] in shown


@installed
def test_widths_that_int4_does_not_fit_are_refused(two_tower_folder):
    with pytest.raises(UserError, match=r"json: hidden_size: found 32, expected a multiple of 64 for --quantize int4"):
        load(two_tower_folder, quantization=Quantization("int4"))


@installed
def test_a_denoiser_alone_gets_a_quantised_backbone(folder, tmp_path):
    from megatron_twotower.convert.export import ExportOptions, export

    backbone, denoiser = tmp_path / "backbone", tmp_path / "denoiser"
    export(folder, backbone, options=ExportOptions(what="context"))
    export(folder, denoiser, options=ExportOptions(what="denoiser", backbone=backbone))
    assert (denoiser / "context_tower.json").is_file()
    expected, _ = load(folder, quantization=Quantization("int8"))
    found, _ = load(denoiser, quantization=Quantization("int8"))
    assert towers_of(found) == {"context_tower", "denoiser_tower"}
    for own, wanted in zip(logits_of(found), logits_of(expected), strict=True):
        assert torch.equal(own, wanted)


def test_without_torchao_there_is_one_line(two_tower_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    line = "found no torchao, expected it (pip install 'megatron-twotower[quantize]')\n"
    assert main.main(["generate", "--model", str(two_tower_folder), "--prompt", "a", "--quantize", "int8"]) == 2
    assert capsys.readouterr().err == f"twotower: --quantize int8: {line}"
    for file in two_tower_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    assert main.main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    assert capsys.readouterr().err == f"twotower: {tmp_path}/config.json: quantization_config: {line}"


def test_an_unknown_kind_or_tower_is_named():
    with pytest.raises(UserError, match="--quantize: found 'int3', expected one of int8, int4, fp8"):
        quantization.quantization_config(Quantization("int3"), torch.device("cpu"))
    with pytest.raises(UserError, match="--quantized-towers: found 'one', expected one of both, context, denoiser"):
        quantization.quantization_config(Quantization("int8", "one"), torch.device("cpu"))
