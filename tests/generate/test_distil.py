"""Text of the context tower as training data."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import corpus_of_ids
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.verify import verify
from megatron_twotower.generate import distil as distillation
from megatron_twotower.generate import engine
from megatron_twotower.generate.distil import DistilSettings, distil

SMALL = DistilSettings(sequences=5, prompt_tokens=8, new_tokens=6, batch_size=2)


def documents(folder, split="train"):
    corpus = Corpus.open(folder / split)
    return [corpus.document(number).tolist() for number in range(corpus.documents)]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_document_is_a_window_of_its_split_with_the_greedy_continuation(
    split, two_tower_folder, tiny_data, tmp_path
):
    count = {"train": 5, "validation": 2}
    assert distil(two_tower_folder, tiny_data, tmp_path / "data", SMALL) == count
    model, _ = engine.load(two_tower_folder)
    prompts = evenly_spaced_windows(Corpus.open(tiny_data / split), count=count[split], length=8)
    assert len(torch.unique(prompts, dim=0)) > 1
    assert documents(tmp_path / "data", split) == [
        model.generate_ar(row.unsqueeze(0), 6)[0].tolist() for row in prompts
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_text_that_ended_has_its_eos_and_keeps_its_ids(two_tower_folder, tiny_data, tmp_path):
    model, tokenizer = engine.load(two_tower_folder)
    prompts = evenly_spaced_windows(Corpus.open(tiny_data / "train"), count=5, length=8)
    whole = [model.generate_ar(row.unsqueeze(0), 6, eos_token_id=())[0].tolist() for row in prompts]
    eos = whole[0][10]
    folder = shutil.copytree(two_tower_folder, tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eos]}))
    distil(folder, tiny_data, tmp_path / "data", SMALL)
    ends = [next((i + 1 for i in range(8, 14) if ids[i] in (2, eos)), 14) for ids in whole]
    assert ends[0] <= 11
    assert documents(tmp_path / "data") == [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    again = tokenizer([tokenizer.decode(ids) for ids in documents(tmp_path / "data")])["input_ids"]
    assert again != documents(tmp_path / "data"), "the ids of this test would survive being text"


def test_the_output_is_a_prepared_folder(two_tower_folder, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus_of_ids, "SHARD_TOKENS", 100)
    output = tmp_path / "data"
    words = ["--sequences", "30", "--prompt-tokens", "16", "--new-tokens", "16"]
    arguments = ["distil", "--model", str(two_tower_folder), "--data", str(tiny_data), "--output", str(output), *words]
    assert main.main(arguments) == 0
    assert "texts of 16 + 16 tokens, 30 for train, 2 for validation" in capsys.readouterr().out
    corpus = Corpus.open(output / "train", verify_shards=True)
    assert [shard.documents for shard in corpus.shards] == [3] * 10
    _, tokenizer = engine.load(two_tower_folder)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents(output)]
    assert corpus.total_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.total_characters == sum(map(len, texts))
    assert verify(str(output)) == []
    assert main.main(["data", "inspect", str(output), "--picture", str(tmp_path / "lengths.png")]) == 0
    capsys.readouterr()
    assert main.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main.main([*arguments, "--overwrite"]) == 0


def test_data_without_held_out_text_gives_none(two_tower_folder, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(data / "validation")
    assert distil(two_tower_folder, data, tmp_path / "out", SMALL) == {"train": 5}
    assert not (tmp_path / "out" / "validation").exists()


def test_mistakes_leave_nothing(two_tower_folder, tiny_data, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="--new-tokens: found 0, expected at least 1"):
        distil(two_tower_folder, tiny_data, output, replace(SMALL, new_tokens=0))
    with pytest.raises(UserError, match="expected at least 2 x 100000"):
        distil(two_tower_folder, tiny_data, output, replace(SMALL, prompt_tokens=100_000))
    other = shutil.copytree(two_tower_folder, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match="other: found a tokenizer with sha256"):
        distil(other, tiny_data, output, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    output.mkdir()
    (output / "kept").write_text("kept\n")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists already" if not overwrite else "an earlier prepared folder"):
            distil(two_tower_folder, tiny_data, output, SMALL, overwrite=overwrite)
    assert [path.name for path in output.iterdir()] == ["kept"]


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_an_interrupted_run_resumes_after_its_last_batch(two_tower_folder, tiny_data, tmp_path, monkeypatch, stop):
    whole, output = tmp_path / "whole", tmp_path / "out"
    distil(two_tower_folder, tiny_data, whole, SMALL)
    written, continue_windows = [], distillation.continue_windows

    def failing(task):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(task)
        return continue_windows(task)

    monkeypatch.setattr(distillation, "continue_windows", failing)
    with pytest.raises(KeyboardInterrupt):
        distil(two_tower_folder, tiny_data, output, SMALL)
    assert not output.exists()
    with pytest.raises(UserError, match="found an interrupted run with new_tokens 6, expected 7"):
        distil(two_tower_folder, tiny_data, output, replace(SMALL, new_tokens=7))
    counted = []
    monkeypatch.setattr(distillation, "continue_windows", lambda task: written.append(task) or continue_windows(task))
    distil(two_tower_folder, tiny_data, output, SMALL, progress=lambda *amounts: counted.append(amounts))
    assert len(written) == 4  # three batches for training, one for validation
    assert counted[0] == ("writing", sum(len(task.windows) for task in written[:stop]), 7)
    assert counted[-1] == ("writing", 7, 7)
    assert files(output) == files(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_that_was_interrupted_while_it_wrote_shards_resumes(two_tower_folder, tiny_data, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole", tmp_path / "out"
    distil(two_tower_folder, tiny_data, whole, SMALL)

    def failing(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(corpus_of_ids, "write_index", failing)
        with pytest.raises(KeyboardInterrupt):
            distil(two_tower_folder, tiny_data, output, SMALL)
    assert (tmp_path / "out.partial" / "data" / "train").is_dir() and not output.exists()
    distil(two_tower_folder, tiny_data, output, SMALL)
    assert files(output) == files(whole)


def test_a_denoiser_trains_on_the_output(two_tower_folder, tiny_data, tmp_path):
    distil(
        two_tower_folder, tiny_data, tmp_path / "data", replace(SMALL, sequences=40, prompt_tokens=32, new_tokens=32)
    )
    assert np.mean([len(ids) for ids in documents(tmp_path / "data")]) > 32
    overrides = [f"init.denoiser={two_tower_folder}", "init.backbone=null", f"data.folder={tmp_path / 'data'}"]
    overrides += ["data.documents=respect", "data.sequence_length_tokens=64"]
    steps = ["train.steps=2", "schedule.warmup_steps=1", "train.validation_sequences=2"]
    assert main.main(["train", "recipe=tiny", *overrides, *steps, f"output={tmp_path / 'run'}"]) == 0
