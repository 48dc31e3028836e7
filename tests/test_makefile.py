"""What the verbs of the Makefile pass on to the commands that they run."""

import os
import subprocess

from helpers import TESTS


def test_verbs_keep_compiled_modules():
    """Without them each start of a process would compile all its imports."""
    command = ["make", "--eval", "show-environment: ; @env", "show-environment"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    names = {line.partition("=")[0] for line in shown.stdout.splitlines()}
    assert "PATH" in names and "PYTHONDONTWRITEBYTECODE" not in names
