"""Folders that `convert export` writes: kinds, dtypes, other files, and that none is incomplete."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import TESTS, hf_folders
from helpers.hf_folders import MODEL, config_of, contents
from helpers.runs import train
from megatron_twotower.checkpoint import files
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import silent_bytes
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.special_tokens import SpecialTokens
from megatron_twotower.convert import export, hf_folder, import_run, model_card
from megatron_twotower.convert.mcore_checkpoint import CheckpointWeights
from megatron_twotower.generate import engine
from megatron_twotower.model import parameter_map


def choose(what=None, **others):
    return export.ExportOptions(what, **others)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data, tiny_backbone):
    """A short two-tower run."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    settings = [f"data.folder={tiny_data}", f"init.backbone={tiny_backbone}", f"output={folder}"]
    assert train("tiny", *settings, "train.steps=6", "train.validate_every_steps=0")
    return folder


def test_the_kinds_of_a_run_and_how_they_fit_together(run, tiny_backbone, tmp_path):
    for what in ("two_tower", "context", "denoiser"):
        assert export.export(run, tmp_path / what, options=choose(what)) == what
    # transformers has a class for one tower, and refuses the other folders without their code.
    types = {name: config_of(tmp_path / name)["model_type"] for name in ("two_tower", "context", "denoiser")}
    two = "nemotron_h_twotower"
    assert types == {"two_tower": two, "context": "nemotron_h", "denoiser": two}
    for name, needs_code in (("two_tower", True), ("context", False), ("denoiser", True)):
        card = (tmp_path / name / "README.md").read_text()
        assert ("needs `trust_remote_code=True` and refuses the folder without it" in card) == needs_code
    whole, context, denoiser = (contents(tmp_path / name) for name in ("two_tower", "context", "denoiser"))
    assert context == contents(tiny_backbone), "the frozen tower is its source, bit for bit"
    renamed = {parameter_map.context_name(name): tensor for name, tensor in context.items()}
    assert whole == renamed | denoiser and not renamed.keys() & denoiser.keys()
    assert export.export(run, tmp_path / "default") == "two_tower"
    assert contents(tmp_path / "default") == whole
    pointer = json.loads((tmp_path / "denoiser" / "context_tower.json").read_text())
    assert (tmp_path / "denoiser" / pointer["backbone"]).resolve() == tiny_backbone.resolve()
    assert pointer["sha256"] == hf_folder.fingerprint(tiny_backbone)


