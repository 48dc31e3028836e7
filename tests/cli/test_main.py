"""The commands: every recipe, one line with status 2 for each mistake, and lazy imports."""

import json
import shutil
import subprocess
import sys

import pytest

from megatron_twotower.cli import main
from megatron_twotower.cli.command import Group
from megatron_twotower.config.recipes import load_recipe, recipe_names, recipes_folder, to_yaml
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel

SHIPPED = recipes_folder() / "backbones" / "small"
CODE = recipes_folder() / "models" / "code"
BYTES = recipes_folder() / "models" / "bytes"


# The recipes of the real model are too large to build here: tests/config/test_recipes.py.
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.startswith(("nano", "bench_gpu"))])
def test_every_recipe_loads_validates_and_dry_runs(recipe, tiny_backbone, capsys):
    tiny = dict.fromkeys(("tiny", "tiny_phases"), tiny_backbone)
    start = {"quickstart": CODE, "code": CODE, "bytes": BYTES, "sft_ar": BYTES, **tiny}.get(recipe)
    overrides = [f"init.backbone={start}"] if start else []
    overrides += [f"init.denoiser={BYTES}"] if recipe == "bytes_distil" else []
    config = load_recipe(recipe, overrides)
    validate(config, world_size=1)
    assert main.main(["train", "--dry-run", f"recipe={recipe}", *overrides]) == 0
    assert "trained parameters" in capsys.readouterr().out


def test_a_resolved_configuration_is_a_recipe_again(tmp_path):
    config = load_recipe("tiny_ar", ["optimizer.learning_rate=0.25", "logging.name=a b"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "again.yaml")) == config


