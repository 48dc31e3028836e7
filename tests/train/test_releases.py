"""Checkpoints of one release of Megatron Core, read by the other.

`make test-releases OTHER_PYTHON=python3.12`
"""

import os
import subprocess
import sys

import pytest

from helpers.runs import losses, train_arguments

pytestmark = pytest.mark.releases

PLAIN = ["schedule.kind=constant", "schedule.warmup_steps=0", "train.validate_every_steps=0"]


def other_python():
    """The Python of an environment with this program and another release."""
    return os.environ["TWOTOWER_OTHER_PYTHON"]


def release(python):
    ask = "from megatron_twotower.mcore.releases import RELEASE; print(RELEASE)"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def go(python, data, run, backbone, steps, *extra):
    arguments = train_arguments(data, run, backbone, *PLAIN, f"train.steps={steps}", *extra)
    done = subprocess.run([python, "-m", "megatron_twotower", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return losses(run)


@pytest.mark.parametrize("extra", [[], ["optimizer.distributed=true", "train.precision=bf16"]], ids=["fp32", "bf16"])
def test_a_run_resumes_under_the_other_release(tmp_path, tiny_data, tiny_backbone, extra):
    pythons = {release(each): each for each in (sys.executable, other_python())}
    assert len(pythons) == 2, "two releases, one in each environment"
    want = go(sys.executable, tiny_data, tmp_path / "whole", tiny_backbone, 8, *extra)
    assert len(want) == 8
    for first, second in (("0.16", "0.19"), ("0.19", "0.16")):
        run = tmp_path / first
        go(pythons[first], tiny_data, run, tiny_backbone, 4, *extra)
        got = go(pythons[second], tiny_data, run, tiny_backbone, 8, *extra)
        # The releases of torch differ too, and sum in another order.
        assert got == pytest.approx(want, rel=2e-3 if "train.precision=bf16" in extra else 1e-5)
