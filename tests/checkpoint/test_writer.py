"""A checkpoint gets its name only when it is whole, and only in a folder that is the run's own."""

import pytest

from helpers.runs import settings
from helpers.trainers import built_trainer
from megatron_twotower.checkpoint import files, writer
from megatron_twotower.common import files as common_files
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.train import run as train_run
from megatron_twotower.types import LogWindow


@pytest.fixture(scope="module")
def sharded_state(tmp_path_factory, tiny_data, tiny_backbone):
    config = load_recipe("tiny", settings(tiny_data, tmp_path_factory.mktemp("run"), tiny_backbone))
    with built_trainer(config) as (trainer, model):
        yield train_run.state_of(trainer, model)


def save(run, sharded_state, check_lock=lambda: None):
    saving = writer.CheckpointWriter(run, sharded_state, background=False, keep=1, keep_every=0, check_lock=check_lock)
    try:
        return saving.begin(files.CheckpointState(1, 8, 1, "ar", None, None, {}, LogWindow(), {}), {})
    finally:
        saving.close()


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_file_that_the_first_rank_does_not_see_is_named(damage, sharded_state, tmp_path, monkeypatch):
    monkeypatch.setattr(common_files, "_UNSEEN_SECONDS", 0.1)
    written = writer._write

    def write(*given):
        result = written(*given)
        file = tmp_path / "checkpoints" / "step-00000001.partial" / "__0_0.distcp"
        if damage == "removed":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
        return result

    monkeypatch.setattr(writer, "_write", write)
    with pytest.raises(
        UserError, match=r"step-00000001: cannot be written \(rank 0 does not see __0_0.distcp of rank 0"
    ):
        save(tmp_path, sharded_state)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_run_whose_folder_was_taken_writes_no_checkpoint(allowed, sharded_state, tmp_path):
    """Another run takes the folder before the save, or while it is written."""
    calls = iter([None] * allowed)

    def check_lock():
        if next(calls, "taken") == "taken":
            raise UserError("taken")

    with pytest.raises(UserError, match="taken"):
        save(tmp_path, sharded_state, check_lock)
    assert not files.find_checkpoints(tmp_path)
    (saved,) = save(tmp_path, sharded_state)
    assert saved.step == 1 and files.damaged(files.find_checkpoints(tmp_path)[0]) is None


def test_a_folder_that_cannot_be_created_is_one_line(sharded_state, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"step-00000001: cannot be written \(.*\); older checkpoints are complete"):
        save(tmp_path, sharded_state)