MISTAKES = {
    "no such recipe": (["recipe=nothing"], "recipe 'nothing': not found"),
    "two recipes": (["recipe=tiny", "recipe=tiny_ar"], "found 2, expected exactly one"),
    "unknown key": (["recipe=tiny_ar", "optimizer.lr=1"], "optimizer.lr"),
    "added key": (["recipe=tiny_ar", "+more=1"], "cannot be added"),
    "wrong type": (["recipe=tiny_ar", "train.steps=many"], "'many'"),
    "wrong choice": (["recipe=tiny_ar", "schedule.kind=linear"], "expected one of wsd, cosine, constant"),
    "out of range": (["recipe=tiny_ar", "train.steps=0"], "train.steps: found 0, expected at least 1"),
    "unknown layer": (["recipe=tiny_ar", "model.hybrid_override_pattern=MX"], "expected letters of M*E-"),
    "no backbone": (["recipe=tiny", "init.backbone=null"], "expected"),
    "missing backbone": (["recipe=tiny", "init.backbone=/no/such"], "/no/such/config.json: not found"),
    "ranks do not divide": (["recipe=tiny_ar", "parallel.tensor=3"], "parallel.pipeline 1: does not divide 1 ranks"),
    "experts do not divide": (["recipe=tiny_ar", "parallel.expert=3"], "does not divide 1 ranks"),
    "batch does not divide": (["recipe=tiny_ar", "data.micro_batch_size=3"], "expected a multiple of 3"),
    "schedule too long": (["recipe=tiny_ar", "schedule.warmup_steps=99"], "expected at most train.steps 30"),
    "missing data": (["recipe=tiny_ar", "data.folder=/no/such"], "/no/such"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    assert main.main(["train", *arguments, f"output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("twotower: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize("place", [1, 2, 3])
def test_settings_are_taken_on_both_sides_of_an_option(place):
    words = ["recipe=tiny", "seed=7", "train.steps=40"]
    arguments = main.parse(["train", *words[:place], "--dry-run", *words[place:]])
    assert arguments.settings == words and arguments.dry_run


@pytest.mark.parametrize("words", [["train", "recipe=tiny", "--dry-run", "tiny"], ["doctor", "seed=7"]])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(words)
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_a_block_that_does_not_divide_the_sequence(tiny_backbone, capsys):
    arguments = ["recipe=tiny", f"init.backbone={tiny_backbone}", "noise.block_size_tokens=5"]
    assert main.main(["train", *arguments]) == 2
    assert "expected a multiple of noise.block_size_tokens 5" in capsys.readouterr().err


def test_a_shape_that_is_not_the_backbones(tiny_backbone, capsys):
    arguments = ["recipe=tiny", f"init.backbone={tiny_backbone}", "model.hybrid_override_pattern=ME"]
    assert main.main(["train", *arguments]) == 2
    assert "model.hybrid_override_pattern: found 'ME'" in capsys.readouterr().err


def test_a_truncated_shard(tiny_data, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(tiny_data, copy)
    shard = sorted((copy / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert main.main(["train", "recipe=tiny_ar", f"data.folder={copy}", f"output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert shard.name in error and error.count("\n") == 1


def test_data_of_another_tokenizer_is_refused(tiny_data, tiny_backbone, tmp_path, capsys):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, backbone)
    arguments = [
        "train",
        "recipe=tiny",
        f"init.backbone={backbone}",
        f"data.folder={tiny_data}",
        "train.steps=6",
        "train.validate_every_steps=0",
        f"output={tmp_path / 'run'}",
    ]
    tokenizer = (tiny_data / "tokenizer" / "tokenizer.json").read_text()
    (backbone / "tokenizer.json").write_text(tokenizer + " ")
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert "found tokens of tokenizer" in error and str(backbone) in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    (backbone / "tokenizer.json").write_text(tokenizer)
    assert main.main(arguments) == 0


def test_a_checkpoint_of_another_shape_is_refused_and_export_needs_one(tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    base = [
        "train",
        "recipe=tiny_ar",
        f"data.folder={tiny_data}",
        f"output={run}",
        "train.steps=6",
        "train.validate_every_steps=0",
    ]
    assert main.main(["convert", "export", "--from", str(run), "--to", str(tmp_path / "hf")]) == 2
    assert "no checkpoint found" in capsys.readouterr().err
    assert main.main(base) == 0
    capsys.readouterr()
    assert main.main([*base, "model.hidden_size=64"]) == 2
    error = capsys.readouterr().err
    assert "found model" in error and error.count("\n") == 1
    assert main.main([*base, "resume=false"]) == 2
    assert "found checkpoints" in capsys.readouterr().err
    state = max((run / "checkpoints").glob("*/state.json"))
    state.write_text("{}")
    assert main.main(base) == 2
    assert "not a checkpoint" in capsys.readouterr().err


def test_every_stage_from_ar_training_to_text(tiny_data, tmp_path, capsys):
    """Ar -> backbone -> two towers -> model -> text, through the commands alone."""
    common = [f"data.folder={tiny_data}", "train.steps=8", "train.validate_every_steps=8"]
    assert main.main(["train", "recipe=tiny_ar", *common, f"output={tmp_path / 'ar'}"]) == 0
    backbone = tmp_path / "backbone"
    assert main.main(["convert", "export", "--from", str(tmp_path / "ar"), "--to", str(backbone)]) == 0
    towers = [*common, f"init.backbone={backbone}", f"output={tmp_path / 'twotower'}"]
    assert main.main(["train", "recipe=tiny", *towers]) == 0
    model = tmp_path / "model"
    assert main.main(["convert", "export", "--from", str(tmp_path / "twotower"), "--to", str(model)]) == 0
    assert main.main(["convert", "export", "--from", str(tmp_path / "twotower"), "--to", str(model)]) == 2
    card = (model / "README.md").read_text()
    assert "| steps | 8 |" in card and "| tokens | 2,048 |" in card and "backbone_sha256" in card
    for mode in ("mask_diffusion", "mock_ar", "ar"):
        capsys.readouterr()
        arguments = ["--model", str(model), "--mode", mode, "--prompt", "def ", "--max-new-tokens", "20"]
        assert main.main(["generate", *arguments, "--block-size", "8"]) == 0
        assert f"{mode}: " in capsys.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    assert loaded.config.hidden_size == 32 and tokenizer.mask_token_id == 3
    parallel.shutdown()


def test_the_shipped_backbone_is_complete():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["model_type"] == "nemotron_h"
    assert set("M*E") == set(config["hybrid_override_pattern"])
    size = sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors"))
    assert 0 < size <= 20 * 2**20
    assert (SHIPPED / "tokenizer.json").is_file() and (SHIPPED / "metrics.jsonl").is_file()


def test_doctor_runs(capsys):
    assert main.main(["doctor"]) == 0
    assert "Megatron" in capsys.readouterr().out


def calls(commands=main.COMMANDS, before=()):
    """Every command, as the words that call it."""
    for each in commands:
        words = (*before, each.name)
        yield from calls(each.commands, words) if isinstance(each, Group) else [words]


@pytest.mark.parametrize("call", list(calls()), ids=" ".join)
def test_a_command_shows_an_example_and_refuses_an_unknown_option(call, capsys):
    with pytest.raises(SystemExit) as done:
        main.main([*call, "--help"])
    assert done.value.code == 0
    assert f"twotower {' '.join(call)}" in capsys.readouterr().out.split("example:")[1]
    with pytest.raises(SystemExit) as done:
        main.main([*call, "--no-such-option", "1"])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("twotower: ") and error.count("\n") == 1


ONE_MISTAKE = {
    "plan": ["recipe=nothing"],
    "data tokenizer": ["--input", "/no/such", "--output", "out"],
    "data prepare": ["--input", "/no/such", "--tokenizer", "/no/such", "--output", "out"],
    "data inspect": ["/no/such"],
    "data verify": ["/no/such"],
    "convert import": ["--from", "/no/such", "--to", "out"],
    "convert export": ["--from", "/no/such", "--to", "out"],
    "generate": ["--model", "/no/such", "--prompt", "a"],
    "evaluate": ["--model", "/no/such", "--output", "out"],
    "distil": ["--model", "/no/such", "--data", "/no/such", "--output", "out"],
    "report": ["--run", "/no/such"],
    "bench step": ["model=nothing"],
    "bench gpu": ["--rungs", "nothing"],
    "bench generate": ["--model", "/no/such"],
    "bench convert": ["--folder", "/no/such"],
    "bench passes": ["--model", "/no/such"],
    "bench fp8": ["--model", "/no/such", "--data", "/no/such"],
}


@pytest.mark.parametrize("call", ONE_MISTAKE)
def test_a_mistake_in_any_command_is_one_line_and_status_2(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([*call.split(), *ONE_MISTAKE[call]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("twotower: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


SLOW_IMPORTS = ("torch", "megatron", "transformers", "matplotlib", "lm_eval")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["convert", "export", "--help"]], ids=" ".join)
def test_help_does_not_import_what_is_slow(words):
    code = f"""
import sys
from megatron_twotower.cli.main import main
try:
    main({words})
except SystemExit:
    print(sorted(set({SLOW_IMPORTS}) & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
