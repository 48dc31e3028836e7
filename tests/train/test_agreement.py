"""What ranks check together at a start: that they agree, and that their run folder is one folder.

Most ranks are threads.
"""

import dataclasses
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from helpers.runs import CLI, train_arguments
from helpers.thread_ranks import ThreadRanks
from megatron_twotower.common import files
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import DataConfig, InitConfig, OptimizerConfig, RunConfig, flatten
from megatron_twotower.train import agreement


@pytest.fixture
def folders(tmp_path):
    """A function that writes a backbone and a corpus to a folder, and returns the configuration."""

    def write(name, *, weights=b"weights", index=b"index"):
        folder = tmp_path / name
        (folder / "backbone").mkdir(parents=True)
        (folder / "backbone" / "config.json").write_text("{}")
        (folder / "backbone" / "model.safetensors").write_bytes(weights)
        for split in ("train", "validation"):
            (folder / "data" / split).mkdir(parents=True)
            for file in ("index.json", "starts.npy", "offsets.npy"):
                (folder / "data" / split / file).write_bytes(index)
        return folder

    return write


def config_of(folder, **changes):
    init = InitConfig(backbone=str(folder / "backbone"))
    return RunConfig(init=init, data=DataConfig(folder=str(folder / "data")), **changes)


def checked(monkeypatch, configs, *, per_node=1, files_of=None):
    """Check ranks of these configurations. Returns the ranks and what each one raised."""
    ranks = ThreadRanks(monkeypatch, len(configs), per_node=per_node)
    if files_of is not None:
        monkeypatch.setattr(agreement, "compared_files", lambda config: files_of[ranks.rank() // per_node])
    return ranks, ranks.run(lambda rank: agreement.check_ranks_agree(configs[rank]))


def test_ranks_that_agree_need_one_gather_of_digests(monkeypatch, folders):
    read = []
    monkeypatch.setattr(agreement, "_contents", lambda paths: read.append(paths))
    ranks, raised = checked(monkeypatch, [config_of(folders("a"))] * 32, per_node=8)
    assert raised == [None] * 32 and read == []
    ((name, value),) = ranks.collectives
    assert name == "gather" and len(value) == 16


@pytest.mark.parametrize("key", [key for key, _ in flatten(RunConfig())])
def test_any_setting_that_differs_is_refused_with_both_values(key, monkeypatch):
    *section, name = key.split(".")
    config = RunConfig()
    owner = getattr(config, section[0]) if section else config
    other = dataclasses.replace(owner, **{name: "another"})
    changed = dataclasses.replace(config, **{section[0]: other}) if section else other
    _, raised = checked(monkeypatch, [config, config, changed], files_of=[{}] * 3)
    assert len({str(each) for each in raised}) == 1 and isinstance(raised[0], UserError)
    assert str(raised[0]) == (f"{key}: found another on rank 2 (node2), expected {getattr(owner, name)}, as on rank 0")


def test_many_differences_are_one_line_that_counts_the_ranks(monkeypatch):
    other = RunConfig(seed=1, output="x", objective="ar", optimizer=OptimizerConfig(beta1=0.5))
    _, raised = checked(monkeypatch, [RunConfig(), *[other] * 7], files_of=[{}] * 8)
    said = str(raised[5])
    assert "\n" not in said and said.count("as on rank 0") == 3 and said.endswith("; 7 ranks differ from rank 0")


def test_another_release_is_refused(monkeypatch):
    version = agreement.versions.importlib.metadata.version
    ranks = ThreadRanks(monkeypatch, 2)
    monkeypatch.setattr(agreement, "compared_files", lambda config: {})
    monkeypatch.setattr(
        agreement.versions.importlib.metadata,
        "version",
        lambda name: "9.9" if name == "torch" and ranks.rank() == 1 else version(name),
    )
    raised = ranks.run(lambda _: agreement.check_ranks_agree(RunConfig()))
    assert str(raised[0]).startswith("the version of torch: found 9.9 on rank 1 (node1), expected ")


def copies(monkeypatch, first, second, **changes):
    """Check two nodes of two ranks, of which each has its own folder under the same path."""
    config, files_of = config_of(first), []
    for folder in (first, second):
        own = agreement.compared_files(config_of(folder))
        files_of.append({name.replace(str(folder), "PATH"): paths for name, paths in own.items()})
    return checked(monkeypatch, [config] * 4, per_node=2, files_of=files_of)


def test_copies_on_the_disks_of_nodes_are_read_once_and_may_be_equal(monkeypatch, folders):
    read, contents = [], agreement._contents
    monkeypatch.setattr(agreement, "_contents", lambda paths: read.append(str(paths[0])) or contents(paths))
    first = folders("a")
    shutil.copytree(first, first.parent / "b")
    _, raised = copies(monkeypatch, first, first.parent / "b")
    assert raised == [None] * 4
    assert len(read) == 4, "backbone and data, of each node one rank"


@pytest.mark.parametrize(
    ("changed", "named"), [({"weights": b"Weights"}, "init.backbone PATH/backbone"), ({"index": b"Index"}, "data PATH")]
)
def test_other_weights_or_data_on_one_node_are_refused(changed, named, monkeypatch, folders):
    _, raised = copies(monkeypatch, folders("a"), folders("b", **changed))
    assert len({str(each) for each in raised}) == 1
    assert str(raised[0]).startswith(named) and "found sha256 " in str(raised[0])
    assert "on rank 2 (node1), expected sha256" in str(raised[0])


def test_a_file_that_one_node_lacks_is_refused_by_name(monkeypatch, folders):
    first, second = folders("a"), folders("b")
    os.remove(second / "data" / "validation" / "starts.npy")
    _, raised = copies(monkeypatch, first, second)
    assert "found starts.npy: No such file or directory on rank 2 (node1)" in str(raised[3])


def test_the_program_itself_is_compared():
    (name, paths), *_ = agreement.compared_files(RunConfig()).items()
    assert name == "the program" and Path(agreement.__file__) in paths


# --- the run folder ---


def entered(monkeypatch, runs, *, per_node=1):
    """Enter the run folder of each rank. Returns the pretended ranks, and what each one raised."""
    monkeypatch.setattr(files, "_UNSEEN_SECONDS", 0.2)
    ranks = ThreadRanks(monkeypatch, len(runs), per_node=per_node)
    monkeypatch.setattr(agreement, "_first_of_node", ranks.first_of_node)

    def enter(rank):
        with agreement.own_run_folder(runs[rank]):
            return sorted(path.name for path in runs[rank].iterdir()) if rank == 0 else None

    return ranks, ranks.run(enter)


def test_one_folder_costs_three_small_collectives_and_a_probe_per_node(monkeypatch, tmp_path):
    run = tmp_path / "runs" / "mine"
    ranks, found = entered(monkeypatch, [run] * 16, per_node=8)
    assert found[1:] == [None] * 15
    assert found[0][-1] == "run.lock" and len(found[0]) <= 3
    assert [name for name, _ in ranks.collectives] == ["broadcast", "gather", "broadcast"]
    assert not run.exists(), "nothing is left"


def test_a_run_folder_on_the_disk_of_each_node_is_refused(monkeypatch, tmp_path):
    runs = [tmp_path / "a" / "run"] * 2 + [tmp_path / "b" / "run"] * 2
    _, raised = entered(monkeypatch, runs, per_node=2)
    assert len({str(each) for each in raised}) == 1
    assert "rank 2 (node1) does not see what rank 0 has written; expected one folder" in str(raised[0])
    assert not any((tmp_path / name / "run").is_dir() and list((tmp_path / name / "run").iterdir()) for name in "ab")


def test_a_node_that_cannot_write_is_refused(monkeypatch, tmp_path):
    write_text = Path.write_text

    def refused(path, text):
        if "node1" in text:
            raise PermissionError(13, "Permission denied")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", refused)
    _, raised = entered(monkeypatch, [tmp_path / "run"] * 2)
    assert str(raised[0]) == f"{tmp_path}/run: cannot be written on rank 1 (node1) (Permission denied)"


def test_a_folder_in_use_is_refused_on_all_ranks(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    lock = agreement.FolderLock(tmp_path / "run" / "run.lock")
    lock.acquire()
    _, raised = entered(monkeypatch, [tmp_path / "run"] * 2)
    lock.release()
    assert [str(each).count("in use by process") for each in raised] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["folder", "setting"])
def test_real_ranks_refuse_and_leave_nothing(differs, tmp_path, tiny_data, tiny_backbone):
    """The relative path of the run folder is another folder in each working directory."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    processes = []
    for rank in range(2):
        where = tmp_path / (f"node{rank}" if differs == "folder" else "both")
        where.mkdir(exist_ok=True)
        extra = ["optimizer.learning_rate=1e-4"] if differs == "setting" and rank else []
        meeting = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [*CLI, *train_arguments(tiny_data, "run", tiny_backbone, "train.steps=9", *extra)],
                cwd=where,
                env=os.environ | {key: f"{value}" for key, value in meeting.items()},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    named = {"folder": "run: rank 1 (", "setting": "optimizer.learning_rate: found 0.0001 on rank 1"}[differs]
    assert all(text.count("\n") == 1 and named in text for text in said)
    assert not list(tmp_path.rglob("run/*"))
