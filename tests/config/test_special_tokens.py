"""What a folder says of its special tokens, and recipes that take it from there."""

import dataclasses
import json

import pytest

from helpers import hf_folders
from megatron_twotower.checkpoint import files
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import NoiseConfig, RunConfig
from megatron_twotower.config.special_tokens import SpecialTokens, read_special_tokens
from megatron_twotower.convert import export, import_run, model_card
from megatron_twotower.train.checkpoints import find_checkpoint

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<mask>": 5}},
    "added_tokens": [{"id": 5, "content": "<mask>"}, {"id": 9, "content": "</s>"}],
}


def folder(path, *, generation=None, config=None, names=None, tokenizer=TOKENIZER, names_file="tokenizer_config.json"):
    path.mkdir(exist_ok=True)
    files = {
        "generation_config.json": generation,
        "config.json": config,
        names_file: names,
        "tokenizer.json": tokenizer,
    }
    for name, content in files.items():
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


def test_a_folder_without_a_word_says_nothing(tmp_path):
    assert read_special_tokens(tmp_path) == SpecialTokens()
    assert read_special_tokens(folder(tmp_path, config={"eos_token_id": None}, tokenizer={})) == SpecialTokens()


@pytest.mark.parametrize("file", ["generation", "config"])
def test_either_file_may_say_it(tmp_path, file):
    said = {"mask_token_id": 7, "block_size": 8, "eos_token_id": [2, 9]}
    assert read_special_tokens(folder(tmp_path, **{file: said})) == SpecialTokens(7, 8, (8,), (2, 9))


def test_the_sizes_that_a_denoiser_was_trained_with(tmp_path):
    said = {"block_size": 16, "trained_block_sizes": [16, 32]}
    assert read_special_tokens(folder(tmp_path, generation=said)).trained_block_sizes == (16, 32)


def test_eos_of_generation_replaces_that_of_the_model_as_in_transformers(tmp_path):
    home = folder(tmp_path, generation={"eos_token_id": [2, 11]}, config={"eos_token_id": 3})
    assert read_special_tokens(home).eos_token_ids == (2, 11)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("wrap", [str, lambda text: {"content": text, "special": True}])
def test_the_names_of_a_tokenizer_say_it_else(tmp_path, file, wrap):
    names = {"mask_token": wrap("<mask>"), "eos_token": wrap("</s>"), "pad_token": None}
    home = folder(tmp_path, names=names, names_file=file)
    assert read_special_tokens(home) == SpecialTokens(5, None, (), (9,))
    folder(tmp_path, generation={"eos_token_id": [2, 9], "mask_token_id": 5})
    assert read_special_tokens(home) == SpecialTokens(5, None, (), (2, 9))


