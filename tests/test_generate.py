"""Loading folders strictly, writing in every mode, and what is printed."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_hf import save, tiny_model

from megatron_twotower import generate
from megatron_twotower.generate import MODES, Generation, GenerationSettings
from megatron_twotower.records import UserError

VOCABULARY = 512
PROMPT = "def alpha(beta):\n"


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model"
    save(path, tiny_model(dtype=torch.float32, vocab_size=VOCABULARY), vocab_size=VOCABULARY)
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, path / file.name)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return generate.load(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_loading_gives_the_saved_weights(folder, loaded):
    model, tokenizer = loaded
    saved = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert not model.training
    assert generate.mask_token_id(tokenizer) == 3
    assert generate.mask_token_id(SimpleNamespace(mask_token_id=None)) == 3
    assert generate.mask_token_id(SimpleNamespace(mask_token_id=9)) == 9
    assert generate.load(folder, dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_nothing_in_the_folder_is_executed(copy):
    (copy / "modeling_nemotron_h_twotower.py").write_text("raise SystemExit('executed')\n")
    generate.load(copy)


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


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: shutil.rmtree(f), "config.json: not found"),
    (lambda f: change_config(f, architectures=["NemotronHForCausalLM"]), "found .'NemotronHForCausalLM'., expected"),
    (lambda f: change_config(f, hybrid_override_pattern="MEMME"), "cannot be loaded|missing keys|unexpected keys"),
    (lambda f: change_config(f, hidden_size=64), "cannot be loaded|mismatched keys"),
    (lambda f: change_config(f, moe_latent_size=8), "moe_latent_size: found 8, expected None"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    (truncate, "cannot be loaded"),
    (drop_tensor, r"missing keys: found 1 \(denoiser_tower.layers.0.mixer.A_log\), expected none"),
    (add_tensor, r"unexpected keys: found 1 \(extra.weight\), expected none"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused_in_one_line(copy, spoil, message):
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        generate.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes(loaded, mode):
    model, tokenizer = loaded
    settings = GenerationSettings(max_new_tokens=20)
    found = generate.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)
    prompt_ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert found.ids[: len(prompt_ids)].tolist() == prompt_ids
    new = found.ids[len(prompt_ids) :].tolist()
    assert 1 <= len(new) == found.new_tokens <= 20
    end = tokenizer.eos_token_id
    assert found.text == tokenizer.decode(new[:-1] if new[-1] == end else new)
    assert len(new) == 20 or new[-1] == end
    assert found.tokens_per_pass == found.new_tokens / found.passes
    again = generate.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)
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
        return generate.generate(model, tokenizer, PROMPT, mode=mode, settings=settings)

    assert written(confidence_threshold=0.0).passes <= 2
    assert written(confidence_threshold=1.0, steps_per_block=4).passes in (4, 8)
    # Every committed token in a pass of its own: blocks of 8 take 8 passes each.
    assert written(confidence_threshold=1.0, block_size=8).passes % 8 == 0
    for mode in MODES:
        sampled = [written(mode, temperature=1.0, seed=seed).ids.tolist() for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        assert written(mode, temperature=1.0, top_k=1).ids.tolist() == written(mode).ids.tolist()


@pytest.mark.parametrize(("prompt", "mode", "settings", "message"), [
    ("", "ar", {}, "prompt: found no text"),
    (PROMPT, "speculation", {}, "mode: found 'speculation', expected one of mask_diffusion, mock_ar, ar, speculative"),
    (PROMPT, "ar", {"max_new_tokens": 0}, "max_new_tokens: found 0"),
    (PROMPT, "mask_diffusion", {"block_size": -1}, "block_size: found -1"),
    (PROMPT, "mock_ar", {"temperature": -0.5}, "temperature: found -0.5"),
])  # fmt: skip
def test_mistakes_are_named(loaded, prompt, mode, settings, message):
    with pytest.raises(UserError, match=message):
        generate.generate(*loaded, prompt, mode=mode, settings=GenerationSettings(**settings))


@pytest.mark.parametrize(("mode", "tower"), [("ar", "context tower"), ("mask_diffusion", "denoiser")])
def test_printing_takes_text_as_it_is(mode, tower):
    found = Generation(mode, "x = [bold]", "1[/bold] # :smile:\n", torch.arange(3), 12, 4, 0.5)
    stream = io.StringIO()
    generate.print_generation(found, Console(file=stream, width=40))
    text, figures = stream.getvalue().rsplit("\n", 2)[:2]
    assert text == "x = [bold]1[/bold] # :smile:\n"
    assert figures == f"{mode}: 12 tokens in 4 passes of the {tower} (3.00 per pass), 0.50 s, 24 tokens/s"


def test_printing_says_how_much_of_the_drafts_was_accepted():
    found = Generation("speculative", "x", "y", torch.arange(3), 12, 4, 0.5, accepted=9)
    stream = io.StringIO()
    generate.print_generation(found, Console(file=stream, width=40))
    assert "in 4 passes of the context tower" in stream.getvalue()
    assert stream.getvalue().endswith("24 tokens/s, 2.25 drafted tokens accepted per pass\n")


def test_greedy_speculation_is_ar(loaded):
    settings = GenerationSettings(max_new_tokens=24)
    ar, speculative = (
        generate.generate(*loaded, PROMPT, mode=mode, settings=settings) for mode in ("ar", "speculative")
    )
    assert torch.equal(ar.ids, speculative.ids)
    assert ar.accepted is None
    assert speculative.accepted is not None


def test_prompts_of_different_lengths_are_written_together(loaded):
    model, tokenizer = loaded
    prompts = tokenizer([PROMPT, "x"], add_special_tokens=False)["input_ids"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    settings = GenerationSettings(max_new_tokens=12)
    for mode in MODES:
        written, _ = generate.write(
            model, ids, mode=mode, settings=settings, mask_id=3, eos_id=None, attention_mask=mask
        )
        for row, prompt in zip(written, prompts, strict=True):
            alone, _ = generate.write(
                model, torch.tensor([prompt]), mode=mode, settings=settings, mask_id=3, eos_id=None
            )
            assert torch.equal(row[longest:], alone[0, len(prompt) :])


def test_the_command(folder, loaded, capsys):
    status = generate.run(
        folder, prompt=PROMPT, mode="ar", max_new_tokens=6, block_size=16, steps_per_block=16,
        confidence_threshold=0.8, temperature=0.0, seed=0,
    )  # fmt: skip
    out = capsys.readouterr().out
    expected = generate.generate(*loaded, PROMPT, mode="ar", settings=GenerationSettings(max_new_tokens=6))
    assert status == 0
    assert out.startswith(PROMPT)
    assert f"ar: {expected.new_tokens} tokens in {expected.passes} passes" in out
