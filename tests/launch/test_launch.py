"""The launch scripts without a scheduler.

Two nodes, the logs of each rank, and the environment of a rank.
"""

import ast
import datetime
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from helpers.runs import settings, train, train_arguments, until
from megatron_twotower.common.torchrun import DEFAULT_GRACE_SECONDS

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
GOLDEN = Path(__file__).parent.parent / "golden"


def environment(**values):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(LAUNCH.parent)} | values


@pytest.mark.slow
def test_two_nodes_meet_and_train_as_one(tmp_path, tiny_data, tiny_backbone, records_of):
    run, port = tmp_path / "run", str(random.randrange(20000, 30000))
    arguments = [
        f"data.folder={tiny_data}",
        f"init.backbone={tiny_backbone}",
        f"output={run}",
        "train.steps=4",
        "schedule.warmup_steps=1",
        "train.validate_every_steps=0",
    ]
    nodes = [
        subprocess.Popen(
            [str(LAUNCH / "torchrun.sh"), "recipe=tiny", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment(
                NODES="2", RANKS_PER_NODE="1", MASTER_PORT=port, JOB_ID="job", LOGS=str(tmp_path / f"logs-{number}")
            ),
        )
        for number in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((run / "provenance.json").read_text())["ranks"] == 2
    got = records_of(run)
    assert sorted(got) == [1, 2, 3, 4]
    # A shorter warm-up has other rates: the first loss alone is that of the golden run.
    assert got[1]["loss"] == pytest.approx(json.loads((GOLDEN / "tiny.json").read_text())[0], rel=1e-4)
    logs = [path for number in range(2) for path in (tmp_path / f"logs-{number}").rglob("stderr.log")]
    assert len(logs) == 2, "one for each rank"


@pytest.mark.slow
def test_ranks_start_again_after_one_is_killed_and_keep_its_numbers(tmp_path, tiny_data, tiny_backbone, records_of):
    run, whole = tmp_path / "run", tmp_path / "whole"
    extra = (
        "train.steps=40",
        "train.checkpoint_every_steps=5",
        "train.validate_every_steps=0",
        "train.log_every_steps=1",
    )
    job = subprocess.Popen(
        [str(LAUNCH / "torchrun.sh"), *train_arguments(tiny_data, run, tiny_backbone, *extra)[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment(RANKS_PER_NODE="2", RESTARTS="2"),
    )
    try:
        assert until(lambda: (run / "checkpoints" / "step-00000010").exists() or job.poll() is not None)
        ranks = [each for each in psutil.Process(job.pid).children() if each.environ().get("RANK") == "1"]
        assert len(ranks) == 1, job.communicate()[0]
        ranks[0].kill()
        said, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    assert job.returncode == 0, said[-3000:]
    assert train("tiny", *settings(tiny_data, whole, tiny_backbone, *extra))
    want = {step: record["loss"] for step, record in records_of(whole).items()}
    assert {step: record["loss"] for step, record in records_of(run).items()} == pytest.approx(want, rel=1e-4)


def test_what_is_set_already_stays_and_a_cluster_has_its_file(tmp_path):
    (tmp_path / "cluster.sh").write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    shown = subprocess.run(
        ["bash", "-euc", f"source {LAUNCH}/env.sh; env"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(NCCL_DEBUG="INFO", TWOTOWER_ENV=str(tmp_path / "cluster.sh")),
    )
    found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    assert (found["NCCL_DEBUG"], found["NCCL_SOCKET_IFNAME"]) == ("INFO", "ib0")
    assert found["HF_HUB_OFFLINE"] == "1" and found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "ray.sbatch", "env.sh", "wheels.sh", "h100.env"])
def test_the_scripts_are_whole(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def dockerfile():
    """(instruction, arguments) of each line of launch/Dockerfile, with continued lines joined."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_the_container_has_the_versions_that_setup_asks_for_and_copies_what_is_there():
    steps = dockerfile()
    assert [instruction for instruction, _ in steps[:2]] == ["ARG", "FROM"]
    assert {instruction for instruction, _ in steps} <= {
        "ARG",
        "FROM",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENTRYPOINT",
        "CMD",
    }
    versions = dict(value.split("=") for instruction, value in steps if instruction == "ARG" and "=" in value)
    setup = ast.parse((LAUNCH.parent / "setup.py").read_text())
    wanted = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS")
    }
    asked = {r.name: r.specifier for r in map(Requirement, [*wanted["REQUIRES"], *wanted["EXTRAS"]["gpu"]])}
    for package in ("megatron-core", "mamba-ssm", "causal-conv1d"):
        version = versions[package.upper().replace("-", "_")]
        assert version in asked[package], (package, version, str(asked[package]))
        assert any(f"{package}==${{{package.upper().replace('-', '_')}}}" in text for _, text in steps)
    for instruction, value in steps:
        if instruction == "COPY":
            assert all((LAUNCH.parent / name).exists() for name in value.split()[:-1]), value
        if instruction == "RUN":
            subprocess.run(["bash", "-n", "-c", value], check=True)
    for instruction, value in steps:
        if instruction in ("ENTRYPOINT", "CMD"):
            assert json.loads(value)
    assert any("--no-build-isolation" in value and "mamba-ssm" in value for _, value in steps)


def test_the_container_keeps_the_packages_of_its_image(tmp_path):
    """NVIDIA builds torch from files: `pip freeze` names the file, which pip would fetch again."""
    for name, version in {"torch": "2.9.0a0+50eac811a6.nv25.9", "transformer_engine": "2.9.0+70f53666"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "direct_url.json").write_text(json.dumps({"url": "file:///tmp/dist/x.whl", "archive_info": {}}))
    (line,) = [value for name, value in dockerfile() if name == "RUN" and "> /tmp/constraints.txt" in value]
    written = tmp_path / "constraints.txt"
    line = line.replace("/tmp/constraints.txt", str(written))
    subprocess.run(["bash", "-ec", line], check=True, env=environment(PYTHONPATH=str(tmp_path)))
    kept = {each.name: each for each in map(Requirement, written.read_text().splitlines())}
    assert str(kept["torch"].specifier) == "==2.9.0a0+50eac811a6.nv25.9"
    assert str(kept["transformer_engine"].specifier) == "==2.9.0+70f53666"
    assert all(each.url is None for each in kept.values())


def test_settings_of_h100_nodes_stay_behind_what_is_set_and_before_what_is_general():
    shown = subprocess.run(
        ["bash", "-euc", f"source {LAUNCH}/env.sh; env"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(TWOTOWER_ENV=str(LAUNCH / "h100.env"), NCCL_IB_TIMEOUT="19", USER="someone"),
    )
    found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    assert tuple(found[name] for name in ("NCCL_IB_TIMEOUT", "NCCL_NVLS_ENABLE")) == ("19", "2")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found, "it depends on the layout"
    lines = (LAUNCH / "h100.env").read_text().splitlines()
    pairs = itertools.pairwise(lines)
    unexplained = [b for a, b in pairs if b.startswith("export") and not a.startswith(("#", "export"))]
    assert unexplained == [], "a line on why above each"


def programs(folder, **bodies):
    """Replacements for programs, as shell scripts. Returns a PATH with them."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def torchrun(tmp_path, *arguments, **values):
    """Run torchrun.sh with a replacement for Python.

    Returns the process and what it would start.
    """
    path = programs(tmp_path / "bin", python='printf "%s\\n" "$@"; env')
    done = subprocess.run(
        [str(LAUNCH / "torchrun.sh"), *arguments],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "MASTER_PORT"} | {"PATH": path} | values,
    )
    words, found = done.stdout.splitlines(), {}
    for flag in ("--rdzv-endpoint", "--rdzv-id", "--nnodes", "--max-restarts"):
        found |= {flag: words[words.index(flag) + 1]} if flag in words else {}
    found |= dict(word.split("=", 1) for word in words if "=" in word)
    return done, found


def test_jobs_of_one_node_meet_on_a_free_port_and_restarted_ranks_on_a_store_of_their_own(tmp_path):
    done, found = torchrun(tmp_path, "recipe=tiny", RESTARTS="2")
    assert done.returncode == 0, done.stderr
    assert (found["--rdzv-endpoint"], found["--max-restarts"]) == ("localhost:0", "2")
    assert found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1" and found["GRACE_SECONDS"] == "600"


def test_nodes_of_a_job_meet_and_those_of_another_do_not(tmp_path):
    first, second, other = (
        torchrun(tmp_path, "recipe=tiny", f"output={output}", NODES="4", MASTER_ADDR="node0")[1] for output in "aab"
    )
    assert first["--rdzv-endpoint"] == second["--rdzv-endpoint"] != other["--rdzv-endpoint"]
    assert first["--rdzv-id"] == second["--rdzv-id"] != other["--rdzv-id"]
    host, port = first["--rdzv-endpoint"].split(":")
    assert host == "node0" and 20000 <= int(port) < 30000, "below the ports of connections"


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        listening.listen()
        port = str(listening.getsockname()[1])
        done, _ = torchrun(tmp_path, "recipe=tiny", MASTER_PORT=port)
    assert done.returncode == 2
    assert done.stderr == (
        f"torchrun.sh: MASTER_PORT: found {port} in use on localhost, expected a free port, or none\n"
    )


# What Slurm sets in the script of a job.
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NAME": "twotower", "SLURM_NTASKS": "8"}
SLURM |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "192"}
SCRIPT = LAUNCH / "slurm.sbatch"


def sbatch(tmp_path, *arguments, script=SCRIPT, end="Unknown", job="", status=0, **values):
    """Run slurm.sbatch with replacements for Slurm's commands.

    Returns the process, the arguments of srun, and the commands of scontrol.
    """
    command = " ".join([str(script), *arguments])
    path = programs(
        tmp_path / "bin",
        scontrol=f"""echo "$*" >> {tmp_path}/scontrol
case $* in
  "show job "*) printf "   StartTime=2026-01-01T00:00:00 EndTime={end} Deadline=N/A\\n   Command=%s\\n" "{command}" ;;
  "show node "*) echo "   NodeAddr=127.0.0.1 NodeHostName=n1" ;;
  "show hostnames "*) echo n1 ;;
esac""",
        srun=f'printf "%s\\n" "$@" > {tmp_path}/srun; env > {tmp_path}/environment; {job}\nexit {status}',
        scancel=f'echo "$*@$(date +%s)" >> {tmp_path}/signals',
    )
    for name in ("scontrol", "srun", "environment"):
        (tmp_path / name).write_text("")
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | SLURM | {"PATH": path} | values,
    )
    return done, (tmp_path / "srun").read_text().splitlines(), (tmp_path / "scontrol").read_text().splitlines()


def test_a_container_is_asked_for_by_its_name(tmp_path):
    for wanted in ({}, {"CONTAINER": "image.sqsh", "MOUNTS": "/a:/b"}):
        done, handed, _ = sbatch(tmp_path, "recipe=tiny", **wanted)
        assert done.returncode == 0, done.stderr
        assert ("--container-image=image.sqsh" in handed) == bool(wanted)
        assert (f"--container-mounts={tmp_path}:{tmp_path},/a:/b" in handed) == bool(wanted)
        assert "recipe=tiny" in handed


def test_a_job_has_its_nodes_for_itself_and_its_ranks_share_the_processors(tmp_path):
    directives = {line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if "#SBATCH " in line}
    assert {"--exclusive", "--mem=0"} <= directives
    assert "--cpus-per-task=24" in sbatch(tmp_path)[1]
    assert "--cpus-per-task=6" in sbatch(tmp_path, SLURM_CPUS_PER_TASK="6")[1], "as sbatch was asked"
    assert "--cpus-per-task=1" in sbatch(tmp_path, SLURM_CPUS_ON_NODE="4")[1]


def test_the_grace_period_is_told_in_one_place(tmp_path):
    assert torchrun(tmp_path)[1]["GRACE_SECONDS"] == str(DEFAULT_GRACE_SECONDS) == "600"
    assert torchrun(tmp_path, GRACE_SECONDS="900")[1]["GRACE_SECONDS"] == "900"
    assert "signal 600 s before its end" in sbatch(tmp_path)[0].stdout
    assert "signal 900 s before its end" in sbatch(tmp_path, GRACE_SECONDS="900")[0].stdout
    done, started, _ = sbatch(tmp_path, GRACE_SECONDS="10m")
    assert (done.returncode, started) == (2, [])
    assert done.stderr == "slurm.sbatch: GRACE_SECONDS: found 10m, expected a whole number of seconds\n"
    assert "--signal" not in "".join(line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize(("seconds", "grace", "wanted"), [(7, "3", 3), (4, "600", 2), (4000, "600", None)])
def test_the_signal_comes_the_grace_period_before_the_end(seconds, grace, wanted, tmp_path):
    """A job that is shorter than twice the grace period has half of its time to train."""
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    job = f"for _ in $(seq {10 * min(seconds, 7)}); do sleep 0.1; [[ ! -s {tmp_path}/signals ]] || break; done"
    done, _, _ = sbatch(tmp_path, end=end.isoformat()[:19], job=job, GRACE_SECONDS=grace)
    assert done.returncode == 0, done.stderr
    signals = tmp_path / "signals"
    if wanted is None:
        assert not signals.exists() and "signal 600 s before its end" in done.stdout
        return
    asked, at = signals.read_text().split("@")
    assert asked == "--signal=USR1 7"
    assert wanted - 2 <= end.timestamp() - float(at) <= wanted + 1


def test_a_task_of_an_array_asks_for_itself(tmp_path):
    """The number of one task is that of the whole array: requeued by it, all tasks start again."""
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done, _, asked = sbatch(tmp_path, "recipe=tiny", status=75, **task, LOGS="out")
    assert done.returncode == 75, done.stderr
    assert "show job 7_2" in asked and "requeue 7_2" in asked
    assert (tmp_path / "out" / "2").is_dir(), "tasks do not write to each other's logs"
    assert "requeue 7" in sbatch(tmp_path, "recipe=tiny", status=75)[2]


@pytest.mark.parametrize("arguments", [(), ("recipe=tiny", "output=runs/a b"), ("output=/other/slurm.sbatch",)])
def test_a_launch_folder_with_a_space(arguments, tmp_path):
    folder = tmp_path / "my launch"
    shutil.copytree(LAUNCH, folder)
    done, started, _ = sbatch(tmp_path, *arguments, script=folder / "slurm.sbatch")
    assert done.returncode == 0 and started, done.stderr


def test_a_script_without_its_folder_is_one_line(tmp_path):
    done, started, _ = sbatch(tmp_path, script=tmp_path / "slurm.sbatch")
    assert done.returncode == 2 and started == []
    assert done.stderr.startswith(f"slurm.sbatch: found no env.sh in {tmp_path}, ") and done.stderr.count("\n") == 1


def test_a_job_meets_on_a_port_that_nobody_listens_on(tmp_path):
    def port():
        found = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
        return int(found["MASTER_PORT"])

    sbatch(tmp_path)
    free = port()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free))
        listening.listen()
        sbatch(tmp_path)
        assert port() > free
        done, started, _ = sbatch(tmp_path, MASTER_PORT=str(free))
        assert done.returncode == 2 and started == [] and "expected a free port, or none" in done.stderr


def test_wheels_say_what_they_expect():
    done = subprocess.run([str(LAUNCH / "wheels.sh"), "folder"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "wheels.sh: found 1 arguments, expected a folder, a Python version and a torch version\n"


def test_nvcc_for_one_architecture(tmp_path):
    """Architectures are removed in either spelling; the compiler receives all other arguments."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    named = ["-O3", "-gencode", "arch=compute_75,code=sm_75", "-gencode=arch=compute_80,code=sm_80", "a file.cu"]
    said = subprocess.run(
        [LAUNCH / "nvcc.sh", *named],
        env={**os.environ, "CUDA_HOME": str(tmp_path), "ARCH": "90"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.splitlines() == ["-O3", "a file.cu", "-gencode", "arch=compute_90,code=sm_90"]
