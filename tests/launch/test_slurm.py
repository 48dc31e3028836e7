"""`launch/slurm.sbatch` and `launch/ray.sbatch` on a real Slurm of two nodes.

A run finishes; a run that is cut off is requeued and resumes.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import slurm_cluster
from helpers.corpora import content, make_tokenizer, texts, write_records
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.data.prepare import prepare
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"no Slurm: {slurm_cluster.missing()}"),
]

ROOT = Path(__file__).resolve().parents[2]
# One task a node, each a CPU rank.
CPU = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=10"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found


@pytest.fixture(scope="module")
def arguments(tiny_data, tiny_backbone):
    return ["recipe=tiny", f"data.folder={tiny_data}", f"init.backbone={tiny_backbone}", "parallel.expert=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    """The same run in one process, never cut off."""
    run = tmp_path_factory.mktemp("whole") / "run"
    try:
        assert train_run.run_training(load_recipe("tiny", [*arguments[1:-1], f"output={run}"]))
    finally:
        parallel.shutdown()
    return run


def submit(cluster, folder, *options, **variables):
    """Queue the shipped script from a folder of its own.

    `python` must be this interpreter on every node.
    """
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    said = cluster.run("sbatch", "--parsable", *options, cwd=folder, PATH=path, PYTHONPATH=str(ROOT), **variables)
    return said.strip().partition(";")[0]


def seen(folder):
    """All that the job and its ranks wrote."""
    return "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in sorted(folder.rglob("*.log")))


def losses(records):
    return {step: record["loss"] for step, record in records.items()}


def wait_for_step(cluster, job, run, records_of, *, seconds=300):
    """Wait until a run has logged a step."""

    def logged():
        return (run / "metrics.jsonl").is_file() and bool(records_of(run))

    slurm_cluster._wait_for(
        lambda: logged() or cluster.state(job) not in ("PENDING", "RUNNING"), cluster.logs, seconds=seconds
    )
    assert logged(), seen(run.parent) + cluster.logs()


def test_a_recipe_and_its_overrides_finish_on_two_nodes(cluster, arguments, whole, tmp_path, records_of):
    run = tmp_path / "run"
    job = submit(
        cluster, tmp_path, *CPU, str(ROOT / "launch" / "slurm.sbatch"), *arguments, f"output={run}", "train.steps=10"
    )
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", seen(tmp_path)
    want = losses(records_of(whole))
    assert losses(records_of(run)) == pytest.approx({step: want[step] for step in range(1, 11)}, rel=1e-5)
    logs = sorted(path.name for path in (tmp_path / "logs" / f"twotower-{job}").iterdir())
    assert logs == ["rank-0.log", "rank-1.log"]
    assert "2 ranks on n[1-2], start 1" in (tmp_path / f"twotower-{job}.log").read_text()


@pytest.mark.parametrize("cut", ["signal", "preempted"])
def test_a_job_that_is_cut_off_resumes_to_the_same_losses(cut, cluster, arguments, whole, tmp_path, records_of):
    run = tmp_path / "run"
    job = submit(
        cluster,
        tmp_path,
        *CPU,
        str(ROOT / "launch" / "slurm.sbatch"),
        *arguments,
        f"output={run}",
        "train.checkpoint_every_steps=0",
    )
    wait_for_step(cluster, job, run, records_of)
    if cut == "signal":  # as Slurm sends it ahead of the time limit, to the tasks and not to the script
        cluster.run("scancel", "--signal=USR1", job)
    else:
        other = submit(cluster, tmp_path, *CPU, "--partition=high", "--wrap=srun true", "--output=/dev/null")
        cluster.wait(other, "COMPLETED")
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", seen(tmp_path)
    story = (tmp_path / f"twotower-{job}.log").read_text()
    assert "start 1" in story and "start 2" in story, story
    assert len(list((run / "checkpoints").iterdir())) == 2, "one after the signal, one at the end: the run resumed"
    assert losses(records_of(run)) == pytest.approx(losses(records_of(whole)), rel=1e-5)


def test_the_script_sends_the_signal_before_the_time_of_a_job_ends(cluster, arguments, tmp_path):
    job = submit(
        cluster,
        tmp_path,
        *CPU[:-1],
        "--time=2",
        str(ROOT / "launch" / "slurm.sbatch"),
        *arguments,
        f"output={tmp_path}/run",
        "train.steps=1000000",
        "train.checkpoint_every_steps=0",
        "schedule.decay_steps=0",
        REQUEUE="0",
    )
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "FAILED", seen(tmp_path)
    story = (tmp_path / f"twotower-{job}.log").read_text()
    assert "signal 60 s before its end" in story or "signal 59 s before its end" in story, story
    assert "status 75" in story and len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_tasks_of_an_array_from_a_launch_folder_with_a_space(cluster, arguments, whole, tmp_path, records_of):
    """Both find the files beside the script.

    A task that is cut off does not start the other one again.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "my launch")
    job = submit(
        cluster,
        tmp_path,
        *["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=10", "--array=1-2"],
        str(tmp_path / "my launch" / "slurm.sbatch"),
        *arguments[:-1],
        f"output={tmp_path}/run-${{oc.env:SLURM_ARRAY_TASK_ID}}",
        "train.checkpoint_every_steps=0",
    )
    first = f"{job}_1"
    wait_for_step(cluster, first, tmp_path / "run-1", records_of)
    cluster.run("scancel", "--signal=USR1", first)
    for task in (first, f"{job}_2"):
        assert cluster.wait(task, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", seen(tmp_path)
    stories = [path.read_text() for path in tmp_path.glob("twotower-*.log")]
    assert sorted("start 2" in story for story in stories) == [False, True], stories
    for run in (tmp_path / "run-1", tmp_path / "run-2"):
        assert losses(records_of(run)) == pytest.approx(losses(records_of(whole)), rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_data_is_prepared_by_a_ray_on_the_nodes_of_a_job(cluster, tmp_path):
    """`launch/ray.sbatch`: the bytes of one process; the job takes its token along."""
    write_records(tmp_path / "texts" / "a.jsonl", texts(3000))
    tokenizer = make_tokenizer(tmp_path / "tokenizer", texts(50))
    small = {"shard_tokens": 20_000, "holdout_fraction": 0.2}
    prepare([str(tmp_path / "texts")], tokenizer=tokenizer, output=tmp_path / "expected", **small)
    words = ["--input", tmp_path / "texts", "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    words += ["--shard-tokens", "20000", "--holdout", "0.2"]
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the path of a socket is short
    script = str(ROOT / "launch" / "ray.sbatch")
    try:
        job = submit(
            cluster, tmp_path, "--nodes=2", "--time=10", script, "data", "prepare", *map(str, words), RAY_TMPDIR=folder
        )
        found = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert found == "COMPLETED", seen(tmp_path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert content(tmp_path / "out", leave_out={"provenance.json"}) == content(
        tmp_path / "expected", leave_out={"provenance.json"}
    )
    story = (tmp_path / f"twotower-ray-{job}.log").read_text()
    assert f"job {job}: Ray at 127.0.0.1:" in story and f"job {job}: status 0" in story
    assert sorted(path.name for path in (tmp_path / "logs" / f"twotower-ray-{job}").iterdir()) == [
        "node-0.log",
        "node-1.log",
    ]
