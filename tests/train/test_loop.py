"""Runs of the tiny recipes: golden losses, kills and resumes, ranks, and frozen weights."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from helpers.runs import CLI, GOLDEN, launch, losses, settings, train
from megatron_twotower.checkpoint import files
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_data, tiny_backbone):
    """The uninterrupted two-tower run that other runs are compared with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train("tiny", *settings(tiny_data, run, tiny_backbone))
    return run


@pytest.mark.parametrize("recipe", ["tiny_ar", "tiny"])
def test_golden_losses(recipe, tmp_path, tiny_data, tiny_backbone, whole_run):
    """Thirty steps have the golden losses.

    `tests/golden/update.py` writes them again after an intended change.
    """
    run = whole_run
    if recipe == "tiny_ar":
        run = tmp_path / "run"
        assert train(recipe, *settings(tiny_data, run))
    got = list(losses(run).values())
    want = json.loads((GOLDEN / f"{recipe}.json").read_text())
    assert len(got) == len(want) == 30
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=0)
    assert sum(got[-5:]) < 0.9 * sum(got[:5]), "thirty steps must teach something"


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, tiny_data, tiny_backbone, whole_run):
    run = tmp_path / "run"
    arguments = settings(tiny_data, run, tiny_backbone)
    # Sums depend on the number of threads: the recipe sets it, not the environment.
    process = launch(1, "tiny", *arguments, wait=False, threads=2)
    mark = checkpoint_folder(run, 15)
    deadline = time.monotonic() + 240
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert mark.exists() and process.returncode == -signal.SIGKILL, "killed before the end"
    assert not checkpoint_folder(run, 30).exists()
    launch(1, "tiny", *arguments)
    assert losses(run) == losses(whole_run)
    assert losses(run, "validation") == losses(whole_run, "validation")


def test_sigterm_saves_at_once_and_asks_to_be_started_again(tmp_path, tiny_data, tiny_backbone, whole_run, records_of):
    run = tmp_path / "run"
    # A record covers three steps: the one in which the signal comes must be complete after the
    # resume.
    arguments = settings(tiny_data, run, tiny_backbone, "train.checkpoint_every_steps=0", "train.log_every_steps=3")
    process = launch(1, "tiny", *arguments, wait=False)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-3000:]
    found = files.find_checkpoints(run)
    assert len(found) == 1 and 3 <= files.read_state(found[0]).step < 30
    launch(1, "tiny", *arguments)
    got, every = records_of(run), records_of(whole_run)
    assert sorted(got) == list(range(3, 31, 3))
    for step, record in got.items():
        parts = [every[s] for s in (step - 2, step - 1, step)]
        mean = sum(r["loss"] * r["scored_tokens"] for r in parts) / sum(r["scored_tokens"] for r in parts)
        assert record["loss"] == pytest.approx(mean, rel=1e-6)


# Layouts of the command on two ranks, and the steps at which it stops and resumes. test_layouts
# compares the results of every layout.
LAYOUTS = {
    "distributed optimizer": (
        [9],
        "data.micro_batch_size=1",
        "optimizer.distributed=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
    "pipeline": ([6, 9], "parallel.pipeline=2", "parallel.pipeline_layers=[3,2]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_losses_of_one(layout, tmp_path, tiny_data, tiny_backbone, whole_run, records_of):
    run, (stops, *overrides) = tmp_path / "run", LAYOUTS[layout]
    arguments = settings(tiny_data, run, tiny_backbone, *overrides, "train.validate_every_steps=4")
    for steps in stops:
        launch(2, "tiny", *arguments, f"train.steps={steps}")
    got, want = records_of(run), records_of(whole_run)
    for step in range(1, 10):
        assert got[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-5), step
        assert got[step]["grad_norm"] == pytest.approx(want[step]["grad_norm"], rel=1e-4), step
        assert got[step]["scored_tokens"] == want[step]["scored_tokens"]
        assert got[step]["expert_load"] == pytest.approx(want[step]["expert_load"])
    assert records_of(run, "validation")[0]["loss"] == pytest.approx(
        records_of(whole_run, "validation")[0]["loss"], rel=1e-5
    )


@pytest.mark.parametrize("overrides", [["data.micro_batch_size=8"], ["data.micro_batch_size=1"]])
@pytest.mark.parametrize(
    ("weighting", "draws"),
    [*(pytest.param(each, 1, marks=pytest.mark.slow) for each in ("masked_mean", "elbo")), ("masked_mean", 3)],
)
def test_accumulation_does_not_change_the_losses(overrides, weighting, draws, tmp_path, tiny_data, tiny_backbone):
    common = [
        f"noise.weighting={weighting}",
        "noise.time_per=block",
        "noise.time_sampling=stratified",
        f"noise.draws_per_context={draws}",
        "train.steps=6",
        "train.validate_every_steps=0",
    ]
    for name, extra in (("plain", []), ("other", overrides)):
        train("tiny", *settings(tiny_data, tmp_path / name, tiny_backbone, *common, *extra))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_frozen_means_bitwise_unchanged_and_the_rest_moves(tmp_path, tiny_data, tiny_backbone):
    config = load_recipe(
        "tiny", settings(tiny_data, tmp_path / "run", tiny_backbone, "train.steps=3", "schedule.warmup_steps=1")
    )
    kept = {}
    original = train_run.build_model

    def remember(config, groups, **keywords):
        model = original(config, groups, **keywords)
        context = model.module.context
        kept["context"] = context
        kept["before"] = {n: t.clone() for n, t in context.state_dict().items() if isinstance(t, torch.Tensor)}
        kept["module"] = model.module
        kept["start"] = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        return model

    train_run.build_model = remember
    try:
        assert train_run.run_training(config)
    finally:
        train_run.build_model = original
        parallel.shutdown()
    after = kept["context"].state_dict()
    assert kept["before"]
    for name, tensor in kept["before"].items():
        assert torch.equal(after[name], tensor), name
    still = [n for n, p in kept["module"].named_parameters() if torch.equal(p, kept["start"][n])]
    assert not still, f"every trained parameter moves: {still}"


@pytest.mark.slow
def test_bf16_follows_fp32(tmp_path, tiny_data, tiny_backbone, whole_run):
    train("tiny", *settings(tiny_data, tmp_path / "run", tiny_backbone, "train.precision=bf16"))
    got, want = losses(tmp_path / "run"), losses(whole_run)
    assert got == pytest.approx(want, rel=0.03)
    assert got != want


def test_recompute_keeps_the_losses(tmp_path, tiny_data, tiny_backbone, whole_run, records_of):
    arguments = ["train.recompute_layers=ME*-", "train.steps=8"]
    train("tiny", *settings(tiny_data, tmp_path / "run", tiny_backbone, *arguments))
    want = records_of(whole_run)
    for step, record in records_of(tmp_path / "run").items():
        assert record["loss"] == pytest.approx(want[step]["loss"], rel=1e-6)


def test_a_changed_backbone_is_refused(tmp_path, tiny_data, tiny_backbone):
    import shutil

    copy = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, copy)
    short = ["train.steps=6", "train.validate_every_steps=0"]
    train("tiny", *settings(tiny_data, tmp_path / "run", copy, *short))
    file = next(copy.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = subprocess.run(
        [*CLI, "train", "recipe=tiny", *settings(tiny_data, tmp_path / "run", copy)],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert result.returncode == 2
    assert "fingerprint" in result.stderr and result.stderr.count("\n") == 1