def test_a_denoiser_is_half_the_bytes_and_is_completed_to_the_same(run, tiny_backbone, tmp_path):
    source = hf_folders.write(tmp_path / "source", "two_tower")
    export.export(source, tmp_path / "denoiser", options=choose("denoiser"))
    export.export(source, tmp_path / "context", options=choose("context"))
    sizes = {
        name: sum(map(len, (data for *_, data in contents(tmp_path / name).values())))
        for name in ("source", "denoiser", "context")
    }
    assert sizes["denoiser"] + sizes["context"] == sizes["source"]
    export.export(tmp_path / "denoiser", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    # Where its backbone moved, it is named; a folder with other weights is refused, and so is none.
    moved = shutil.move(source, tmp_path / "moved")
    with pytest.raises(UserError, match=r"source: not found, expected the backbone of .*--backbone"):
        export.export(tmp_path / "denoiser", tmp_path / "third")
    with pytest.raises(UserError, match=r"context: found sha256 .*, expected .*, the backbone of"):
        export.export(tmp_path / "denoiser", tmp_path / "third", options=choose(backbone=tmp_path / "context"))
    export.export(tmp_path / "denoiser", tmp_path / "third", options=choose(backbone=Path(moved)))
    assert contents(tmp_path / "third") == contents(moved)
    (tmp_path / "denoiser" / "context_tower.json").unlink()
    with pytest.raises(UserError, match=r"found a denoiser without context_tower.json"):
        export.export(tmp_path / "denoiser", tmp_path / "fourth")


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", **settings)


# The folders of the backbone that a denoiser can be completed with.
BACKBONES = {
    "hub": choose("context", style="hub"),
    "transformers": choose("context", style="transformers"),
    "two_tower": choose("two_tower"),
}


@pytest.mark.parametrize("style", BACKBONES)
def test_from_pretrained_completes_a_denoiser(tmp_path, style):
    whole = hf_folders.write(tmp_path / "whole", "two_tower", precision=lambda name: torch.float32)
    export.export(whole, tmp_path / "two_tower")
    home = tmp_path / "home"
    export.export(whole, home, options=BACKBONES[style])
    export.export(whole, tmp_path / "denoiser", options=choose("denoiser"))
    pointer = {"backbone": "../home", "sha256": hf_folder.fingerprint(home)}
    (tmp_path / "denoiser" / "context_tower.json").write_text(json.dumps(pointer))
    completed, notes = load(tmp_path / "denoiser", output_loading_info=True)
    assert not any(notes.values()), notes
    wanted = load(tmp_path / "two_tower").state_dict()
    found = completed.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_from_pretrained_never_leaves_a_context_tower_random(tmp_path):
    whole = hf_folders.write(tmp_path / "whole", "two_tower")
    export.export(whole, tmp_path / "denoiser", options=choose("denoiser"))
    moved = shutil.move(whole, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"whole: not found, expected the backbone of .*denoiser"):
        load(tmp_path / "denoiser")
    assert not any(load(tmp_path / "denoiser", backbone=moved, output_loading_info=True)[1].values())
    other = hf_folders.write(tmp_path / "other", "hub", change=lambda tensors: dict(reversed(tensors.items())))
    with pytest.raises(ValueError, match=r"other: found sha256 .*, expected .*, the backbone of"):
        load(tmp_path / "denoiser", backbone=other)
    (tmp_path / "denoiser" / "context_tower.json").unlink()
    with pytest.raises(ValueError, match=r"denoiser: found no context_lm_head\.weight, .*, expected a context tower"):
        load(tmp_path / "denoiser")


def test_one_tower_is_not_two(tmp_path):
    source = hf_folders.write(tmp_path / "source", "hub")
    with pytest.raises(UserError, match="found one tower, expected two to export denoiser"):
        export.export(source, tmp_path / "out", options=choose("denoiser"))


def test_two_towers_of_a_backbone_are_those_that_a_run_starts_from(tiny_backbone, tiny_data, tmp_path):
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    for path in (tiny_data / "tokenizer").iterdir():
        shutil.copy(path, backbone)
    export.export(backbone, tmp_path / "out", options=choose("two_tower"))
    model, _ = engine.load(tmp_path / "out")
    ids = torch.tensor([[5, 9, 17, 4]])
    assert torch.equal(model.generate_mock_ar(ids, 12, eos_token_id=()), model.generate_ar(ids, 12, eos_token_id=()))
    losses = {}
    for key, other, folder in (("backbone", "denoiser", backbone), ("denoiser", "backbone", tmp_path / "out")):
        start = [f"init.{key}={folder}", f"init.{other}=null", f"data.folder={tiny_data}", f"output={tmp_path / key}"]
        assert train("tiny", *start, "train.steps=2", "schedule.warmup_steps=0", "train.validate_every_steps=1")
        records = map(json.loads, (tmp_path / key / "metrics.jsonl").read_text().splitlines())
        losses[key] = [record["loss"] for record in records if "loss" in record]
    assert losses["backbone"] == losses["denoiser"] and len(losses["backbone"]) >= 3


def test_transformers_loads_the_context_tower_of_either_style(tmp_path):
    source = hf_folders.write(tmp_path / "source", "two_tower", precision=lambda name: torch.float32)
    tokens = torch.randint(0, MODEL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    models = {}
    for style in ("hub", "transformers"):
        export.export(source, tmp_path / style, options=choose("context", style=style))
        model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / style, output_loading_info=True)
        assert not any(notes.values()), notes
        assert "auto_map" not in config_of(tmp_path / style)
        models[style] = model.eval()
    hub, stacked = (models[style].state_dict() for style in ("hub", "transformers"))
    assert hub.keys() == stacked.keys() and all(torch.equal(hub[name], stacked[name]) for name in hub)
    with torch.no_grad():
        torch.testing.assert_close(*(model(tokens, use_cache=False).logits for model in models.values()))
    _, shape, _ = contents(tmp_path / "transformers")["model.layers.1.mixer.experts.up_proj"]
    assert shape == (MODEL.n_routed_experts, MODEL.moe_intermediate_size, MODEL.hidden_size)
    export.export(tmp_path / "transformers", tmp_path / "back", options=choose(style="hub"))
    assert contents(tmp_path / "back") == contents(tmp_path / "hub")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_in_the_precision_that_is_asked_for(tmp_path, dtype):
    source = hf_folders.write(tmp_path / "source", "transformers")
    import_run.import_folder(source, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out", options=choose(dtype=dtype))
    before, after = hf_folders.tensors_of(source), hf_folders.tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        wide = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if wide else dtype), name
        assert torch.equal(tensor.read(), before[name].read().to(tensor.dtype)), name
    assert config_of(tmp_path / "out")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_files_next_to_the_weights(run, tiny_data, tiny_backbone, tmp_path, capsys):
    export.export(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    facts = json.loads((run / "provenance.json").read_text())
    for fact in (
        "| steps | 6 |",
        "| tokens | 1,536 |",
        f"| commit | {facts['commit']} |",
        f"| backbone_sha256 | {hf_folder.fingerprint(tiny_backbone)} |",
    ):
        assert fact in card
    assert (tmp_path / "model" / "training.yaml").read_text() == (run / "config.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    given = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    assert tokenizer("def alpha")["input_ids"] == given("def alpha")["input_ids"]
    defaults = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (defaults.eos_token_id, defaults.block_size, defaults.mask_token_id) == (2, 8, 3)


@pytest.mark.parametrize("what", ["two_tower", "context", "denoiser"])
def test_the_snippet_of_the_card_runs(run, tiny_data, tmp_path, monkeypatch, capsys, what):
    export.export(run, tmp_path / "model", options=choose(what))
    for file in tmp_path.joinpath("model").iterdir():
        shutil.copy(tiny_data / "tokenizer" / "tokenizer.json", tmp_path / "model")
        assert file.stat().st_mode & 0o044, "others may read it"
    snippet = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})  # as written
    assert "France is a country" in capsys.readouterr().out


def test_the_exported_tokenizer_gives_the_ids_of_its_file(tiny_data, tmp_path):
    """AutoTokenizer rebuilds a tokenizer of some classes, so the copy names another class."""
    source = hf_folders.write(tmp_path / "source", "hub")
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, source / file.name)
    given = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(given))
    export.export(source, tmp_path / "out")
    copied = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert copied == given | {"tokenizer_class": "PreTrainedTokenizerFast"}
    text = "def alpha(12345):\n        return self.beta"
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(source)(text)["input_ids"] != expected


