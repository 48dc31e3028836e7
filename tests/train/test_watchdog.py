"""A rank that hangs is named with its call, and the job ends."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import HashStore

from helpers.runs import PLAIN, last_step, settings, train, train_arguments, until
from megatron_twotower.bench import ranks
from megatron_twotower.mcore.async_save import AsyncSave
from megatron_twotower.train import run as train_run
from megatron_twotower.train import watchdog


def test_the_innermost_call_and_who_called_it():
    def sleeping(entered, leave):
        entered.set()
        leave.wait()

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=sleeping, args=(entered, leave))
    thread.start()
    entered.wait()
    text = watchdog.describe_call(sys._current_frames()[thread.ident])
    leave.set()
    thread.join()
    assert text.startswith("wait (threading.py:")
    assert watchdog.describe_call(None) == "no Python call"


def test_a_loop_without_progress_ends_its_process_and_names_its_call(tmp_path, capfd, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: (ended.set(), time.sleep(3600)))
    watch = watchdog.Watchdog(limit_seconds=0.3)
    watch._thread.daemon = True
    watch.start()
    for _ in range(10):  # a loop with progress may last any time
        watch.heartbeat("step 1")
        time.sleep(0.1)
    assert not ended.is_set()
    watch.heartbeat("step 2")
    assert ended.wait(20)
    said = capfd.readouterr().err
    assert "watchdog: rank 0 (process" in said and "at step 2, in wait (threading.py:" in said
    assert "test_watchdog.py" in said, "the stacks of all threads"


SUSPENDED = """
import time

import megatron_twotower.mcore
from megatron_twotower.train.watchdog import Watchdog

watch = Watchdog(limit_seconds=4)
watch.start()
watch.heartbeat("step 1")
print("ready", flush=True)
input()
for _ in range(8):
    time.sleep(0.2)
watch.stop()
"""


def test_a_suspended_process_continues():
    """The step goes on after six seconds without running, two more than the limit."""
    command = [sys.executable, "-c", SUSPENDED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        process.communicate("go on\n", timeout=60)
    assert process.returncode == 0


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


def look(watch):
    """What the thread of a watchdog does again and again, for its own loop."""
    watch._notice_writing()
    return watch._check_own_loop()


def test_a_save_lives_as_long_as_it_writes_and_has_a_limit_of_its_own(monkeypatch):
    clock, written = Clock(monkeypatch), [0]
    watch = watchdog.Watchdog(limit_seconds=10, save_limit_seconds=40, work_done=lambda: written[0])
    watch.heartbeat(f"{watchdog.SAVING} after step 5")
    clock.now += 35
    assert look(watch) is None, "longer than a step may take"
    for _ in range(5):
        written[0] += 1
        clock.now += 35
        assert look(watch) is None, "longer than a save may take without a byte"
    clock.now += 45
    assert "has made no progress for 45 s, at saving after step 5" in look(watch)
    watch = watchdog.Watchdog(limit_seconds=10, save_limit_seconds=40, work_done=lambda: written[0])
    watch.heartbeat("step 6")
    written[0] += 1
    clock.now += 15
    assert "at step 6" in look(watch), "what is written does not count in a step"


@pytest.mark.parametrize(("limits", "activity"), [((0, 5), "step 6"), ((5, 0), f"{watchdog.SAVING} after step 6")])
def test_a_limit_of_0_is_none(limits, activity, monkeypatch):
    clock = Clock(monkeypatch)
    watch = watchdog.Watchdog(limit_seconds=limits[0], save_limit_seconds=limits[1])
    watch.heartbeat(activity)
    clock.now += 1e9
    assert look(watch) is None


def test_a_rank_that_waits_for_another_one_to_write_is_alive(monkeypatch):
    clock, store = Clock(monkeypatch), HashStore()
    waits, writes = (
        watchdog.Watchdog(limit_seconds=10, save_limit_seconds=20, work_done=work)
        for work in (lambda: 7, lambda: int(clock.now))
    )
    for watch in (waits, writes):
        watch._store = store
        watch.heartbeat(f"{watchdog.SAVING} after step 5")
    for _ in range(6):
        clock.now += 15
        assert look(writes) is None and look(waits) is None
    clock.now += 15  # now nobody writes
    assert look(waits) is None
    clock.now += 15
    assert "at saving after step 5" in look(waits)


def test_a_run_tells_its_watchdog_what_it_writes(tmp_path, tiny_data, monkeypatch):
    """The number grows while a file does, and counts what is read back for the checksum."""
    told, grown, asked, write = [], [], {}, AsyncSave.write

    @contextlib.contextmanager
    def watching(**settings):
        asked.update(settings)
        yield told.append

    def slowly(save):
        save.files[0].write_bytes(bytes(11))
        grown.append((told[-1], until(lambda: asked["work_done"]() == 11, 30)))
        return write(save)

    monkeypatch.setattr(train_run, "watching", watching)
    monkeypatch.setattr(AsyncSave, "write", slowly)
    limits = ("train.hang_timeout_seconds=100", "train.save_timeout_seconds=200", "train.steps=6")
    assert train("tiny_ar", *settings(tiny_data, tmp_path / "run", None, *PLAIN, *limits))
    assert (asked["limit_seconds"], asked["save_limit_seconds"]) == (100, 200)
    assert grown == [("saving after step 6", True)]
    files = (tmp_path / "run" / "checkpoints" / "step-00000006").glob("*.distcp")
    assert asked["work_done"]() >= 11 + sum(file.stat().st_size for file in files)


def test_every_micro_batch_is_progress(tmp_path, tiny_data, monkeypatch):
    told = []
    monkeypatch.setattr(watchdog.Watchdog, "heartbeat", lambda watch, activity: told.append(activity))
    count = ("train.validate_every_steps=6", "train.validation_sequences=6", "data.micro_batch_size=2", "train.steps=6")
    assert train("tiny_ar", *settings(tiny_data, tmp_path / "run", None, *count))
    # Once when it begins, and at each of 4 and 3 micro-batches.
    assert told.count("step 6") == 1 + 4 and told.count("validation after step 6") == 1 + 3


def test_a_frozen_rank_is_named_and_the_job_ends(tmp_path, tiny_data, tiny_backbone):
    run = tmp_path / "run"
    arguments = train_arguments(
        tiny_data,
        run,
        tiny_backbone,
        "train.hang_timeout_seconds=8",
        "train.steps=1000",
        "train.checkpoint_every_steps=0",
    )
    job = ranks.start(2, arguments, logs=tmp_path / "logs")
    try:
        until(lambda: last_step(run) >= 2 or not job.running())
        time.sleep(2)  # heartbeats come every 0.8 s
        job.signal(signal.SIGSTOP, rank=1)
        watching, frozen = job.processes[0], job.processes[1].pid
        watching.join(120)
        assert watching.exitcode == watchdog.HUNG, job.output()
    finally:
        job.kill()
    said = job.logs[0].read_text()
    assert f"watchdog: rank 1 (process {frozen} on" in said and "no heartbeat for" in said
    # The last activity depends on when the rank was stopped and when its last heartbeat arrived.
    assert re.search(r"the last at (start|reading|step|validation)", said), said
    assert "watchdog: rank 0" in said and "called by" in said
