"""What tests of faults share: the arguments of a tiny run, how far it has come, and its losses."""

import json
import time

import megatron_twotower.mcore  # noqa: F401  also in the server that forks processes of a test
from megatron_twotower.train import loop

# A process of its own imports the test's module, and this first: whichever test started the server
# that forks it.


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


# --- figures that are not finite ------------------------------------------------------------------------------------


def with_bad_steps(monkeypatch, bad, *, loss=False):
    """Make the gradients of some steps, counted from 1, infinite or NaN; or the loss alone."""
    original, calls = loop.forward_backward, iter(range(1, 1000))

    def forward_backward(parts, batches, *, forward_only):
        sums = original(parts, batches, forward_only=forward_only)
        if not forward_only and (step := next(calls)) in bad:
            if loss:
                sums[0] = float("inf")
            else:
                first = next(p for p in parts.model.only.parameters() if p.requires_grad)
                first.main_grad[0] = float("nan") if step % 2 else float("inf")
        return sums

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
