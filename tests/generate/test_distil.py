"""Text of the context tower as training data."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.shards import Corpus
from megatron_twotower.generate import distil as distillation
from megatron_twotower.generate import engine
from megatron_twotower.generate.distil import DistilSettings, distil

SMALL = DistilSettings(sequences=5, prompt_tokens=8, new_tokens=6, batch_size=2)


def test_every_line_is_training_text_with_its_greedy_continuation(two_tower_folder, tiny_data, tmp_path):
    output = tmp_path / "texts.jsonl"
    assert distil(two_tower_folder, tiny_data, output, SMALL) == 5
    model, tokenizer = engine.load(two_tower_folder)
    prompts = evenly_spaced_windows(Corpus.open(tiny_data / "train"), count=5, length=8)
    assert len(torch.unique(prompts, dim=0)) > 1
    expected = [tokenizer.decode(model.generate_ar(row.unsqueeze(0), 6)[0].tolist()) for row in prompts]
    assert [json.loads(line) for line in output.read_text().splitlines()] == [{"text": text} for text in expected]
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_every_eos_of_the_folder_ends_a_text(two_tower_folder, tiny_data, tmp_path):
    model, tokenizer = engine.load(two_tower_folder)
    prompts = evenly_spaced_windows(Corpus.open(tiny_data / "train"), count=5, length=8)
    whole = [model.generate_ar(row.unsqueeze(0), 6, eos_token_id=())[0].tolist() for row in prompts]
    eos = whole[0][10]
    folder = shutil.copytree(two_tower_folder, tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eos]}))
    distil(folder, tiny_data, tmp_path / "texts.jsonl", SMALL)
    ends = [next((i for i in range(8, 14) if ids[i] in (2, eos)), 14) for ids in whole]
    assert ends[0] <= 10
    expected = [tokenizer.decode(ids[:end]) for ids, end in zip(whole, ends, strict=True)]
    assert [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()] == expected


def test_the_output_is_prepared_like_any_text(two_tower_folder, tiny_data, tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    words = ["--sequences", "30", "--prompt-tokens", "16", "--new-tokens", "16"]
    arguments = ["--model", str(two_tower_folder), "--data", str(tiny_data), "--output", str(output)]
    assert main.main(["distil", *arguments, *words]) == 0
    assert "30 texts of 16 + 16 tokens" in capsys.readouterr().out
    prepare = ["data", "prepare", "--input", str(output), "--tokenizer", str(two_tower_folder)]
    assert main.main([*prepare, "--output", str(tmp_path / "data"), "--holdout", "0.2", "--workers", "1"]) == 0
    assert Corpus.open(tmp_path / "data" / "train").total_tokens > 0


def test_mistakes_leave_no_file(two_tower_folder, tiny_data, tmp_path, monkeypatch):
    output = tmp_path / "texts.jsonl"
    with pytest.raises(UserError, match="--new-tokens: found 0, expected at least 1"):
        distil(two_tower_folder, tiny_data, output, replace(SMALL, new_tokens=0))

    assert not list(tmp_path.iterdir())
    output.write_text("kept\n")
    with pytest.raises(UserError, match="exists, expected a file that is not there yet"):
        distil(two_tower_folder, tiny_data, output, SMALL)
    assert output.read_text() == "kept\n"


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_run_resumes_after_its_last_batch(two_tower_folder, tiny_data, tmp_path, monkeypatch, stop):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
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
    monkeypatch.setattr(distillation, "continue_windows", lambda task: written.append(task) or continue_windows(task))
    distil(two_tower_folder, tiny_data, output, SMALL)
    assert len(written) == 3
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]