def test_defaults_of_a_source_are_kept(tmp_path):
    source = hf_folders.write(tmp_path / "source", "hub")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 11], "top_p": 0.9}')
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ hello }}")
    import_run.import_folder(source, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 11]


def test_the_block_size_is_that_of_the_phase_that_was_reached():
    config = load_recipe("nano_30b_a3b", planning=True)
    phases = resolve_phases(config)
    sizes = []
    for cursor in (0, 1, phases[1].first, phases[2].first, phases[2].first + 1, 10**12):
        found = model_card.block_defaults(config, cursor=cursor)
        sizes.append((found["block_size"], found.get("trained_block_sizes")))
    assert sizes == [(32, None), (32, [32]), (32, [32]), (32, [32]), (16, [16, 32]), (16, [16, 32])]


def test_eos_of_the_tokenizer_is_among_those_of_the_folder(tmp_path):
    said = SpecialTokens(mask_token_id=5, eos_token_ids=(9,))
    assert model_card.with_special_tokens({}, said) == {"eos_token_id": 9, "mask_token_id": 5}
    assert model_card.with_special_tokens({"eos_token_id": 9}, said)["eos_token_id"] == 9
    assert model_card.with_special_tokens({"eos_token_id": [2, 11]}, said)["eos_token_id"] == [2, 11, 9]
    assert model_card.with_special_tokens({"mask_token_id": 4}, SpecialTokens()) == {"mask_token_id": 4}


def test_a_model_from_random_weights_has_the_special_tokens_of_its_data(tmp_path, tiny_data):
    assert export._special_ids(tiny_data / "tokenizer") == {"bos_token_id": 1, "eos_token_id": 2}
    shutil.copytree(tiny_data / "tokenizer", tmp_path / "tokenizer")
    names = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": "<mask>"}))
    assert export._special_ids(tmp_path / "tokenizer")["eos_token_id"] == 3
    assert export._special_ids(tmp_path) == export._special_ids(None) == {}


