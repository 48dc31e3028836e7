"""Which old checkpoints are removed, and what happens if one cannot be."""

import logging
import os

import pytest

from helpers.faults import with_bad_steps
from helpers.runs import settings, train
from megatron_twotower.checkpoint import files
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.types import LogWindow


@pytest.fixture(autouse=True)
def forget_warnings():
    files._warn_once.cache_clear()


def write(run, step, *, skipped=0):
    """Write a checkpoint without data, after this number of skipped steps in a row."""
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    window = LogWindow(in_a_row=skipped)
    files.write_state(folder, files.CheckpointState(step, 8 * step, step, "ar", None, None, {}, window, {}))
    return folder


def steps(run):
    return [files.read_state(folder).step for folder in files.find_checkpoints(run)]


# (step, steps skipped in a row before it), what keep and keep_every leave.
@pytest.mark.parametrize(
    ("written", "keep", "keep_every", "left"),
    [
        ([(1, 0), (2, 0), (3, 0)], 2, 0, [2, 3]),
        ([(1, 0), (2, 0), (3, 0)], 1, 0, [3]),
        ([(1, 0), (2, 0), (3, 0), (4, 0)], 1, 2, [2, 4]),
        ([(1, 0), (2, 0), (3, 1)], 2, 0, [1, 2, 3]),
        ([(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)], 2, 0, [1, 2, 5]),
        ([(1, 0), (2, 1), (3, 2)], 2, 0, [1, 3]),
        ([(1, 0), (2, 1), (3, 0), (4, 0)], 2, 0, [3, 4]),
        ([(1, 1), (2, 2), (3, 3)], 1, 0, [3]),
        ([(1, 0), (2, 0), (4, 1), (6, 3), (7, 4)], 1, 4, [2, 4, 7]),
    ],
)
def test_what_no_step_was_taken_from_does_not_count(written, keep, keep_every, left, tmp_path):
    for step, skipped in written:
        write(tmp_path, step, skipped=skipped)
    files.retire(tmp_path, keep=keep, keep_every=keep_every)
    assert steps(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_one_that_cannot_be_read_stays_and_does_not_count(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step)
    (checkpoint_folder(tmp_path, 3) / "state.json").write_text("{}")
    files.retire(tmp_path, keep=2, keep_every=0)
    assert [folder.name[-1] for folder in files.find_checkpoints(tmp_path)] == ["2", "3", "4"]


def test_a_run_that_diverges_keeps_the_checkpoint_before(tmp_path, tiny_data, tiny_backbone, monkeypatch):
    """The third step still is finite; from its weights no step is, as after a rate too high."""
    run = tmp_path / "run"
    common = ["train.validate_every_steps=0", "train.checkpoint_every_steps=1", "train.keep_checkpoints=1"]
    common += ["train.stop_after_nonfinite=4", "train.steps=9", "schedule.warmup_steps=0", "schedule.kind=constant"]
    with_bad_steps(monkeypatch, set(range(4, 20)))
    with pytest.raises(UserError, match=r"step 7: .* 4 steps in a row"):
        train("tiny", *settings(tiny_data, run, tiny_backbone, *common))
    assert set(steps(run)) >= {2, 3} and len(steps(run)) == 3


def test_one_that_cannot_be_removed_stays_with_one_warning(tmp_path, monkeypatch, caplog):
    for step in range(1, 4):
        write(tmp_path, step)
    replace = os.replace

    def refused(source, target):
        if str(source).endswith("1"):
            raise OSError(30, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            files.retire(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{checkpoint_folder(tmp_path, 1)}: cannot be removed (Read-only file system); it stays"
    ]


def test_of_a_link_the_link_is_removed(tmp_path, caplog):
    elsewhere = write(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoints").mkdir()
    checkpoint_folder(tmp_path, 1).symlink_to(elsewhere)
    write(tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        files.retire(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [2] and files.read_state(elsewhere).step == 1
    assert f"{elsewhere} stays" in caplog.text


@pytest.mark.parametrize("old", ["folder", "link", "link to nothing"])
def test_a_checkpoint_takes_the_place_of_an_older_one_of_its_step(old, tmp_path):
    new, folder = write(tmp_path / "new", 3), checkpoint_folder(tmp_path, 3)
    if old == "folder":
        write(tmp_path, 3, skipped=1)
    else:
        folder.parent.mkdir(parents=True)
        folder.symlink_to(write(tmp_path / "elsewhere", 3) if old == "link" else tmp_path / "nothing")
    files.publish(new, folder)
    assert files.read_state(folder).window.in_a_row == 0 and not folder.is_symlink()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_run_goes_on_over_a_linked_checkpoint(tmp_path, tiny_data, tiny_backbone):
    run = tmp_path / "run"
    common = ["train.validate_every_steps=0", "train.checkpoint_every_steps=1", "schedule.kind=constant"]
    common += ["schedule.warmup_steps=0", "train.keep_checkpoints=1"]
    assert train("tiny", *settings(tiny_data, run, tiny_backbone, *common, "train.steps=1"))
    (tmp_path / "disk").mkdir()
    checkpoint_folder(run, 1).rename(tmp_path / "disk" / "one")
    checkpoint_folder(run, 1).symlink_to(tmp_path / "disk" / "one")
    assert train("tiny", *settings(tiny_data, run, tiny_backbone, *common, "train.steps=3"))
    assert 1 not in steps(run) and 3 in steps(run)
    assert files.damaged(tmp_path / "disk" / "one") is None
