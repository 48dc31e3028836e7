"""Runs of the tiny recipes, in this process and in others, and what they have written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run

GOLDEN = Path(__file__).parent.parent / "golden"
PLAIN = ("train.validate_every_steps=0", "train.checkpoint_every_steps=0")
LONG = ("train.steps=100", *PLAIN)
CLI = [sys.executable, "-m", "megatron_twotower"]


def settings(data, run, backbone=None, *extra):
    """The overrides of a tiny recipe."""
    start = [f"init.backbone={backbone}"] if backbone else []
    return [f"data.folder={data}", f"output={run}", *start, *extra]


def train_arguments(data, run, backbone, *extra):
    """The arguments of `twotower` for a run of the recipe `tiny`."""
    return ["train", "recipe=tiny", *settings(data, run, backbone, *extra)]


def train(recipe, *overrides):
    """Train in this process. Returns whether all steps are done."""
    try:
        return train_run.run_training(load_recipe(recipe, list(overrides)))
    finally:
        parallel.shutdown()


def launch(ranks, recipe, *overrides, wait=True, threads=1):
    """Train in other processes by the command line, with torchrun for several ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    start = [*torchrun, "megatron_twotower"] if ranks > 1 else CLI
    process = subprocess.Popen(
        [*start, "train", f"recipe={recipe}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": f"{threads}"},
    )
    if wait:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    return process


def until(condition, seconds=240):
    """Wait for a condition. Returns whether it became true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def records(run, kind="train"):
    """The records of a run by step. The last line of the file may be incomplete."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {each["step"]: each for each in map(json.loads, lines) if each["kind"] == kind}


def losses(run, kind="train"):
    """The losses of a run by step."""
    return {step: record["loss"] for step, record in records(run, kind).items()}


def last_step(run):
    """The last step that a run has recorded."""
    return max(records(run), default=0)
