"""A denoiser under another context tower than it was trained with: start, resume, export."""

import json
import logging
import shutil

import pytest
import torch

from helpers.hf_folders import contents
from helpers.runs import losses, settings, train
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import export, hf_folder, initial_weights, model_card
from megatron_twotower.data.tokenizer import check_same_ids
from megatron_twotower.model import parameter_map

SHORT = ("train.steps=2", "schedule.warmup_steps=1", "train.validate_every_steps=0", "train.checkpoint_every_steps=1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_data, tiny_backbone):
    """Two towers that were trained together (`model`), and another backbone (`other`)."""
    folder = tmp_path_factory.mktemp("pair")
    assert train("tiny", *settings(tiny_data, folder / "run", tiny_backbone, *SHORT))
    export.export(folder / "run", folder / "model")
    shape = load_recipe("tiny_ar").model
    source, entries = initial_weights.random_backbone(shape, seed=77), parameter_map.backbone_entries(shape)
    hf_folder.write_folder(
        folder / "other",
        hf_folder.lazy_tensors(source, entries, shape, dtype=torch.float32),
        config=model_card.backbone_config_json(shape, dtype=torch.float32),
        files={},
        copies=[],
    )
    return folder


def tensors(folder, prefix):
    return {name: data for name, data in contents(folder).items() if name.startswith(prefix)}


def test_a_denoiser_is_trained_under_another_context_tower(pair, tiny_data, tmp_path, caplog):
    denoiser = shutil.copytree(pair / "model", tmp_path / "model")
    run = tmp_path / "run"
    words = settings(tiny_data, run, pair / "other", f"init.denoiser={denoiser}", *SHORT)
    with caplog.at_level(logging.WARNING):
        assert train("tiny", *words)
    said = [record.getMessage() for record in caplog.records if "another context tower" in record.getMessage()]
    assert said == [
        f"the denoiser of {denoiser} was trained with another context tower, that of {denoiser}; it is trained with "
        f"that of {pair / 'other'} now"
    ]
    facts = json.loads((run / "provenance.json").read_text())
    prints = hf_folder.fingerprint(pair / "other"), hf_folder.fingerprint(denoiser)
    assert (facts["backbone_sha256"], facts["denoiser_sha256"]) == prints
    # What was exported: the other context tower as it was, and a denoiser that has learnt further.
    export.export(run, tmp_path / "out")
    export.export(pair / "model", tmp_path / "swapped", options=export.ExportOptions(backbone=pair / "other"))
    towers = [tensors(tmp_path / name, "context_") for name in ("out", "swapped")]
    assert towers[0] == towers[1] != tensors(pair / "model", "context_") and towers[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(sha256 in card for sha256 in prints)
    denoisers = [
        tensors(folder, "denoiser_tower.") for folder in (tmp_path / "swapped", pair / "model", tmp_path / "out")
    ]
    assert denoisers[0] == denoisers[1] != denoisers[2]
    # A resume needs the folder of the denoiser no longer, and keeps what was written of it.
    shutil.rmtree(tmp_path / "out")
    longer = [*words, "train.steps=3"]
    shutil.rmtree(denoiser)
    (denoiser).mkdir()
    shutil.copy(pair / "model" / "generation_config.json", denoiser)
    assert train("tiny", *longer)
    assert json.loads((run / "provenance.json").read_text())["denoiser_sha256"] == prints[1]
    assert sorted(losses(run)) == [1, 2, 3]


def test_the_first_loss_is_that_of_the_swapped_pair(pair, tiny_data, tmp_path):
    """The towers are those of the two folders: as if they had been one folder."""
    export.export(pair / "model", tmp_path / "swapped", options=export.ExportOptions(backbone=pair / "other"))
    short = ("train.steps=1", "schedule.warmup_steps=0", "train.validate_every_steps=0")
    starts = {"two": (pair / "other", pair / "model"), "one": (tmp_path / "swapped", tmp_path / "swapped")}
    for name, (backbone, denoiser) in starts.items():
        assert train("tiny", *settings(tiny_data, tmp_path / name, backbone, f"init.denoiser={denoiser}", *short))
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_another_shape_or_other_ids_are_refused(pair, tiny_data, tmp_path):
    denoiser = shutil.copytree(pair / "model", tmp_path / "model")
    config = json.loads((denoiser / "config.json").read_text())
    (denoiser / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 9.0}))
    with pytest.raises(UserError, match=r"init\.denoiser: routed_scaling_factor: found 9.0 in .*, expected 2\.5"):
        load_recipe("tiny", settings(tiny_data, tmp_path / "run", pair / "other", f"init.denoiser={denoiser}"))
    ours, theirs = (shutil.copytree(tiny_data / "tokenizer", tmp_path / name) for name in ("ours", "theirs"))
    check_same_ids(ours, theirs)
    content = json.loads((theirs / "tokenizer.json").read_text())
    special = content["added_tokens"][-1]
    renamed = json.dumps(content).replace(json.dumps(special["content"]), json.dumps("<other>"))
    (theirs / "tokenizer.json").write_text(renamed)
    check_same_ids(ours, theirs)  # special tokens may have other names
    vocabulary = content["model"]["vocab"]
    (first, second) = [text for text, token_id in vocabulary.items() if token_id in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (theirs / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"found .* as id 300, expected .* \(and 1 others\)"):
        check_same_ids(ours, theirs)