def test_names_that_the_tokenizer_does_not_have_say_nothing(tmp_path):
    assert read_special_tokens(folder(tmp_path, names={"mask_token": "<other>"})) == SpecialTokens()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"generation": {"mask_token_id": 7}, "config": {"mask_token_id": 8}},
            "mask_token_id: found 7 and 8 in generation_config.json and config.json, expected one",
        ),
        ({"generation": {"block_size": 8}, "config": {"block_size": 16}}, "block_size: found 8 and 16"),
        (
            {"generation": {"mask_token_id": 7}, "names": {"mask_token": "<mask>"}},
            "found mask_token_id 7 .* but the mask token of tokenizer_config.json has id 5, expected the same",
        ),
        (
            {"generation": {"eos_token_id": [2, 3]}, "names": {"eos_token": "</s>"}},
            r"generation_config.json: found eos_token_id 2, 3, but the EOS of tokenizer_config.json has id 9",
        ),
        ({"config": {"eos_token_id": 2}, "names": {"eos_token": "</s>"}}, r"config.json: found eos_token_id 2, but"),
        ({"generation": {"mask_token_id": "3"}}, "mask_token_id: found '3', expected whole numbers from 0 on"),
        ({"generation": {"eos_token_id": -1}}, "eos_token_id: found -1"),
        ({"names": {"eos_token": "</s>"}, "tokenizer": {"model": {}}}, "tokenizer.json: found no vocabulary"),
    ],
)
def test_what_is_said_twice_must_agree(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as raised:
        read_special_tokens(folder(tmp_path, **files))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


# --- recipes and imports ---


def noise_of(tmp_path, *settings, style="two_tower", said=None):
    source = hf_folders.write(tmp_path / "source", style)
    if said:
        (source / "generation_config.json").write_text(json.dumps(said))
    (tmp_path / "recipe.yaml").write_text("defaults:\n  - run_config\n  - _self_\n")
    config = load_recipe(str(tmp_path / "recipe.yaml"), [item.format(source) for item in settings])
    return config.noise.mask_token_id, config.noise.block_size_tokens


SAID = {"mask_token_id": 40, "block_size": 8}


@pytest.mark.parametrize("key", ["init.backbone", "init.denoiser"])
def test_a_recipe_that_does_not_say_takes_it_from_its_folder(tmp_path, key):
    assert noise_of(tmp_path, f"{key}={{}}", said=SAID) == (40, 8)
    assert load_recipe("nano_30b_a3b", planning=True).noise.mask_token_id == 3


def test_a_recipe_that_says_it_keeps_it_and_nothing_said_is_the_released_one(tmp_path):
    assert noise_of(tmp_path, "init.backbone={}") == (3, 16) == (NoiseConfig().mask_token_id, 16)
    explicit = ["noise.mask_token_id=3", "noise.block_size_tokens=4"]
    config = load_recipe(str(tmp_path / "recipe.yaml"), [f"init.backbone={tmp_path / 'source'}", *explicit])
    assert (config.noise.mask_token_id, config.noise.block_size_tokens) == (3, 4)


def test_the_tokenizer_of_the_data_says_it_last(tmp_path):
    folder(tmp_path / "data", tokenizer=None)
    folder(tmp_path / "data" / "tokenizer", names={"mask_token": "<mask>"})
    assert noise_of(tmp_path, "init.backbone={}", f"data.folder={tmp_path / 'data'}") == (5, 16)


@pytest.mark.parametrize("what", ["two_tower", "denoiser"])
def test_an_import_continues_with_what_the_folder_says_and_an_export_says_it_again(tmp_path, what):
    source = hf_folders.write(tmp_path / "source", "two_tower")
    said = SAID | {"trained_block_sizes": [8, 16], "eos_token_id": [2, 11]}
    (source / "generation_config.json").write_text(json.dumps(said))
    export.export(source, tmp_path / "given", options=export.ExportOptions(what))
    noise = import_run.import_folder(tmp_path / "given", tmp_path / "run").noise
    assert (noise.mask_token_id, noise.block_size_tokens) == (40, 8)
    export.export(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == said


def says_shift(folder, value=True):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token_shift": value}))
    return folder


def test_the_token_shift_is_that_of_the_denoiser_and_no_other(tmp_path):
    (tmp_path / "recipe.yaml").write_text("defaults:\n  - run_config\n  - _self_\n")
    with_shift = says_shift(hf_folders.write(tmp_path / "with", "two_tower"))
    without = hf_folders.write(tmp_path / "without", "two_tower")

    def shift(*settings):
        return load_recipe(str(tmp_path / "recipe.yaml"), settings).noise.token_shift

    assert shift(f"init.backbone={with_shift}") is False, "a context tower has none"
    assert shift(f"init.backbone={with_shift}", "noise.token_shift=true") is True
    assert shift(f"init.denoiser={with_shift}") is True
    assert shift(f"init.denoiser={with_shift}", "noise.token_shift=true") is True
    assert shift(f"init.denoiser={without}") is False
    for folder, found, expected in ((with_shift, "false", "true"), (without, "true", "false")):
        with pytest.raises(UserError) as error:
            shift(f"init.denoiser={folder}", f"noise.token_shift={found}")
        named = f"noise.token_shift: found {found}, but the denoiser of {folder} has {expected}, expected the same"
        assert str(error.value) == named
    with pytest.raises(UserError, match=r"config\.json: token_shift: found 1, expected true or false$"):
        shift(f"init.denoiser={says_shift(without, 1)}")


@pytest.mark.parametrize("what", ["two_tower", "denoiser", "context"])
def test_an_import_and_an_export_keep_the_token_shift_of_a_denoiser(tmp_path, what):
    source = says_shift(hf_folders.write(tmp_path / "source", "two_tower"))
    export.export(source, tmp_path / "given", options=export.ExportOptions(what))
    kept = what != "context"

    def said(folder):
        return json.loads((tmp_path / folder / "config.json").read_text()).get("token_shift", False)

    assert said("given") is kept
    config = import_run.import_folder(tmp_path / "given", tmp_path / "run")
    assert config.noise.token_shift is kept
    if kept:
        with pytest.raises(UserError, match=r"^noise\.token_shift: found False, expected True, as in"):
            other = dataclasses.replace(config, noise=dataclasses.replace(config.noise, token_shift=False))
            (saved,) = files.find_checkpoints(tmp_path / "run")
            find_checkpoint(tmp_path / "run", other, fingerprint=files.read_state(saved).fingerprint)
    export.export(tmp_path / "run", tmp_path / "again")
    assert said("again") is kept


def test_a_run_says_its_own_token_shift_and_not_that_of_its_backbone():
    config = RunConfig(objective="two_tower")
    shifted = dataclasses.replace(config, noise=NoiseConfig(token_shift=True))
    for found in ({"a": 1}, {"a": 1, "token_shift": True}):
        assert model_card.with_token_shift(found, config) == {"a": 1}
        assert model_card.with_token_shift(found, shifted) == {"a": 1, "token_shift": True}
        assert model_card.with_token_shift(found, dataclasses.replace(shifted, objective="ar")) == {"a": 1}


def test_an_import_refuses_a_folder_that_disagrees(tmp_path):
    source = hf_folders.write(tmp_path / "source", "two_tower")
    folder(source, generation=SAID, names={"mask_token": "<mask>"})
    for convert in (import_run.import_folder, export.export):
        with pytest.raises(UserError, match=r"found mask_token_id 40 .* has id 5"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
