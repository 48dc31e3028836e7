"""A small run folder to report on, and one recorded generation."""

import io
import json
import math

from rich.console import Console

from megatron_twotower.common.run_folder import METRICS_FILE
from megatron_twotower.generate.replay import page as replay

BUCKETS = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")
STARTS = (5.9, 6.3, 6.9, 7.6, 8.3)
ENDS = (2.13, 2.74, 3.41, 4.32, 5.23)


def records(steps=400, *, start=8.35, end=4.0, by_noise=True):
    """Losses that fall from `start` at step 0 towards `end`."""
    for step in range(0, steps + 1, 10):
        part = math.exp(-5 * step / steps)
        loss = end + (start - end) * part
        if step:
            yield {"kind": "train", "step": step, "loss": loss + 0.05 * math.sin(step), "seconds": step / 5}
        if step % 100 == 0:
            noise = {b: e + (s - e) * part for b, s, e in zip(BUCKETS, STARTS, ENDS, strict=True)} if by_noise else {}
            yield {"kind": "validation", "step": step, "loss": loss, "loss_by_noise": noise, "tokens": 16384}


def sweep_row(threshold, tokens_per_pass, speedup, nats):
    return {
        "confidence_threshold": threshold,
        "tokens_per_pass": tokens_per_pass,
        "passes": 310,
        "speedup": speedup,
        "tokens_per_second": 210.0 * speedup,
        "nats_per_token": nats,
        "agreement": 1 - nats / 20,
    }


EVALUATION = {
    "model": "runs/quickstart/model",
    "tokenizer_sha256": "5a5a",
    "settings": {"prompt_tokens": 61},
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
    "ar_loss": 3.921,
    "ar_loss_per_byte": 1.2345,
    "ar_loss_on_bound_tokens": 3.77,
    "diffusion_bound": 4.61,
    "diffusion_bound_stderr": 0.04,
    "masked_loss_by_noise": [{"t": t / 10, "loss": 1.8 + 0.35 * t, "count": 1000 * t} for t in range(1, 11)],
    "sweep": [sweep_row(0.5, 3.12, 2.05, 3.4), sweep_row(0.8, 1.73, 1.21, 2.9), sweep_row(0.9, 1.41, 0.98, 2.75)],
    "ar_generation": {"tokens_per_second": 210.0, "nats_per_token": 1.9},
    "samples": [
        {
            "mode": "mask_diffusion",
            "prompt": "def main():",
            "text": "\n    if x < 3 & y:\n        '<b>'",
            "passes": 20,
            "new_tokens": 64,
            "seconds": 1.25,
        },
        {"mode": "ar", "prompt": "def main():", "text": "\n    pass", "passes": 64, "new_tokens": 64, "seconds": 2.5},
    ],
}


# The same for a pair that was trained for longer.
LONGER = EVALUATION | {
    "model": "recipes/models/longer",
    "diffusion_bound": 4.05,
    "masked_loss_by_noise": [row | {"loss": row["loss"] - 0.5} for row in EVALUATION["masked_loss_by_noise"]],
    "sweep": [sweep_row(0.8, 4.44, 2.5, 2.8), sweep_row(0.9, 3.33, 2.1, 2.6)],
    "samples": [EVALUATION["samples"][0] | {"text": "\n    return run(<args>)"}],
}


def make_run(tmp_path):
    for name, by_noise in (("ar", False), ("twotower", True)):
        folder = tmp_path / "quick<start>" / name
        folder.mkdir(parents=True)
        write_records(folder, records(by_noise=by_noise))
        (folder / "config.yaml").write_text(f"objective: {name}\nseed: 1234\n")
        (folder / "provenance.json").write_text('{"commit": "0123abc", "backbone": "runs/b&b"}\n')
    write_evaluation(tmp_path / "quick<start>", EVALUATION)
    return tmp_path / "quick<start>"


def write_records(folder, items):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(item) + "\n" for item in items))


def write_evaluation(run, evaluation, name="evaluation.json"):
    (run / name).write_text(json.dumps(evaluation))


def quiet():
    return Console(file=io.StringIO(), width=100)


RECORDING = {
    "version": replay.VERSION,
    "model": "runs/model",
    "settings": {"block_size": 2, "steps_per_block": 2, "confidence_threshold": 0.8, "temperature": 0.3},
    "mode": "mask_diffusion",
    "prompt": "def </script>",
    "text": "a b",
    "new_tokens": 2,
    "passes": 2,
    "seconds": 0.5,
    "summary": "2 tokens in 2 passes",
    "pieces": {"5": "a", "6": " b"},
    "blocks": [
        [
            {"t": 1.0, "predicted": [5, 6], "confidence": [0.4, 0.6], "committed": [1]},
            {"t": 0.5, "predicted": [5, 6], "confidence": [0.7, 0.0], "committed": [0]},
        ]
    ],
}
