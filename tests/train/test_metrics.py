"""Every sink receives each record once, also after a run that was cut off."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from helpers.runs import PLAIN, records, settings, train
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import read_metrics
from megatron_twotower.config.schema import LoggingConfig
from megatron_twotower.train import metrics
from megatron_twotower.train.metrics import WandbSettings, open_metrics, peak_memory_gib, wandb_settings

DISABLED = WandbSettings(mode="disabled")


def train_record(step, **changes):
    record = {
        "kind": "train",
        "step": step,
        "loss": 8.0 - step / 10,
        "loss_by_noise": {"0.0-0.5": 3.0, "0.5-1.0": 5.0},
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
        "tokens": 1000 * step,
        "tokens_per_second": 5123.0,
        "scored_tokens": 500,
        "expert_load": {"max_over_mean": 1.25},
        "memory_gib": 0.5,
        "seconds": 61.0 * step,
    }
    return record | changes


def write(output, records, *, resume_step=0, console=False, wandb=DISABLED):
    with open_metrics(
        output, total_steps=10, resume_step=resume_step, console=console, wandb=wandb, config={"seed": 1}
    ) as sinks:
        for record in records:
            sinks.log(record)


def steps(output):
    return [record["step"] for record in read_metrics(output / "metrics.jsonl")]


def test_records_come_back_as_written(tmp_path):
    records = [train_record(1), {"kind": "validation", "step": 1, "loss": 4.0, "loss_by_noise": {}, "tokens": 7}]
    write(tmp_path, records)
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_each_line_is_in_the_file_once_logged(tmp_path):
    with open_metrics(tmp_path, total_steps=2, resume_step=0, console=False, wandb=DISABLED, config={}) as sinks:
        sinks.log(train_record(1))
        assert steps(tmp_path) == [1]
        sinks.log(train_record(2))
        assert steps(tmp_path) == [1, 2]


def test_what_is_not_finite_becomes_null(tmp_path):
    write(tmp_path, [train_record(1, loss=math.nan, grad_norm=np.float32("inf"), loss_by_noise={"0.0-1.0": -math.inf})])
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["loss_by_noise"] == {"0.0-1.0": None}


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path):
    write(tmp_path, [train_record(np.int64(1), loss=torch.tensor(2.5), seconds=np.float32(0.5))])
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["step"], record["loss"], record["seconds"]) == (1, 2.5, 0.5)


def test_resume_drops_what_a_cut_off_run_wrote_after_its_checkpoint(tmp_path):
    write(tmp_path, [train_record(step) for step in (1, 2, 3, 4)])
    write(tmp_path, [train_record(step) for step in (3, 4, 5)], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_resume_keeps_the_validation_of_its_own_step(tmp_path):
    validation = {"kind": "validation", "step": 2, "loss": 4.0, "loss_by_noise": {}, "tokens": 7}
    write(tmp_path, [train_record(2), validation, train_record(3)])
    write(tmp_path, [], resume_step=2)
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "validation"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path, [train_record(0), train_record(1)])
    write(tmp_path, [train_record(0)])
    assert steps(tmp_path) == [0]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    write(tmp_path, [train_record(1), train_record(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert steps(tmp_path) == [1]
    write(tmp_path, [train_record(2)], resume_step=1)
    assert steps(tmp_path) == [1, 2]


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(tmp_path / "run", [train_record(1)], console=True)
    assert not (tmp_path / "run").exists()


def test_console_rows_without_a_terminal(tmp_path, capsys):
    by_noise = {"0.0-0.5": 3.25, "0.5-1.0": math.nan}
    validation = {"kind": "validation", "step": 2, "loss": 4.5, "loss_by_noise": by_noise, "tokens": 7}
    write(tmp_path, [train_record(1), train_record(2, expert_load={}), validation], console=True)
    header, first, second, third = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "grad", "tokens/s", "load", "GiB", "elapsed", "left"]
    assert first.split() == ["1", "7.9000", "1.00e-03", "1.50", "5,123", "1.25", "0.50", "1:01", "-"]
    assert second.split()[:-1] == ["2", "7.8000", "1.00e-03", "1.50", "5,123", "-", "0.50", "2:02"]
    assert third.split() == ["2", "4.5000", "validation", "t≤0.5", "3.25", "t≤1.0", "nan"]
    assert len(header) == len(first) == 74


def test_time_left_comes_from_the_steps_since_the_first(monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    sink = metrics._ConsoleSink(Console(file=io.StringIO()), None, total_steps=8, resume_step=2)
    assert sink._left(3) == "-"
    assert sink._left(5) == "0:45"  # 30 s for 2 steps, 3 to go


def test_live_bar_in_a_terminal():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    line = "{task.completed:.0f}/{task.total:.0f} {task.fields[loss]} {task.fields[speed]}"
    with Progress(line, console=console) as bar:
        sink = metrics._ConsoleSink(console, bar, total_steps=10, resume_step=2)
        sink.step_done(3)
        assert bar.tasks[0].completed == 3
        sink.log(train_record(4))
        assert (bar.tasks[0].completed, bar.tasks[0].fields["loss"]) == (4, "7.6000")
    assert "4/10 7.6000 5,123" in screen.getvalue()


def test_wandb_gets_flat_figures_and_one_id_for_all_pieces_of_a_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, figures, *, step):
            calls.append((step, figures))

        def finish(self, *, exit_code):
            calls.append(("finish", exit_code))

    import wandb

    started = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: started.append(arguments) or Run())
    write(tmp_path, [train_record(1, expert_load={})], wandb=WandbSettings(name="a"))
    step, figures = calls[0]
    assert step == 1
    assert figures["train/loss"] == 7.9
    assert figures["train/loss_by_noise/0.5-1.0"] == 5.0
    assert not {"kind", "step", "train/expert_load"} & set(figures)
    assert calls[-1] == ("finish", 0)
    write(tmp_path, [], resume_step=1, wandb=WandbSettings())
    write(tmp_path, [], resume_step=0, wandb=WandbSettings())
    first, resumed, fresh = (arguments["id"] for arguments in started)
    assert first == resumed != fresh
    assert started[0]["mode"] == "offline" and started[0]["config"] == {"seed": 1} and started[0]["dir"] == tmp_path
    with pytest.raises(KeyError):
        write(tmp_path, [{"step": 1}], wandb=WandbSettings())
    assert calls[-1] == ("finish", 1)


def test_wandb_offline_writes_a_run_folder(tmp_path):
    write(tmp_path, [train_record(1)], wandb=WandbSettings(mode="offline", project="p", name="n"))
    assert [path.stat().st_size > 0 for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [True]


def test_variables_of_wandb_decide_over_the_recipe():
    recipe = LoggingConfig(wandb="online", project="p", name="n")
    assert wandb_settings(recipe, {}) == WandbSettings("online", "p", "n")
    assert wandb_settings(recipe, {"WANDB_MODE": ""}) == WandbSettings("online", "p", "n"), "as if it were not set"
    for mode in ("offline", "online", "disabled"):
        assert wandb_settings(recipe, {"WANDB_MODE": mode}).mode == mode
    named = {"WANDB_PROJECT": "other", "WANDB_NAME": "run"}
    assert wandb_settings(recipe, named) == WandbSettings("online", "other", "run")
    with pytest.raises(UserError, match=r"WANDB_MODE: found 'dry', expected one of offline, online, disabled"):
        wandb_settings(recipe, {"WANDB_MODE": "dry"})


def test_a_run_without_wandb_because_of_the_environment(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tmp_path / "run"
    assert train("tiny_ar", *settings(tiny_data, run, None, "logging.wandb=offline", "train.steps=6", *PLAIN))
    assert not (run / "wandb").exists() and records(run)


def test_missing_wandb_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb or WANDB_MODE: found 'offline', but wandb is not installed"):
        write(tmp_path, [], wandb=WandbSettings())


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gib()
    held = np.ones(2**25)  # 256 MiB, touched
    assert held[-1] == 1
    assert 0.01 < before <= peak_memory_gib()
    if not torch.cuda.is_available():
        assert peak_memory_gib() >= 0.25
