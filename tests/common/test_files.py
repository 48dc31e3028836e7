"""Files and folders that are complete or absent, also after an error or a kill."""

import errno
import os
import shutil

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file, atomic_folder, partial_path, read_json_object, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_complete_or_unchanged(tmp_path):
    with atomic_file(tmp_path / "a") as path:
        path.write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="a: cannot be written"), atomic_file(tmp_path / "a") as path:
        path.write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_gets_its_folder_and_takes_text_or_bytes(tmp_path):
    write_file(tmp_path / "deep" / "text", "é")
    write_file(tmp_path / "deep" / "bytes", b"\xff")
    assert (tmp_path / "deep" / "text").read_bytes() == "é".encode()
    assert (tmp_path / "deep" / "bytes").read_bytes() == b"\xff"
    assert names(tmp_path / "deep") == ["bytes", "text"]


def test_a_file_in_the_place_of_a_folder_is_one_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a: cannot be written \("):
        write_file(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


def test_a_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == []
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"] and (tmp_path / "deep" / "out" / "a").read_text() == "new"


def test_an_existing_folder_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UserError, match=r"out: exists, expected"), atomic_folder(out):
        raise AssertionError
    with pytest.raises(ZeroDivisionError), atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"] and names(out) == ["old"]
    with atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
        assert names(out) == ["old"]
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    out, partial, old = tmp_path / "out", partial_path(tmp_path / "out"), tmp_path / "out.old"
    for leftover in (partial, old):
        leftover.mkdir()
        (leftover / "stale").write_text("stale")
    with atomic_folder(out) as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out", "out.old"], "nothing is replaced, so `out.old` is another folder"
    with atomic_folder(out, replace=True):
        pass
    assert names(tmp_path) == ["out"] and names(out) == []


def test_a_second_process_that_writes_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("first")
        for replace in (False, True):
            with pytest.raises(UserError, match=r"out.partial: in use, expected no other process"):
                atomic_folder(out, replace=replace).__enter__()
        assert names(folder) == ["a"]
    assert names(out) == ["a"]


def test_a_kill_between_the_two_renames_leaves_the_old_folder(tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    out.mkdir()
    (out / "old").write_text("old")

    def killed(source, target):
        if target == out:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, replace=True):
        pass
    assert names(tmp_path) == ["out.old"] and names(tmp_path / "out.old") == ["old"]
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), atomic_folder(out, replace=True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out.old"], "until a new folder is complete"
    with atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def test_a_full_disk_is_one_error_before_and_while_writing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    message = r"out: cannot be written \(No space left on device\), nothing is left of it"
    with pytest.raises(UserError, match=message), atomic_folder(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    usage = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"out: found 1\.0 GiB free"), atomic_folder(out, size=2**31):
        raise AssertionError
    assert names(tmp_path) == []


def test_an_error_that_no_user_can_correct_is_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        (tmp_path / "no" / "such").read_text()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON (Expecting value"),
        (b"{", "not valid JSON"),
        (b"[1]", "found a list"),
        (b"3", "found a int"),
        (b"\xe9", "not valid JSON ('utf-8' codec"),
        (None, "cannot be read (No such file"),
    ],
)
def test_what_is_no_json_object_is_one_line(content, said, tmp_path):
    file = tmp_path / "facts.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json_object(file, expected="facts")
    assert str(error.value).startswith(f"{file}: {said}") and str(error.value).endswith("expected facts")
