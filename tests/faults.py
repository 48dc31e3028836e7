"""What tests of faults share: the arguments of a tiny run, how far it has come, and its losses."""

import json
import time

from megatron_twotower import host

# A process of its own imports the test's module, and this first: whichever test started the server that forks it.
host.install()


def settings(data, run, backbone, *extra):
    return ["train", "recipe=tiny", f"data.folder={data}", f"output={run}", f"init.backbone={backbone}", *extra]


def until(condition, seconds=240):
    """Wait for a condition. Whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def records(run, kind="train"):
    """By step; the last line may be half written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {each["step"]: each for each in map(json.loads, lines) if each["kind"] == kind}


def progress_of(run):
    return max(records(run), default=0)


def losses(run):
    return {step: record["loss"] for step, record in records(run).items()}
