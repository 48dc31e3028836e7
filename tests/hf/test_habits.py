"""An exported folder in the hands of transformers, accelerate, PEFT and torch.

Devices, shards, dtypes, copies, compilation, gradient checkpointing, adapters of one tower.
"""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers.modeling import known, random_ids, save, tiny_model
from megatron_twotower.hf.modeling_nemotron_h_twotower import check_devices

PATTERN = known("ME*-")
TOWERS = ("context_tower", "context_lm_head", "denoiser_tower", "lm_head", "t_embedder", "t_block")
PARTS = (*TOWERS, "scale_shift_tables")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("habits") / "model"
    save(path, tiny_model(PATTERN, dtype=torch.float32), pattern=PATTERN)
    return path


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@torch.no_grad()
def texts(model, ids=None):
    ids = random_ids(2, 5) if ids is None else ids
    return (
        model(input_ids=ids).logits,
        model.generate(input_ids=ids, max_new_tokens=8),
        model.generate_mask_diffusion(ids, 8),
        model.generate_speculative(ids, 8),
    )


def assert_same(first, second):
    for one, other in zip(texts(first), texts(second), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# --- devices ---


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), dict.fromkeys(PARTS, "cpu")])
def test_device_maps_on_a_machine_without_gpu(folder, model, device_map):
    pytest.importorskip("accelerate")
    assert_same(load(folder, device_map=device_map), model)


def test_both_towers_with_hooks_of_accelerate(model):
    """On a CPU, these are the hooks that move tensors where towers are on two devices."""
    accelerate = pytest.importorskip("accelerate")
    dispatched = accelerate.dispatch_model(copy.deepcopy(model), dict.fromkeys(PARTS, "cpu"), force_hooks=True)
    assert dispatched.context_tower._hf_hook is not None
    assert_same(dispatched, model)


def on_disk(*names):
    """A device map with some modules on the disk and all others on the CPU."""
    parts = [*TOWERS[:2], *(f"denoiser_tower.{part}" for part in ("embeddings", "norm_f")), *PARTS[3:]]
    parts += [f"denoiser_tower.layers.{number}" for number in range(len(PATTERN))]
    return dict.fromkeys(parts, "cpu") | dict.fromkeys(names, "disk")


def test_what_can_be_offloaded_to_the_disk(folder, model, tmp_path):
    pytest.importorskip("accelerate")
    layers = [f"denoiser_tower.layers.{number}" for number, kind in enumerate(PATTERN) if kind != "M"]
    offloaded = load(folder, device_map=on_disk(*layers, "lm_head", "context_lm_head"), offload_folder=tmp_path)
    assert all(offloaded.get_parameter(f"{layer}.norm.weight").is_meta for layer in layers)
    assert_same(offloaded, model)
    ids = random_ids(2, 6)
    torch.testing.assert_close(offloaded.score(ids), model.score(ids))


@pytest.mark.parametrize("name", ["denoiser_tower.embeddings", "denoiser_tower.layers.0", "scale_shift_tables"])
def test_what_cannot_be_offloaded_is_refused(folder, tmp_path, name):
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=rf"^device_map: found {name}\..* offloaded, expected it on a device"):
        load(folder, device_map=on_disk(name), offload_folder=tmp_path)


def test_a_tower_on_two_devices_is_refused():
    names = ("context_tower.embeddings.weight", "context_tower.layers.3.norm.weight", "denoiser_tower.norm_f.weight")
    first, second, offloaded = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("meta")
    check_devices(dict(zip(names, (first, first, second), strict=True)))
    check_devices(dict(zip(names, (first, offloaded, second), strict=True)))
    with pytest.raises(ValueError, match=r"^device_map: found context_tower on cuda:0 and cuda:1, expected one device"):
        check_devices(dict(zip(names, (first, second, second), strict=True)))


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match=r"^continuous batching: found a request, expected none"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


# --- shards ---


def test_shards_are_saved_and_read_again(model, tmp_path):
    model.generation_config = GenerationConfig(block_size=8, mask_token_id=2, custom_generate="mask_diffusion")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    assert len(shards) > 3 and set(index) == set(model.state_dict())
    for shard in shards:
        assert {name for name, home in index.items() if home == shard} == set(load_file(tmp_path / shard))
    assert (tmp_path / "modeling_nemotron_h_twotower.py").is_file()
    again = load(tmp_path)
    assert (again.block_size, again.mask_token_id) == (8, 2)
    assert again.generation_config.custom_generate == "mask_diffusion"
    assert_same(again, model)
    ids = random_ids(1, 4)
    assert torch.equal(again.generate(ids, max_new_tokens=6), model.generate_mask_diffusion(ids, 6))


