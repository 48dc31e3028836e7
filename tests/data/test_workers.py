"""Workers: every task runs once, counts are shared, errors are raised, no process is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.data import workers


def double(task):
    workers.count(1, task, 2 * task)
    return 2 * task


def fail_at_three(task):
    if task == 3:
        raise UserError("three")
    workers.count(0, 0, 0)
    return task


def die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_the_stop(task):
    if task == 0:
        raise UserError("zero")
    while True:
        workers.count(1, 0, 0)
        time.sleep(0.01)


@pytest.mark.parametrize("number", [1, 2])
def test_every_task_is_done_once_and_counted(number):
    counts = []
    results = dict(workers.unordered(double, range(50), workers=number, on_count=lambda one: counts.append(list(one))))
    assert results == {task: 2 * task for task in range(50)}
    assert counts[-1] == [50, 1225, 2450]
    assert counts == sorted(counts)


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_of_a_task_comes_out(number):
    with pytest.raises(UserError, match="three"):
        list(workers.unordered(fail_at_three, range(100), workers=number, on_count=lambda _: None))


def test_tasks_are_taken_as_they_can_be_begun():
    taken = []

    def tasks():
        for task in range(1000):
            taken.append(task)
            yield task

    results = workers.unordered(double, tasks(), workers=2, on_count=lambda _: None)
    next(results)
    assert len(taken) < 20
    results.close()


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died"):
        list(workers.unordered(die, range(4), workers=2, on_count=lambda _: None))


def test_what_is_under_way_is_stopped_at_an_error():
    with pytest.raises(UserError, match="zero"):  # and not for ever
        list(workers.unordered(wait_for_the_stop, range(3), workers=2, on_count=lambda _: None))


ORPHANS = """
import os, sys, time
from megatron_twotower.data import workers

def report(task):
    with open(sys.argv[1], "a") as stream:
        stream.write(f"{os.getpid()}\\n")
    time.sleep(300)

if __name__ == "__main__":
    list(workers.unordered(report, range(2), workers=2, on_count=lambda _: None))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(ORPHANS)
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py", pids], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as stream:
                return stream.read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while any(alive(pid) for pid in map(int, pids.read_text().split())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
