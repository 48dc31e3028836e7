"""Runs of the tiny recipes, in this process and in others."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run

GOLDEN = Path(__file__).parent.parent / "golden"
PLAIN = ("train.validate_every_steps=0", "train.checkpoint_every_steps=0")
LONG = ("train.steps=100", *PLAIN)
CLI = [sys.executable, "-m", "megatron_twotower"]


def settings(data, run, backbone=None, *extra):
    start = [f"init.backbone={backbone}"] if backbone else []
    return [f"data.folder={data}", f"output={run}", *start, *extra]


def train(recipe, *overrides):
    try:
        return train_run.run_training(load_recipe(recipe, list(overrides)))
    finally:
        parallel.shutdown()


def launch(ranks, recipe, *overrides, wait=True, threads=1):
    """The command line in processes of its own, under torchrun where there are several ranks."""
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


def losses(records):
    return [records[step]["loss"] for step in sorted(records)]
