"""Ranks have the grace period to end after a signal, whatever release of torch starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.runs import until
from megatron_twotower.common import torchrun

# Saves for three seconds after SIGTERM.
RANK = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(3)
    Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "started").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "saved"), [("1", False), ("60", True)])
def test_a_rank_that_saves_has_the_grace_period(seconds, saved, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "megatron_twotower.common.torchrun", "--standalone", "--nproc-per-node=1"]
    job = subprocess.Popen(
        [*command, str(tmp_path / "rank.py"), str(tmp_path)],
        env=os.environ | {"GRACE_SECONDS": seconds, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert until((tmp_path / "started").exists, 60)
    started = time.monotonic()
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert (tmp_path / "saved").exists() == saved, said
    assert ("forcefully exiting" in said) != saved, said
    assert job.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("torchrun: ") and "got signal: 15" in said.splitlines()[-1]
    assert time.monotonic() - started < 25, "as soon as the rank has ended"


class OldContext:
    """Closes as the class of torch 2.9 does."""

    def __init__(self):
        self.closed = []

    def close(self, death_sig=None, timeout=30):
        self.closed.append((death_sig, timeout))


def old_agent():
    class Agent:
        def __init__(self):
            self._pcontext = OldContext()

        def _shutdown(self, death_sig=signal.SIGTERM, is_restart=False):
            self._pcontext.close(death_sig)

    return Agent


def test_a_release_without_the_setting_waits_after_a_signal_and_not_after_a_failure():
    agent = old_agent()
    torchrun.lengthen(agent, 600)
    failed, ended = agent(), agent()
    failed._shutdown(is_restart=True)
    assert failed._pcontext.closed == [(signal.SIGTERM, 30)]
    ended._shutdown(signal.SIGUSR1)
    assert ended._pcontext.closed == [(signal.SIGUSR1, 600)]
    before = agent()
    before._pcontext = None
    with pytest.raises(AttributeError):  # nothing was started; the release itself looks at it
        before._shutdown(signal.SIGTERM)


def test_the_period_is_a_number_of_seconds():
    assert torchrun.grace_seconds({}) == 600 and torchrun.grace_seconds({"GRACE_SECONDS": "900"}) == 900
    with pytest.raises(SystemExit, match=r"GRACE_SECONDS: found '10m', expected a whole number of seconds"):
        torchrun.grace_seconds({"GRACE_SECONDS": "10m"})
