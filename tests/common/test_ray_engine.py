"""The Ray engine: every task is done, whatever dies; errors are one line; nothing is left."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.corpora import make_tokenizer
from helpers.ray_nodes import set_up_own_ray
from megatron_twotower.common import ray_engine, workers
from megatron_twotower.common.engines import EngineSettings, Needs, started
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file
from megatron_twotower.common.workers import in_order
from megatron_twotower.data.prepare import prepare

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


def double(task):
    workers.count(1, task, 2 * task)
    return 2 * task


def die_once(task):
    """The worker is killed at the first attempt at every third task."""
    number, folder = task
    mark = Path(folder) / str(number)
    if number % 3 == 0 and not mark.exists():
        mark.write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def always_die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def fill_a_disk(task):
    """Task 2 meets a full disk; the others are slow."""
    number, folder = task
    if number == 2:
        with atomic_file(Path(folder) / "2") as partial:
            partial.symlink_to("/dev/full")
            partial.write_bytes(b"content")
    (Path(folder) / f"begun-{number}").write_text("")
    time.sleep(0.5 if number < 2 else 60)
    (Path(folder) / f"ended-{number}").write_text("")


@pytest.fixture
def small_corpus(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text\n" * 20)
    make_tokenizer(tmp_path / "tokenizer", ["some text"])
    return {"inputs": [str(tmp_path / "texts")], "tokenizer": tmp_path / "tokenizer", "holdout_fraction": 0.0}


def listening():
    """The addresses that processes started by this one listen on."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"}
    return found


@pytest.mark.slow
def test_a_lost_worker_on_a_ray_of_this_machine(tmp_path, monkeypatch):
    """The one test of `make test` that starts a Ray, which takes most of its time."""
    set_up_own_ray(monkeypatch)
    with started(EngineSettings("ray", workers=1), Needs((Path(__file__),))) as engine:
        assert listening() and listening() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        tasks = [(number, str(tmp_path)) for number in range(2)]
        assert [result[0] for _, result in in_order(engine, die_once, tasks, ahead=2)] == [0, 1]


@pytest.mark.slow
def test_the_engine_on_a_ray_of_this_machine(tmp_path, monkeypatch, capfd):
    """All of it with one Ray, which takes seconds to start."""
    set_up_own_ray(monkeypatch)
    with started(EngineSettings("ray", workers=2), Needs((Path(__file__),))) as engine:
        assert listening() and listening() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        counts = []
        found = dict(engine(double, range(20), on_count=lambda one: counts.append(list(one))))
        assert found == {task: 2 * task for task in range(20)}
        assert counts[-1] == [20, 190, 380]
        assert [result for _, result in in_order(engine, double, range(9), ahead=3)] == list(range(0, 18, 2))
        tasks = [(number, str(tmp_path)) for number in range(7)]
        results = [result for _, result in in_order(engine, die_once, tasks, ahead=4)]
        assert [number for number, _ in results] == list(range(7))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "3", "6"]
        disk = tmp_path / "disk"
        disk.mkdir()
        message = rf"^{disk}/2: cannot be written \(No space left on device\) \(on node \S+\)$"
        with pytest.raises(UserError, match=message):
            list(engine(fill_a_disk, [(number, str(disk)) for number in range(9)]))
        assert not {f"ended-{number}" for number in range(2, 9)} & {path.name for path in disk.iterdir()}
        monkeypatch.setattr(ray_engine, "_DEATHS", 2)
        with pytest.raises(UserError, match="2 workers died at one task: found no result, expected memory"):
            list(engine(always_die, [0]))
        assert dict(engine(double, [4])) == {4: 8}  # the next tasks have new workers
    assert capfd.readouterr().out == ""
    deadline = time.monotonic() + 30
    while listening() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not listening()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"127\.0\.0\.1:1: found no Ray cluster \(.*refused.*\), expected one \(ray start --head\)"),
        ("somewhere", "address: found somewhere, expected HOST:PORT, auto or local"),
        ("ray://head:10001", "ray://head:10001: found a Ray client address, expected HOST:PORT"),
    ],
)
def test_no_cluster_at_the_address_is_one_line(address, message):
    with pytest.raises(UserError, match=message) as caught, started(EngineSettings("ray", address=address)):
        raise AssertionError
    assert "\n" not in str(caught.value)


def test_without_ray_nothing_is_left(small_corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "installed", lambda package: None)
        with pytest.raises(UserError, match=r"^ray: not installed, expected for --engine ray \(pip install .*\)$"):
            prepare(**small_corpus, output=tmp_path / "new" / "out", engine=EngineSettings("ray"))
    with pytest.raises(UserError, match="found no Ray cluster"):
        prepare(**small_corpus, output=tmp_path / "new" / "out", engine=EngineSettings("ray", address="127.0.0.1:1"))
    assert not list(tmp_path.glob("new/*"))


def test_a_node_with_another_program_or_without_the_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "is_seen", Path.exists)
    monkeypatch.chdir(tmp_path)  # and back
    worker = ray_engine._Worker()
    there = tmp_path / "file"
    there.write_text("one")
    files, program = ray_engine._checksums([there]), ray_engine.program()
    assert worker.start(program, files, str(tmp_path)) is None
    message = worker.start(program | {"numpy": "0.1"}, files, str(tmp_path))
    assert message.startswith(f"node {worker.node}: found numpy ") and message.endswith(
        "expected 0.1, as the driver has"
    )
    there.write_text("two")
    assert f"{there}: found another file, expected the driver's" in worker.start(program, files, str(tmp_path))
    there.unlink()
    assert f"{there}: found no such file, expected the driver's" in worker.start(program, files, str(tmp_path))


def test_nothing_of_ray_is_imported_without_the_option():
    program = """
import sys
from megatron_twotower.cli import main
from megatron_twotower.common.engines import EngineSettings, started
from megatron_twotower.data import prepare
with started(EngineSettings(workers=1)) as engine:
    assert dict(engine(len, ["abc"])) == {"abc": 3}
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"], "ray"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
