"""The tests of the Triton kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted(map(str, Path(__file__).parent.glob("test_[!i]*.py")))


def in_the_interpreter(marks):
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_run_in_the_interpreter():
    in_the_interpreter("not slow and not gpu")


@pytest.mark.slow
def test_larger_shapes_run_in_the_interpreter():
    in_the_interpreter("slow")
