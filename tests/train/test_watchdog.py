"""A rank that hangs is named with its call, and the job ends."""

import re
import signal
import sys
import threading
import time

from helpers.runs import last_step, train_arguments, until
from megatron_twotower.bench import ranks
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
