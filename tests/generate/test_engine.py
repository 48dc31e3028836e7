"""Folders are loaded strictly, and every mode generates text."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_twotower.common.errors import UserError
from megatron_twotower.generate import engine
from megatron_twotower.generate.engine import MODES, Callbacks, GenerationSettings, pad_left

PROMPT = "def alpha(beta):\n"


@pytest.fixture(scope="module")
def loaded(two_tower_folder):
    return engine.load(two_tower_folder)


@pytest.fixture
def copy(two_tower_folder, tmp_path):
    return shutil.copytree(two_tower_folder, tmp_path / "copy")


def test_loading_gives_the_saved_weights(two_tower_folder, loaded):
    model, tokenizer = loaded
    saved = load_file(two_tower_folder / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert not model.training
    assert (model.mask_token_id, model.block_size, model.eos_token_ids) == (3, 16, (2,))
    assert engine.eos_token_ids(model, tokenizer) == (2,)
    assert engine.load(two_tower_folder, dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_nothing_in_the_folder_is_executed(copy):
    (copy / "modeling_nemotron_h_twotower.py").write_text("raise SystemExit('executed')\n")
    engine.load(copy)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["denoiser_tower.layers.0.mixer.A_log"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder):
    tensors = load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "config.json: not found"),
        (
            lambda f: change_config(f, architectures=["NemotronHForCausalLM"]),
            "found .'NemotronHForCausalLM'., expected",
        ),
        (lambda f: change_config(f, hybrid_override_pattern="MEMME"), "cannot be loaded|missing keys|unexpected keys"),
        (lambda f: change_config(f, hidden_size=64), "cannot be loaded|mismatched keys"),
        (lambda f: change_config(f, moe_latent_size=8), "moe_latent_size: found 8, expected None"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (truncate, "cannot be loaded"),
        (drop_tensor, r"missing keys: found 1 \(denoiser_tower.layers.0.mixer.A_log\), expected none"),
        (add_tensor, r"unexpected keys: found 1 \(extra.weight\), expected none"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(copy, spoil, message):
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        engine.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def say(folder, **fields):
    """Write a generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_what_the_folder_says_rules_and_every_eos_ends_a_text(loaded, copy, mode):
    """The tokenizer names no mask token; its EOS is one of two."""
    names = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(names | {"mask_token": None}))
    free = engine.load(say(copy, mask_token_id=500, block_size=8))
    assert (free[0].mask_token_id, free[0].block_size, free[0].eos_token_ids) == (500, 8, (2,))
    settings = GenerationSettings(max_new_tokens=24)
    ids = torch.tensor([free[1](PROMPT, add_special_tokens=False)["input_ids"]])
    arguments = {"mask_diffusion": {"mask_token_id": 500, "block_size": 8, "confidence_threshold": 0.8}}
    arguments["speculative"] = {"mask_token_id": 500, "block_size": 8}
    whole = getattr(free[0], f"generate_{mode}")(ids, 24, eos_token_id=(), **arguments.get(mode, {}))
    new = whole[0, ids.shape[1] :].tolist()
    assert len(new) == 24
    other = next(token for token in new[3:] if token != 2)
    end = min(new.index(token) for token in (2, other) if token in new)
    model, tokenizer = engine.load(say(copy, mask_token_id=500, block_size=8, eos_token_id=[2, other]))
    assert model.eos_token_ids == (2, other)
    found = engine.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)
    assert found.ids[ids.shape[1] :].tolist() == new[: end + 1]
    assert found.text == tokenizer.decode(new[:end])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mask_token_id": 5}, "found mask_token_id 5 .* the mask token of tokenizer_config.json has id 3"),
        ({"eos_token_id": [7, 8]}, r"found eos_token_id 7, 8, but the EOS of tokenizer_config.json has id 2"),
        ({"mask_token_id": [3, 4]}, r"mask_token_id: found 3 and 4 in generation_config.json"),
        ({"block_size": 0}, "generation_config.json: block_size: found 0, expected whole numbers from 1"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: found .*, expected whole numbers from 0"),
        ({"eos_token_id": [2, 3], "mask_token_id": 3}, "mask_token_id: found 3, which is EOS too"),
    ],
)
def test_files_that_disagree_are_refused_by_name(copy, said, message):
    with pytest.raises(UserError, match=message) as raised:
        engine.load(say(copy, **said))
    assert "\n" not in str(raised.value)


def test_a_block_size_above_the_trained_ones_is_warned_of(loaded, caplog):
    model, _ = loaded
    engine.warn_of_larger_blocks(model, 16)
    engine.warn_of_larger_blocks(model, None)
    assert not caplog.records
    engine.warn_of_larger_blocks(model, 32)
    assert "block_size 32: the denoiser was trained with blocks of 16" in caplog.text
    assert engine.with_block_size(model, GenerationSettings()) == GenerationSettings(block_size=16)
    assert engine.with_block_size(model, GenerationSettings(block_size=8)).block_size == 8


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates(loaded, mode):
    model, tokenizer = loaded
    settings = GenerationSettings(max_new_tokens=20)
    found = engine.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)
    prompt_ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert found.ids[: len(prompt_ids)].tolist() == prompt_ids
    new = found.ids[len(prompt_ids) :].tolist()
    assert 1 <= len(new) == found.new_tokens <= 20
    end = tokenizer.eos_token_id
    assert found.text == tokenizer.decode(new[:-1] if new[-1] == end else new)
    assert len(new) == 20 or new[-1] == end
    assert found.tokens_per_pass == found.new_tokens / found.passes
    again = engine.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)
    assert torch.equal(again.ids, found.ids)
    # The same as the model's own method.
    own = getattr(model, f"generate_{mode}")
    extra = {"confidence_threshold": 0.8} if mode == "mask_diffusion" else {}
    expected = own(torch.tensor([prompt_ids]), max_new_tokens=20, eos_token_id=end, **extra)
    assert torch.equal(found.ids, expected[0])


