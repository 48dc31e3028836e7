"""The files of a run folder, as they are written and read."""

import json
from importlib import metadata

import pytest

from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import read_metrics, read_provenance, write_start


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics\.jsonl: not found"):
        read_metrics(path)
    path.write_text('{"step": 1}\nbroken\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: found 'broken'"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="expected a JSON object with a step"):
        read_metrics(path)


def test_an_incomplete_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_starting_run_writes_configuration_and_provenance(tmp_path):
    assert read_provenance(tmp_path / "run") == {}
    facts = run_folder.provenance("1.2", seed=7, ranks=2, backbone="runs/b", fingerprint="ab")
    write_start(tmp_path / "run", config="seed: 7\n", facts=facts)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 7\n"
    assert read_provenance(tmp_path / "run") == facts == json.loads(json.dumps(facts))
    assert facts["packages"]["torch"] == metadata.version("torch")
    wanted = ("megatron_twotower", "seed", "ranks", "backbone", "backbone_sha256")
    assert [facts[key] for key in wanted] == ["1.2", 7, 2, "runs/b", "ab"]


def test_the_folder_of_a_checkpoint_sorts_by_step(tmp_path):
    folders = [run_folder.checkpoint_folder(tmp_path, step) for step in (1, 20, 300)]
    assert folders == sorted(folders) and folders[0] == tmp_path / "checkpoints" / "step-00000001"