# --- dtypes and attention ---


@pytest.mark.parametrize("form", ["bfloat16", torch.bfloat16, "auto", "float64", {"": torch.bfloat16}])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_forms_of_dtype(folder, model, form, name):
    found = load(folder, **{name: form})
    wanted = {"auto": torch.float32, "float64": torch.float64}.get(
        form if isinstance(form, str) else "", torch.bfloat16
    )
    others = {name.rpartition(".")[2]: each.dtype for name, each in found.named_parameters() if each.dtype != wanted}
    assert others == ({} if wanted == torch.float32 else {"A_log": torch.float32})
    bias = found.context_tower.layers[1].mixer.gate.e_score_correction_bias
    assert bias.dtype == (torch.float64 if wanted == torch.float64 else torch.float32)
    logits = texts(found)[0]
    torch.testing.assert_close(
        logits.float(), texts(model)[0], atol=0.3 if wanted == torch.bfloat16 else 1e-4, rtol=0.1
    )


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
def test_other_implementations_of_attention_are_refused(folder, name):
    with pytest.raises((ValueError, ImportError), match=r"(?i)attn_implementation|attention"):
        load(folder, attn_implementation=name)


# --- copies ---


def test_a_copy_is_independent_and_generates_after_generation(model):
    texts(model)
    copied = pickle.loads(pickle.dumps(model))
    assert_same(copied, model)
    with torch.no_grad():
        copied.context_lm_head.weight.zero_()
    assert not torch.equal(texts(copied)[0], texts(model)[0])


# --- compilation ---


@pytest.mark.slow
def test_forward_and_a_pass_are_compiled(model):
    expected = texts(model)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for found, right in zip(texts(compiled), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    one_graph = copy.deepcopy(model)
    one_graph.denoise_hidden = torch.compile(one_graph.denoise_hidden, backend="eager", fullgraph=True)
    forward = copy.deepcopy(model)
    forward.forward = torch.compile(forward.forward, backend="eager", fullgraph=True)
    for other in (in_place, one_graph, forward):
        for found, right in zip(texts(other), expected, strict=True):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


# --- gradient checkpointing ---


def gradients(model, ids):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="labels: this loss trains the context tower alone")
        model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(model, use_reentrant):
    ids, calls = random_ids(2, 7), []
    plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    for each in (plain, checkpointed):
        each.context_tower.layers[1].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(plain, ids)
    assert len(calls) == 1
    found = gradients(checkpointed, ids)
    assert len(calls) == 3, "the layer runs a second time in the backward pass"
    assert expected.keys() == found.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    # In training mode it generates as before, and after switching off it computes each layer once.
    with torch.no_grad():
        text = random_ids(1, 4)
        assert torch.equal(checkpointed.generate_mask_diffusion(text, 6), model.generate_mask_diffusion(text, 6))
    checkpointed.gradient_checkpointing_disable()
    calls.clear()
    gradients(checkpointed, ids)
    assert len(calls) == 1


# --- adapters of one tower ---


@pytest.mark.parametrize("tower", ["context_tower", "denoiser_tower"])
def test_an_adapter_of_one_tower(folder, model, tmp_path, tower):
    peft = pytest.importorskip("peft")
    other = "denoiser_tower" if tower == "context_tower" else "context_tower"
    config = peft.LoraConfig(
        r=4, target_modules=rf".*{tower}.*(q_proj|up_proj|in_proj)", task_type="CAUSAL_LM", init_lora_weights=False
    )
    plain = texts(model)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    named = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert named and all(tower in name and other not in name for name in named)
    found = texts(adapted)
    # The context tower decides on AR and on what is accepted; the denoiser on mask diffusion.
    changed = [not torch.equal(*pair) for pair in zip(found, plain, strict=True)]
    assert changed == ([True] * 4 if tower == "context_tower" else [False, False, True, False])
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    for pair in zip(texts(again), found, strict=True):
        assert torch.equal(*pair)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for one, right in zip(texts(load(tmp_path / "merged")), found, strict=True):
        torch.testing.assert_close(one, right, atol=1e-3, rtol=1e-3)
    if tower == "denoiser_tower":
        with pytest.raises(ValueError, match=r"^labels: found nothing to train in the context tower"):
            gradients(adapted, random_ids(2, 5))