def test_settings_reach_the_model(loaded):
    model, tokenizer = loaded

    def written(mode="mask_diffusion", **settings):
        settings = GenerationSettings(max_new_tokens=32, **settings)
        return engine.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)

    assert written(confidence_threshold=0.0).passes <= 2
    assert written(confidence_threshold=1.0, steps_per_block=4).passes in (4, 8)
    # Every committed token in a pass of its own: blocks of 8 take 8 passes each.
    assert written(confidence_threshold=1.0, block_size=8).passes % 8 == 0
    assert written(sampler="factor:0", block_size=8).passes % 8 == 0
    assert written(sampler="early_end:1,1").passes <= 2
    for mode in MODES:
        sampled = [written(mode, temperature=1.0, seed=seed).ids.tolist() for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        assert written(mode, temperature=1.0, top_k=1).ids.tolist() == written(mode).ids.tolist()


@pytest.mark.parametrize(
    ("prompt", "mode", "settings", "message"),
    [
        ("", "ar", {}, "prompt: found no text"),
        (
            PROMPT,
            "speculation",
            {},
            "mode: found 'speculation', expected one of mask_diffusion, mock_ar, ar, speculative",
        ),
        (PROMPT, "ar", {"max_new_tokens": 0}, "max_new_tokens: found 0"),
        (PROMPT, "mask_diffusion", {"block_size": -1}, "block_size: found -1"),
        (PROMPT, "mock_ar", {"temperature": -0.5}, "temperature: found -0.5"),
    ],
)
def test_mistakes_are_named(loaded, prompt, mode, settings, message):
    with pytest.raises(UserError, match=message):
        engine.generate(*loaded, prompt, mode=mode, settings=GenerationSettings(**settings))


def test_greedy_speculation_is_ar(loaded):
    settings = GenerationSettings(max_new_tokens=24)
    ar, speculative = (engine.generate(*loaded, PROMPT, mode=mode, settings=settings) for mode in ("ar", "speculative"))
    assert torch.equal(ar.ids, speculative.ids)
    assert ar.accepted is None
    assert speculative.accepted is not None


def test_prompts_of_different_lengths_share_a_batch(loaded):
    model, tokenizer = loaded
    prompts = tokenizer([PROMPT, "x"], add_special_tokens=False)["input_ids"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    settings = GenerationSettings(max_new_tokens=12)
    for mode in MODES:
        written, _ = engine.generate_ids(
            model, ids, mode=mode, settings=settings, mask_id=3, eos_id=None, attention_mask=mask
        )
        for row, prompt in zip(written, prompts, strict=True):
            alone, _ = engine.generate_ids(
                model, torch.tensor([prompt]), mode=mode, settings=settings, mask_id=3, eos_id=None
            )
            assert torch.equal(row[longest:], alone[0, len(prompt) :])


def test_padding_is_on_the_left_and_only_where_needed():
    ids, mask = pad_left([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([[5, 6], [7, 8]])[1] is None


def test_callbacks_receive_every_token(loaded):
    settings = GenerationSettings(max_new_tokens=20, block_size=8)
    for mode in MODES:
        steps, tokens = [], []
        callbacks = Callbacks(steps.append, lambda ids, is_text, into=tokens: into.extend(ids[is_text].tolist()))
        found = engine.generate(*loaded, PROMPT, mode=mode, settings=settings, callbacks=callbacks)
        new = found.ids[-found.new_tokens :].tolist()
        if mode == "mask_diffusion":
            last = {step.block: step.ids[0].tolist() for step in steps}
            assert len(steps) == found.passes
            assert [token for ids in last.values() for token in ids][: len(new)] == new
            assert not tokens
        else:
            assert tokens == new
            assert not steps


def test_towers_are_placed_on_the_named_devices(loaded):
    model, tokenizer = loaded
    settings = GenerationSettings(max_new_tokens=8)
    expected = engine.generate(model, tokenizer, PROMPT, settings=settings)
    engine.place_towers(model, ("cpu", "cpu"))
    assert torch.equal(engine.generate(model, tokenizer, PROMPT, settings=settings).ids, expected.ids)
    with pytest.raises(UserError, match="device: found nowhere, expected one"):
        engine.place_towers(model, ("nowhere",))
    with pytest.raises(UserError, match=r"found cpu cpu cpu, expected one or two$"):
        engine.place_towers(model, ("cpu",) * 3)
    assert str(model.context_tower.device) == "cpu"
