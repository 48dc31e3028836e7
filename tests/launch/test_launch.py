"""The launch scripts without a scheduler.

Two nodes, the logs of each rank, and the environment of a rank.
"""

import ast
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
GOLDEN = Path(__file__).parent.parent / "golden"


def environment(**values):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(LAUNCH.parent)} | values


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
    assert found["WANDB_MODE"] == "offline" and found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "env.sh", "wheels.sh", "h100.env"])
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


def test_a_container_is_asked_for_by_its_name(tmp_path):
    """The arguments that slurm.sbatch passes to srun, with replacements for Slurm's commands."""
    for name, body in {
        "scontrol": f'echo " Command={LAUNCH}/slurm.sbatch NodeAddr=n1 "',
        "srun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    common = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "twotower"}
    common["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    for wanted in ({}, {"CONTAINER": "image.sqsh", "MOUNTS": "/a:/b"}):
        done = subprocess.run(
            ["bash", str(LAUNCH / "slurm.sbatch"), "recipe=tiny"],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env=os.environ | common | wanted,
        )
        handed = done.stdout.splitlines()
        assert ("--container-image=image.sqsh" in handed) == bool(wanted)
        assert (f"--container-mounts={tmp_path}:{tmp_path},/a:/b" in handed) == bool(wanted)
        assert "recipe=tiny" in handed


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