def test_a_denoiser_that_goes_without_something_has_no_export(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "reduced")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("without: nothing", "without: states"))
    with pytest.raises(UserError, match=r"^conditioning\.without: found states, expected nothing for an export$"):
        export.export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_step_is_chosen(run, tmp_path):
    for step in (5, 6):
        export.export(run, tmp_path / str(step), options=choose("denoiser", step=step))
    assert contents(tmp_path / "5") != contents(tmp_path / "6")
    with pytest.raises(UserError, match=r"found no checkpoint of step 4, expected one of 5, 6"):
        export.export(run, tmp_path / "4", options=choose(step=4))


def test_the_trained_weights_of_checkpoints_are_averaged(run, tiny_backbone, tmp_path):
    for step in (5, 6):
        export.export(run, tmp_path / str(step), options=choose(step=step))
    export.export(run, tmp_path / "mean", options=choose(average=2))
    first, second, averaged = (hf_folders.tensors_of(tmp_path / name) for name in ("5", "6", "mean"))
    moved = 0
    for name, tensor in averaged.items():
        got, parts = tensor.read(), [each[name].read() for each in (first, second)]
        assert torch.equal(got, ((parts[0].double() + parts[1].double()) / 2).to(got.dtype)), name
        moved += not torch.equal(got, parts[1])
    assert moved > 10
    assert "5, 6" in (tmp_path / "mean" / "README.md").read_text()
    for source, options, message in (
        (run, choose(average=3), r"--average: found 3, expected at most the 2 checkpoints of .* up to step 6 .*5, 6;"),
        (run, choose(average=2, step=5), r"expected at most the 1 checkpoints of .* up to step 5"),
        (tiny_backbone, choose(average=2), r"--average: found 2, but .* is no training run and has no checkpoints"),
    ):
        with pytest.raises(UserError, match=message):
            export.export(source, tmp_path / "no", options=options)
    assert not (tmp_path / "no").exists()


def test_a_changed_backbone_and_a_damaged_checkpoint_are_refused(run, tiny_backbone, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = max(copy.glob("checkpoints/step-00000006/*.distcp"))
    os.truncate(weights, 5000)
    with pytest.raises(UserError, match=r"step-00000006: tower.* cannot be read"):
        export.export(copy, tmp_path / "out")
    (weights.parent / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"metadata: cannot be read"):
        export.export(copy, tmp_path / "out")
    monkeypatch.setattr(export, "fingerprint", lambda folder: "0" * 64)
    with pytest.raises(UserError, match=r"changed since the run, found sha256 0000"):
        export.export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_backbone_moved_is_exported_with_it(run, tiny_backbone, tmp_path, capsys):
    """The run was started with a path that leads nowhere now."""
    copy, moved = shutil.copytree(run, tmp_path / "run"), shutil.copytree(tiny_backbone, tmp_path / "moved>here, now")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(tiny_backbone), "lost"))
    folder = checkpoint_folder(copy, 6)
    state = dataclasses.replace(files.read_state(folder), backbone="lost")
    files.write_state(folder, state)
    words = ["convert", "export", "--from", str(copy), "--to", str(tmp_path / "out")]
    assert main.main(words) == 2
    assert f"lost: not found, expected the backbone of {copy} (if it moved, name it with" in capsys.readouterr().err
    assert main.main([*words, "--backbone", str(moved)]) == 0
    export.export(run, tmp_path / "as before")
    assert contents(tmp_path / "out") == contents(tmp_path / "as before")
    other = hf_folders.write(tmp_path / "other", "hub")
    assert main.main([*words[:-1], str(tmp_path / "wrong"), "--backbone", str(other)]) == 2
    assert "twotower: model.vocab_size: found 512" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("source", "command", "words", "message"),
    [
        ("hub", "export", ["--backbone", "b"], "--backbone: found b, but SOURCE has no denoiser"),
        ("two_tower", "import", ["--backbone", "b"], "--backbone: found b, but SOURCE has its own context tower"),
        ("hub", "import", ["--backbone", "b"], "--backbone: found b, but SOURCE has its own context tower"),
        ("hub", "export", ["--step", "3"], "--step: found 3, but SOURCE is no training run"),
        ("two_tower", "export", ["--style", "hub"], "--style: found hub to export two_tower, expected it for a plain"),
        ("hub", "export", ["--step", "-1"], "--step: found -1, expected at least 0"),
    ],
)
def test_an_option_that_a_source_does_not_use_is_refused(source, command, words, message, tmp_path, capsys):
    folder = hf_folders.write(tmp_path / "source", source)
    call = ["convert", command, "--from", str(folder), "--to", str(tmp_path / "out"), *words]
    assert main.main(call) == 2
    error = capsys.readouterr().err
    assert message.replace("SOURCE", str(folder)) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_the_model_is_refused_with_names(run, tmp_path):
    saved = CheckpointWeights.open(checkpoint_folder(run, 6))
    entries = parameter_map.denoiser_entries(load_recipe(str(run / "config.yaml")).model, 256)
    saved.check(entries)
    with pytest.raises(UserError, match=r"1 without a place in the model \(tower.output_layer.weight\)"):
        saved.check([entry for entry in entries if entry.megatron_name != "tower.output_layer.weight"])
    with pytest.raises(UserError, match=r"1 missing \(tower.other\)"):
        saved.check([*entries, parameter_map.Entry("tower.other", ("other",), (3,))])


