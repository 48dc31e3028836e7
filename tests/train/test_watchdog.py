"""A rank that hangs is named with its call, and the job ends."""

import re
import signal
import sys
import threading
import time

from torch.distributed import HashStore

from helpers.runs import PLAIN, last_step, settings, train, train_arguments, until
from megatron_twotower.bench import ranks
from megatron_twotower.mcore.async_save import AsyncSave
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


def ended_by(monkeypatch):
    """The event that a watchdog sets instead of ending this process."""
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: (ended.set(), time.sleep(3600)))
    return ended


def test_a_save_lives_as_long_as_it_writes_and_has_a_limit_of_its_own(capfd, monkeypatch):
    ended, written = ended_by(monkeypatch), [0]
    watch = watchdog.Watchdog(limit_seconds=0.2, save_limit_seconds=0.8, work_done=lambda: written[0])
    watch.start()
    watch.heartbeat(f"{watchdog.SAVING} after step 5")
    time.sleep(0.5)
    assert not ended.is_set(), "longer than a step may take"
    for _ in range(15):
        written[0] += 1
        time.sleep(0.1)
    assert not ended.is_set(), "longer than a save may take without a byte"
    assert ended.wait(20)
    assert "has made no progress" in (said := capfd.readouterr().err) and "at saving after step 5" in said


def test_a_rank_that_waits_for_another_one_to_write_is_alive(monkeypatch):
    store, now = HashStore(), [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    waits, writes = (
        watchdog.Watchdog(limit_seconds=10, save_limit_seconds=20, work_done=work)
        for work in (lambda: 7, lambda: now[0])
    )
    for watch in (waits, writes):
        watch._store = store
        watch.heartbeat(f"{watchdog.SAVING} after step 5")
    for _ in range(6):
        now[0] += 15
        for watch in (writes, waits):
            watch._notice_writing()
            assert watch._check_own_loop() is None
    for _ in range(2):  # now nobody writes
        now[0] += 15
        waits._notice_writing()
    assert "at saving after step 5" in waits._check_own_loop()
    waits.heartbeat("step 6")
    waits._reported_own = False
    now[0] += 15
    writes._notice_writing()
    assert "at step 6" in waits._check_own_loop(), "what is written does not count in a step"


def test_a_save_slower_than_a_step_may_be_does_not_end_the_run(tmp_path, tiny_data, monkeypatch):
    ended, write = ended_by(monkeypatch), AsyncSave.write

    def slowly(save):
        for number in range(12):
            time.sleep(0.25)
            save.files[0].write_bytes(bytes(number))
        return write(save)

    monkeypatch.setattr(AsyncSave, "write", slowly)
    limits = ("train.hang_timeout_seconds=1", "train.save_timeout_seconds=2", "train.steps=6")
    assert train("tiny_ar", *settings(tiny_data, tmp_path / "run", None, *PLAIN, *limits))
    assert not ended.is_set() and (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()


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
