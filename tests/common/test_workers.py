"""Workers: every task runs once, counts are shared, errors are raised, no process is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_twotower.common import workers
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.workers import TaskQueue, in_order, local_engine


def double(task):
    workers.count(1, task, 2 * task)
    return 2 * task


def run(function, tasks, number, on_count=lambda _: None, **options):
    with local_engine(number) as engine:
        yield from engine(function, tasks, on_count=on_count, **options)


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
    results = dict(run(double, range(50), number, lambda one: counts.append(list(one))))
    assert results == {task: 2 * task for task in range(50)}
    assert counts[-1] == [50, 1225, 2450]
    assert counts == sorted(counts)


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_of_a_task_comes_out(number):
    with pytest.raises(UserError, match="three"):
        list(run(fail_at_three, range(100), number))


def test_tasks_are_taken_as_they_can_be_begun():
    taken = []

    def tasks():
        for task in range(1000):
            taken.append(task)
            yield task

    results = run(double, tasks(), 2)
    next(results)
    assert len(taken) < 20
    results.close()


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died"):
        list(run(die, range(4), 2))


def test_what_is_under_way_is_stopped_at_an_error():
    with pytest.raises(UserError, match="zero"):  # and not for ever
        list(run(wait_for_the_stop, range(3), 2))


def slow_if_even(task):
    time.sleep(0.05 * (task % 2 == 0))
    return -task


@pytest.mark.parametrize("number", [1, 3])
def test_results_come_in_order_and_few_wait(number):
    taken = []

    def tasks():
        for task in range(30):
            taken.append(task)
            yield task

    with local_engine(number) as engine:
        for place, (task, result) in enumerate(in_order(engine, slow_if_even, tasks(), ahead=5)):
            assert (task, result) == (place, -place)
            assert len(taken) <= place + 1 + 5
    assert place == 29


def test_a_task_that_was_given_back_comes_first_and_counts_as_unfinished():
    queue = TaskQueue("abcdef", ahead=3)
    assert [queue.take() for _ in range(4)] == [(0, "a"), (1, "b"), (2, "c"), None]
    queue.finish(1)
    assert queue.take() is None
    queue.give_back(2, "c")
    queue.give_back(0, "a")
    assert [queue.take() for _ in range(3)] == [(0, "a"), (2, "c"), None]
    queue.finish(0)
    assert [queue.take() for _ in range(3)] == [(3, "d"), (4, "e"), None]


def test_an_engine_works_again_after_its_tasks():
    with local_engine(2) as engine:
        for tasks in ([1, 2], [], [3]):
            counts = [[0, 0, 0]]
            found = dict(engine(double, tasks, on_count=counts.append))
            assert found == {task: 2 * task for task in tasks}
            assert counts[-1] == [len(tasks), sum(tasks), 2 * sum(tasks)]


ORPHANS = """
import os, sys, time
from megatron_twotower.common.workers import local_engine

def report(task):
    with open(sys.argv[1], "a") as stream:
        stream.write(f"{os.getpid()}\\n")
    time.sleep(300)

if __name__ == "__main__":
    with local_engine(2) as engine:
        list(engine(report, range(2)))
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
