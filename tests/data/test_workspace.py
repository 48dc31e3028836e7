"""OUTPUT.partial: one request, one run at a time."""

import json

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import partial_path
from megatron_twotower.data import workspace
from megatron_twotower.data.workspace import check_output, discard, move_into_place, resuming

CONTENT = ["data", "lock", "parts", "plan.json", "selection", "shards"]


def test_work_for_the_same_request_is_resumed_and_for_another_refused(tmp_path):
    output = tmp_path / "deep" / "out"
    with resuming(partial_path(output), request={"a": 1, "b": (2, 3)}, overwrite=False) as partial:
        assert sorted(path.name for path in partial.iterdir()) == CONTENT
        (partial / "parts" / "done").write_text("x")
        (partial / "parts" / "begun.17.partial").write_text("x")
    with resuming(partial_path(output), request={"a": 1, "b": (2, 3)}, overwrite=True) as partial:
        assert [path.name for path in (partial / "parts").iterdir()] == ["done"]
    message = r"out\.partial: found an interrupted run with a 1, expected 9; repeat that run as it was, or overwrite"
    with (
        pytest.raises(UserError, match=message),
        resuming(partial_path(output), request={"a": 9, "b": (2, 3)}, overwrite=False),
    ):
        raise AssertionError
    assert (partial / "parts" / "done").exists()
    with resuming(partial_path(output), request={"a": 9}, overwrite=True) as partial:
        assert not list((partial / "parts").iterdir())
        assert json.loads((partial / "plan.json").read_text()) == {"a": 9}
        discard(partial)
    assert not partial.exists()


def test_a_folder_without_a_request_is_cleared(tmp_path):
    """A run that is killed right after its start leaves such a folder."""
    partial = partial_path(tmp_path / "out")
    (partial / "parts").mkdir(parents=True)
    (partial / "plan.json").write_text("{")
    with resuming(tmp_path / "out.partial", request={"a": 1}, overwrite=False) as again:
        assert again == partial and json.loads((partial / "plan.json").read_text()) == {"a": 1}


def test_after_a_kill_while_earlier_work_is_discarded_nothing_is_resumed(tmp_path, monkeypatch):
    with resuming(tmp_path / "out.partial", request={"a": 1}, overwrite=False) as partial:
        (partial / "parts" / "done").write_text("x")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workspace.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), resuming(tmp_path / "out.partial", request={"a": 9}, overwrite=True):
            raise AssertionError
    with resuming(tmp_path / "out.partial", request={"a": 1}, overwrite=False) as partial:
        assert sorted(path.name for path in partial.iterdir()) == CONTENT
        assert not list((partial / "parts").iterdir())


def test_one_run_at_a_time(tmp_path):
    again = resuming(tmp_path / "out.partial", request={}, overwrite=True)
    with (
        resuming(tmp_path / "out.partial", request={}, overwrite=False),
        pytest.raises(UserError, match=r"out\.partial: in use"),
        again,
    ):
        raise AssertionError
    with resuming(tmp_path / "out.partial", request={}, overwrite=False):
        pass


def test_the_output_changes_in_one_step_and_what_a_kill_left_is_cleared(tmp_path):
    output = tmp_path / "out"
    for content in ("first", "second"):
        with resuming(partial_path(output), request={"content": content}, overwrite=False) as partial:
            (partial / "data" / "mark").write_text(content)
            move_into_place(output)
        assert (output / "mark").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (partial / "parts").mkdir(parents=True)
    (tmp_path / "out.old").mkdir()
    with pytest.raises(UserError, match="out: exists already, expected a folder that does not"):
        check_output(output, mark="mark", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_output(output, mark="mark", overwrite=True)
    with pytest.raises(UserError, match="out: found no other in it"):
        check_output(output, mark="other", overwrite=True)
    check_output(tmp_path / "new", mark="mark", overwrite=False)


def test_an_error_that_names_no_file_is_raised_with_the_folder(tmp_path):
    """On a full disk, the error of a write to an open file names no file."""
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(UserError, match=r"out\.partial: cannot be written \(No space left on device\)$"),
        resuming(tmp_path / "out.partial", request={}, overwrite=False),
    ):
        raise full
    with (
        pytest.raises(FileNotFoundError, match="gone"),
        resuming(tmp_path / "out.partial", request={}, overwrite=False),
    ):
        (tmp_path / "gone").read_bytes()


def test_a_mistake_before_the_first_part_leaves_nothing(tmp_path):
    partial = tmp_path / "out.partial"
    with pytest.raises(UserError, match="ray: not"), resuming(partial, request={}, overwrite=False):
        raise UserError("ray: not installed")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="disk"), resuming(partial, request={}, overwrite=False):
        (partial / "parts" / "000000.json").write_text("{}")
        raise UserError("disk")
    assert (partial / "parts" / "000000.json").exists()
