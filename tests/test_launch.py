"""The launch scripts without a scheduler: two nodes that meet, logs of each rank, and the environment of a rank."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
GOLDEN = Path(__file__).parent / "golden"


def environment(**values):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(LAUNCH.parent)} | values


def test_two_nodes_meet_and_train_as_one(tmp_path, tiny_data, tiny_backbone, records_of):
    run, port = tmp_path / "run", str(random.randrange(20000, 30000))
    arguments = [f"data.folder={tiny_data}", f"init.backbone={tiny_backbone}", f"output={run}", "train.steps=4",
                 "schedule.warmup_steps=1", "train.validate_every_steps=0"]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [str(LAUNCH / "torchrun.sh"), "recipe=tiny", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=tmp_path, env=environment(NODES="2", RANKS_PER_NODE="1", MASTER_PORT=port, JOB_ID="job",
                                                     LOGS=str(tmp_path / f"logs-{number}")),
        )
        for number in range(2)
    ]  # fmt: skip
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
        ["bash", "-euc", f"source {LAUNCH}/env.sh; env"], capture_output=True, text=True, check=True,
        env=environment(NCCL_DEBUG="INFO", TWOTOWER_ENV=str(tmp_path / "cluster.sh")),
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    assert (found["NCCL_DEBUG"], found["NCCL_SOCKET_IFNAME"]) == ("INFO", "ib0")
    assert found["WANDB_MODE"] == "offline" and found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "env.sh"])
def test_the_scripts_are_whole(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