# --- complete or not there ---


@pytest.fixture
def both_ways(tmp_path):
    """Import and export, each a function of the folder to write and of the progress."""
    source = hf_folders.write(tmp_path / "source", "hub")

    def read(to, progress=silent_bytes):
        import_run.import_folder(source, to, progress=progress)

    def write(to, progress=silent_bytes):
        export.export(source, to, progress=progress)

    return {"import": read, "export": write}


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, both_ways, way):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out: cannot be written .*, nothing is left of it") as raised:
            both_ways[way](tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("way", ["import", "export"])
def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, both_ways, way, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(UserError, match=r"found 0.0 GiB free, expected room for"):
        both_ways[way](tmp_path / "out", lambda _: pytest.fail("it began"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def stop_at_half(stop):
    """A progress that stops the work when half of it is done."""

    def progress(total):
        done = 0

        def report(count):
            nonlocal done
            done += count
            if done > total / 2:
                stop()

        return report

    return progress


@pytest.mark.parametrize("way", ["import", "export"])
def test_interrupted_it_leaves_nothing(tmp_path, both_ways, way):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both_ways[way](tmp_path / "out", stop_at_half(interrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    both_ways[way](tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("verb", ["import", "export"])
def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path, verb, monkeypatch, capsys):
    source = hf_folders.write(tmp_path / "source", "hub")
    before = signal.getsignal(signal.SIGTERM)
    for module, name in ((import_run, "write_weights"), (hf_folder, "write_safetensors")):
        monkeypatch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main.main(["convert", verb, "--from", str(source), "--to", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("way", ["import", "export"])
def test_killed_it_leaves_no_folder_and_the_next_one_is_complete(tmp_path, both_ways, way):
    child = os.fork()
    if child == 0:
        try:
            both_ways[way](tmp_path / "out", stop_at_half(lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "source"]
    assert not list(tmp_path.joinpath("out.partial").rglob("config.*")), "no file that makes the folder look complete"
    both_ways[way](tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    if way == "export":
        assert contents(tmp_path / "out") == contents(tmp_path / "source")


@pytest.mark.slow
def test_memory_is_a_few_tensors_and_not_the_model(tmp_path):
    """A GiB with tensors of at most 8 MiB: the peak grows by less than a twentieth of it."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.convert_large", str(tmp_path)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown["bytes"] > 20 * grown["allowed"]
    assert grown["largest"] * 4 <= grown["allowed"] < grown["bytes"] / 20
    for name in ("import", "export", "folder to folder"):
        assert grown[name] < grown["allowed"], grown


def test_mistakes_of_the_commands_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    source = hf_folders.write(tmp_path / "source", "hub")
    mistakes = {
        ("import", tmp_path / "empty", tmp_path / "out"): "no *.safetensors found",
        ("import", source, tmp_path / "empty"): "exists, expected a folder that is not there yet",
        ("export", tmp_path / "empty", tmp_path / "out"): "no checkpoint found",
        ("export", source, tmp_path / "empty"): "exists, expected a folder that is not there yet",
    }
    for (verb, found, to), message in mistakes.items():
        assert main.main(["convert", verb, "--from", str(found), "--to", str(to)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
