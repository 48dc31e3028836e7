"""Import of Hugging Face folders as runs: same bytes after an export, training, and errors."""

import json
import shutil

import pytest
import torch

from helpers import hf_folders
from helpers.hf_folders import config_of, contents
from helpers.runs import launch, losses, train
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import export, hf_folder, import_run
from megatron_twotower.convert.mcore_checkpoint import CheckpointWeights
from megatron_twotower.convert.tensors import LazyTensor
from megatron_twotower.model.parameter_map import TensorNaming


@pytest.mark.parametrize("style", ["hub", "transformers", "two_tower"])
def test_import_and_export_give_the_same_bytes(tmp_path, style):
    source = hf_folders.write(tmp_path / "source", style)
    import_run.import_folder(source, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "again")
    found, wanted = contents(tmp_path / "again"), contents(source)
    assert found == wanted
    assert {dtype for dtype, _, _ in found.values()} == {torch.bfloat16, torch.float32}
    assert config_of(tmp_path / "again") == config_of(source)


@pytest.mark.parametrize("style", ["hub", "transformers"])
def test_the_checkpoint_of_an_import_is_as_large_as_its_tensors(tmp_path, style):
    """`torch.save` of a view would write the storage of the view: a stack of experts per expert."""
    source = hf_folders.write(tmp_path / "source", style)
    import_run.import_folder(source, tmp_path / "run")
    tensors = CheckpointWeights.open(checkpoint_folder(tmp_path / "run", 0)).metadata.values()
    size = sum(item.size.numel() * item.properties.dtype.itemsize for item in tensors)
    (file,) = tmp_path.glob("run/checkpoints/*/*.distcp")
    assert size < file.stat().st_size < size + 2000 * len(tensors)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_any_naming_of_tensors_comes_back(tmp_path, monkeypatch, stacked, prefix):
    naming = TensorNaming(prefix, stacked)
    monkeypatch.setitem(hf_folders.STYLES, "hub", ({"backbone"}, naming))
    source = hf_folders.write(tmp_path / "source", "hub")
    import_run.import_folder(source, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    assert any(name.startswith(prefix) for name in contents(source))


def test_a_denoiser_alone_is_imported_with_the_backbone_it_points_to(tmp_path):
    whole = hf_folders.write(tmp_path / "whole", "two_tower")
    export.export(whole, tmp_path / "denoiser", options=export.ExportOptions("denoiser"))
    config = import_run.import_folder(tmp_path / "denoiser", tmp_path / "run")
    assert (config.objective, config.init.denoiser) == ("two_tower", None)
    export.export(tmp_path / "run", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


def zeros(shape, dtype=torch.bfloat16):
    return LazyTensor(dtype, shape, lambda: iter((torch.zeros(shape, dtype=dtype).flatten(),)))


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


NORM = "backbone.layers.0.norm.weight"
FAULTS = {
    "missing": (
        lambda tensors: without(tensors, "layers.1.mixer.experts."),
        r"12 missing \(backbone.layers.1.mixer.experts.0.up_proj.weight, .* and 9 more\)",
    ),
    "unknown": (
        lambda tensors: tensors | {"backbone.rope": zeros((3,))},
        r"1 without a place in the model \(backbone.rope\)",
    ),
    "misshapen": (
        lambda tensors: tensors | {NORM: zeros((25,))},
        r"1 of another shape \(backbone.layers.0.norm.weight \(25,\) for \(24,\)\)",
    ),
    "another dtype": (
        lambda tensors: tensors | {NORM: zeros((24,), torch.int32)},
        r"1 of another dtype \(backbone.layers.0.norm.weight int32\)",
    ),
    "all at once": (
        lambda tensors: without(tensors, "norm_f") | {NORM: zeros((2,)), "x": zeros((1,))},
        "1 missing .*; 1 of another shape .*; 1 without a place",
    ),
    "mixed": (
        lambda tensors: tensors | {"backbone.layers.2.mixer.k_proj.weight": zeros((12, 24), torch.float16)},
        "1 of mixed dtypes in one layer .*q_proj.weight bfloat16, .*k_proj.weight float16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_its_model_is_refused_with_names(tmp_path, fault):
    change, message = FAULTS[fault]
    source = hf_folders.write(tmp_path / "source", "hub", change=change)
    with pytest.raises(UserError, match=message) as raised:
        import_run.import_folder(source, tmp_path / "run")
    assert "\n" not in str(raised.value) and str(source) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_index_must_agree_with_its_files(tmp_path):
    source = hf_folders.write(tmp_path / "source", "hub")
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] |= {"one": "model-00001-of-00009.safetensors"}
    index.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"model-00001-of-00009\.safetensors: not a complete"):
        hf_folder.HfFolder.open(source)
    found["weight_map"]["one"] = found["weight_map"][NORM]
    index.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"one not found, expected as in model\.safetensors\.index\.json"):
        hf_folder.HfFolder.open(source)
    index.write_text("{}")
    with pytest.raises(UserError, match="not an index of safetensors"):
        hf_folder.HfFolder.open(source)


# --- training on ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data, tiny_backbone):
    """A short two-tower run, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    settings = [f"data.folder={tiny_data}", f"init.backbone={tiny_backbone}", f"output={folder / 'run'}"]
    assert train("tiny", *settings, "train.steps=6", "train.validate_every_steps=0")
    export.export(folder / "run", folder / "model")
    return folder


def test_an_import_trains_like_a_run_that_reads_the_folder(tmp_path, tiny_data, trained, records_of):
    """`convert import` and `init.denoiser` start the same run, not the one from the backbone."""
    model = trained / "model"
    short = [f"data.folder={tiny_data}", "train.steps=6", "train.validate_every_steps=0"]
    assert main.main(["convert", "import", "--from", str(model), "--to", str(tmp_path / "imported")]) == 0
    common = [*short, "init.backbone=null", f"init.denoiser={model}"]
    assert train("tiny", *common, f"output={tmp_path / 'read'}")
    assert train("tiny", *short, f"init.backbone={model}", f"output={tmp_path / 'imported'}")
    assert train("tiny", *short, f"init.backbone={model}", f"output={tmp_path / 'anew'}")
    read, imported, anew = (losses(tmp_path / name) for name in ("read", "imported", "anew"))
    assert len(read) == 6 and read == imported
    assert read[1] < anew[1] - 0.05, "six steps must have taught something"
    assert load_recipe(str(tmp_path / "imported" / "config.yaml")).init.backbone == str(model)


def test_the_recipe_of_an_import_trains_by_itself(tmp_path, tiny_data, tiny_backbone, records_of):
    import_run.import_folder(tiny_backbone, tmp_path / "run")
    recipe = str(tmp_path / "run" / "config.yaml")
    assert train(
        recipe,
        f"data.folder={tiny_data}",
        "train.steps=2",
        "schedule.warmup_steps=1",
        "data.sequence_length_tokens=32",
        "train.log_every_steps=1",
        "logging.wandb=disabled",
        "logging.console=false",
    )
    assert sorted(records_of(tmp_path / "run")) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.expert=2", "optimizer.distributed=true"],
        ["parallel.pipeline=2", "parallel.pipeline_layers=[3,2]"],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "parallel.expert_tensor=1"],
    ],
)
def test_a_checkpoint_of_any_layout_is_exported_bit_for_bit(tmp_path, tiny_data, trained, layout):
    """Two ranks load the import, take a step at learning rate 0, and save: no weight changes."""
    import_run.import_folder(trained / "model", tmp_path / "run")
    launch(
        2,
        "tiny",
        f"data.folder={tiny_data}",
        f"init.backbone={trained / 'model'}",
        f"output={tmp_path / 'run'}",
        "optimizer.learning_rate=0",
        "schedule.minimum_learning_rate=0",
        "train.router_bias_update_rate=0",
        "train.steps=1",
        "schedule.warmup_steps=0",
        "train.validate_every_steps=0",
        *layout,
    )
    saved = CheckpointWeights.open(checkpoint_folder(tmp_path / "run", 1))
    chunks = saved.metadata["tower.layers.0.mixer.out_proj.weight"].chunks
    assert len(chunks) == (2 if "parallel.tensor=2" in layout else 1)
    export.export(tmp_path / "run", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(trained / "model")


def test_a_denoiser_goes_with_its_own_backbone_alone(tmp_path, tiny_data, trained, tiny_backbone, capsys):
    export.export(trained / "run", tmp_path / "denoiser", options=export.ExportOptions("denoiser"))
    shutil.copytree(tiny_backbone, tmp_path / "other")
    with open(tmp_path / "other" / "config.json", "a") as file:
        file.write(" ")
    moved = shutil.copytree(tmp_path / "denoiser", tmp_path / "changed")
    pointer = {"backbone": "../other", "sha256": "0" * 64}
    (moved / "context_tower.json").write_text(json.dumps(pointer))
    start = ["train", "recipe=tiny", f"data.folder={tiny_data}", f"output={tmp_path / 'run'}"]
    mistakes = {
        f"init.backbone=null init.denoiser={moved}": "the backbone of",
        f"init.denoiser={trained / 'model'}": "runs/tiny/backbone",
        f"init.backbone=null init.denoiser={tiny_backbone}": "no denoiser_tower found",
        f"init.backbone={tmp_path / 'denoiser'}": "found a denoiser alone",
    }
    for overrides, message in mistakes.items():
        assert main.main([*start, *overrides.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()
