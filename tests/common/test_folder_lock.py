"""One live owner of a folder: after kills, on other machines, on any file system."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from megatron_twotower.common import folder_lock
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.folder_lock import FolderLock, LockTimes, Owner

TIMES = LockTimes(beat=0.05, silent=0.4, locked=0.6, settle=0.1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.lock"


def lock(path):
    return FolderLock(path, times=TIMES, say=lambda _: None)


def acquired(path):
    found = lock(path)
    found.acquire()
    return found


def seconds_to_acquire(path):
    started = time.monotonic()
    acquired(path).release()
    return time.monotonic() - started


def write_owner(path, beat=0, **changes):
    """Write the record of an owner that does not lock the file, over the earlier one at once."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, folder_lock._record(replace(Owner(), **changes), beat), 0)
    os.close(descriptor)


def in_another_process(path, then):
    """Acquire the lock in a process, and run a statement there. Returns the process."""
    code = f"""
import os, signal, sys, time
from pathlib import Path
from megatron_twotower.common.folder_lock import FolderLock
FolderLock(Path({str(path)!r})).acquire()
print("acquired", flush=True)
{then}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "acquired\n"
    return process


def test_a_second_owner_is_refused_by_name_and_a_third_may_follow(path):
    first = acquired(path)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*, expected one run"):
        lock(path).acquire()
    time.sleep(3 * TIMES.beat)
    first.check()
    first.release()
    assert not path.exists()
    assert seconds_to_acquire(path) < TIMES.silent


def test_the_lock_of_a_killed_process_is_free_at_once(path):
    process = in_another_process(path, "time.sleep(60)")
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
        lock(path).acquire()
    process.kill()
    process.communicate()
    assert path.exists()
    assert seconds_to_acquire(path) < TIMES.silent


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(path):
    then = "if os.fork() == 0:\n    time.sleep(30)\n    os._exit(0)\nprint('forked', flush=True)\ntime.sleep(60)"
    process = in_another_process(path, then)
    assert process.stdout.readline() == "forked\n"
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert seconds_to_acquire(path) < TIMES.silent


def test_a_silent_owner_of_another_machine_is_dead_after_a_while(path):
    write_owner(path, machine="another", host="other")
    assert TIMES.silent <= seconds_to_acquire(path) < 10


@pytest.mark.parametrize("content", [b"", b"{", b'{"host": 1}'])
def test_an_incomplete_record_is_waited_for(path, content):
    path.write_bytes(content)
    assert TIMES.silent <= seconds_to_acquire(path) < 10


def test_an_owner_of_another_machine_that_counts_is_refused_soon(path):
    stop, beats = threading.Event(), iter(range(1000))

    def count():
        while not stop.wait(TIMES.beat):
            write_owner(path, next(beats), machine="another", host="other", process=77, token="t")

    write_owner(path, machine="another", host="other", process=77, token="t")
    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 77 on other"):
            lock(path).acquire()
    finally:
        stop.set()
        thread.join()


def test_an_earlier_start_of_the_same_slurm_job_is_dead(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_owner(path, machine="another", job="7", restarts=1)
    assert seconds_to_acquire(path) < TIMES.silent
    for other in ({"job": "7", "restarts": 2}, {"job": "8", "restarts": 0}, {"job": "", "restarts": 0}):
        write_owner(path, machine="another", **other)
        assert seconds_to_acquire(path) >= TIMES.silent


def test_a_server_that_still_holds_the_lock_of_a_dead_machine_is_waited_for(path, monkeypatch):
    write_owner(path, machine="another", host="other", process=77)
    monkeypatch.setattr(folder_lock, "_flock", lambda descriptor: False)
    started = time.monotonic()
    with pytest.raises(UserError, match="in use by process 77 on other"):
        lock(path).acquire()
    assert time.monotonic() - started >= TIMES.locked
    refusals = iter([False] * 3)
    monkeypatch.setattr(folder_lock, "_flock", lambda descriptor: next(refusals, True))
    acquired(path).release()


def test_without_locks_of_the_file_system_a_new_file_has_one_owner(path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_flock", lambda descriptor: None)
    first = acquired(path)
    with pytest.raises(UserError, match="in use by"):
        lock(path).acquire()
    first.check()
    first.release()
    write_owner(path)  # killed: of this machine, but nothing says that it is dead
    assert seconds_to_acquire(path) >= TIMES.silent


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("stale", [None, "here", "another"])
def test_of_many_at_once_one_becomes_the_owner(path, monkeypatch, flock, stale):
    if not flock:
        monkeypatch.setattr(folder_lock, "_flock", lambda descriptor: None)
    if stale:
        write_owner(path, **({"machine": stale} if stale != "here" else {}))
    owners, refused, start = [], [], threading.Barrier(8)

    def contend():
        start.wait()
        try:
            owners.append(acquired(path))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)
    owners[0].check()
    owners[0].release()


def test_an_owner_that_was_taken_for_dead_notices_and_leaves_the_lock_alone(path):
    first = acquired(path)
    other = asdict(Owner()) | {"host": "other", "token": "t"}
    path.write_bytes(json.dumps(other | {"beat": 0}).encode())
    before = path.read_bytes()
    time.sleep(3 * TIMES.beat)
    with pytest.raises(UserError, match=r"on other, started .* took this run for dead"):
        first.check()
    first.release()
    assert path.read_bytes() == before


def test_a_lock_that_was_removed_by_hand_is_written_again(path):
    first = acquired(path)
    path.unlink()
    first.check()
    time.sleep(6 * TIMES.beat)
    with pytest.raises(UserError, match="in use by"):
        lock(path).acquire()
    first.release()
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"missing/run.lock: cannot be written \(No such file or directory\)"):
        lock(tmp_path / "missing" / "run.lock").acquire()
