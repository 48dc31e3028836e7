"""Faults: kills at random moments, figures that are not finite, fewer ranks than before."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from helpers.faults import with_bad_steps
from helpers.runs import last_step, losses, records, train_arguments, until
from megatron_twotower.bench import soak
from megatron_twotower.checkpoint import files
from megatron_twotower.cli.main import main
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import parallel
from megatron_twotower.train import loop
from megatron_twotower.train import run as train_run

# --- kills ---


def soaked(output, data, backbone, *, kills, counts, seed):
    found = soak.soak(
        output, data=data, backbone=backbone, counts=counts, seed=seed, finished=lambda done: done >= kills
    )
    assert not found.unexpected, found.unexpected
    assert sum(found.kills.values()) == kills and found.resumes > 0
    assert found.samples_repeated == found.samples_skipped == 0
    return found


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_repeat_nothing(tmp_path, tiny_data, tiny_backbone):
    found = soaked(tmp_path, tiny_data, tiny_backbone, kills=4, counts=(2, 1), seed=3)
    assert len(found.kills) >= 3 and found.clean and found.largest_difference < 1e-5
    assert "samples repeated" in [str(cell) for cell in soak.soak_table(found).columns[0].cells]


@pytest.mark.slow
def test_thirty_kills_on_one_layout_give_the_uninterrupted_run_bit_for_bit(tmp_path, tiny_data, tiny_backbone):
    found = soaked(tmp_path, tiny_data, tiny_backbone, kills=30, counts=(2,), seed=1)
    assert found.largest_difference == 0 and found.kills.keys() == soak.INTERRUPTIONS.keys()
    assert found.steps_lost > 0


@pytest.mark.slow
def test_thirty_kills_with_changing_numbers_of_ranks(tmp_path, tiny_data, tiny_backbone):
    assert soaked(tmp_path, tiny_data, tiny_backbone, kills=30, counts=(1, 2, 4), seed=2).clean


@pytest.mark.slow
def test_torchrun_resumes_with_the_remaining_ranks(tmp_path, tiny_data, tiny_backbone):
    """There are two agents with one rank each.

    The second one is killed with its rank; the first one restarts alone.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    # A low learning rate and a large epsilon: rounding depends on the number of ranks, and its
    # differences must not grow.
    extra = [
        *SHORT,
        "train.steps=40",
        "train.checkpoint_every_steps=2",
        "optimizer.learning_rate=1e-4",
        "optimizer.epsilon=1e-5",
    ]
    assert main(train_arguments(tiny_data, whole, tiny_backbone, *extra)) == 0
    rendezvous = [
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=test",
        "--rdzv-endpoint=localhost:29713",
        "--rdzv-conf=last_call_timeout=3",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "megatron_twotower"]
    agents = [
        subprocess.Popen(
            [*command, *train_arguments(tiny_data, run, tiny_backbone, *extra)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # as launch/torchrun.sh
        )
        for _ in range(2)
    ]
    try:
        assert until(lambda: last_step(run) >= 6, 300)
        # The agent that does not keep the rendezvous, and the rank that it started.
        ranks_of = {agent: children_of(agent.pid) for agent in agents}
        victim = next(agent for agent in agents if not keeps_port(agent.pid, 29713))
        assert files.read_state(files.find_checkpoints(run)[-1]).configuration["output"] == str(run)
        for child in [*ranks_of[victim], victim.pid]:
            os.kill(child, signal.SIGKILL)
        other = next(agent for agent in agents if agent is not victim)
        output, _ = other.communicate(timeout=400)
        assert other.returncode == 0, output[-3000:]
    finally:
        for agent in agents:
            for child in [*children_of(agent.pid), agent.pid]:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            agent.communicate()
    got, want = losses(run), losses(whole)
    assert sorted(got) == sorted(want)
    assert all(got[step] == pytest.approx(want[step], rel=1e-5) for step in want)
    facts = (run / "provenance.json").read_text()
    assert '"ranks": 1' in facts, "the last start was alone"


def children_of(process):
    import psutil

    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def keeps_port(process, port):
    import psutil

    return any(c.laddr.port == port and c.status == "LISTEN" for c in psutil.Process(process).net_connections())


def trained_parameters(monkeypatch):
    """A dict that receives the `module` of the next run in this process."""
    kept, original = {}, train_run.build_model

    def remember(config, groups, **keywords):
        kept["module"] = (model := original(config, groups, **keywords)).module
        return model

    monkeypatch.setattr(train_run, "build_model", remember)
    return kept


SHORT = [
    "train.validate_every_steps=0",
    "train.checkpoint_every_steps=0",
    "schedule.warmup_steps=0",
    "schedule.kind=constant",
]


def run_in_process(arguments):
    try:
        return train_run.run_training(load_recipe("tiny", arguments[2:]))
    finally:
        parallel.shutdown()


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize(
    "layout", [pytest.param([], marks=pytest.mark.slow), ["optimizer.distributed=true", "train.precision=bf16"]]
)
def test_a_step_that_is_not_finite_changes_nothing(loss, layout, tmp_path, tiny_data, tiny_backbone, monkeypatch):
    """The second and third step are not finite: they change no state, and training continues."""
    kept, states = trained_parameters(monkeypatch), []
    original = loop.train_step

    def train_step(trainer, batches, **keywords):
        result = original(trainer, batches, **keywords)
        states.append(
            {
                name: tensor.clone()
                for name, tensor in kept["module"].state_dict().items()
                if isinstance(tensor, torch.Tensor) and "local_tokens" not in name
            }
        )
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    with_bad_steps(monkeypatch, {2, 3}, loss=loss)
    run = tmp_path / "run"
    extra = [*SHORT, *layout, "train.steps=5", "train.router_bias_update_rate=0.1"]
    assert run_in_process(train_arguments(tiny_data, run, tiny_backbone, *extra))
    for bad in (1, 2):
        assert all(torch.equal(states[bad][name], states[0][name]) for name in states[0])
    assert any(not torch.equal(states[3][name], states[0][name]) for name in states[0])
    found = records(run)
    assert [found[step].get("nonfinite_steps", 0) for step in range(1, 6)] == [0, 1, 1, 0, 0]
    assert found[2]["loss"] is None and found[4]["loss"] > 0
    state = files.read_state(files.find_checkpoints(run)[-1])
    assert (state.step, state.cursor, state.updates) == (5, 40, 3)


def test_a_skipped_step_is_counted_across_a_resume(tmp_path, tiny_data, tiny_backbone, monkeypatch):
    """Two steps without interruption before the resume and one after it: the third ends the run."""
    run = tmp_path / "run"
    common = [*SHORT, "train.stop_after_nonfinite=3", "train.log_every_steps=10"]
    with_bad_steps(monkeypatch, {3, 4})
    assert run_in_process(train_arguments(tiny_data, run, tiny_backbone, *common, "train.steps=4"))
    with_bad_steps(monkeypatch, {1})
    with pytest.raises(ValueError, match=r"step 5: .* 3 steps in a row"):
        run_in_process(train_arguments(tiny_data, run, tiny_backbone, *common, "train.steps=9"))


def test_a_weight_that_is_nan_stops_the_run_and_the_batch_is_written(tmp_path, tiny_data, tiny_backbone, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    broken, run = tmp_path / "backbone", tmp_path / "run"
    shutil.copytree(tiny_backbone, broken)
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm_f.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(train_arguments(tiny_data, run, broken, *SHORT, "train.steps=9", "train.stop_after_nonfinite=3")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step 3: the loss or its gradients are not finite, 3 steps in a row" in said
    kept = run / "nonfinite" / "step-00000003-rank-00000.pt"
    assert str(kept) in said
    batches = torch.load(kept)
    assert sorted(position for batch in batches for position in batch["positions"].tolist()) == list(range(16, 24))
    assert not files.find_checkpoints(run)


# --- batches without a masked token ---


def unscored_batches(monkeypatch, steps):
    """Mask no token in some steps, counted from 1; a step has one micro-batch in these tests."""
    original, calls = loop.corrupt, iter(range(1, 1000))

    def corrupt(batch, noise, *, seed, times=None, **more):
        times = torch.zeros(len(batch.tokens), 1) if next(calls) in steps else times
        return original(batch, noise, seed=seed, times=times, **more)

    monkeypatch.setattr(loop, "corrupt", corrupt)


@pytest.mark.parametrize(
    ("extra", "taken", "loss"),
    [
        ([], False, None),
        (["train.sequence_aux_loss=0.1"], False, None),
        (["noise.weighting=elbo"], False, 0.0),
        (["noise.weighting=elbo", "train.sequence_aux_loss=0.1"], True, 0.0),
        (["optimizer.distributed=true", "train.precision=bf16"], False, None),
    ],
    ids=["masked_mean", "masked_mean, balance", "elbo", "elbo, balance", "distributed"],
)
def test_a_batch_without_a_masked_token_takes_no_step(
    extra, taken, loss, tmp_path, tiny_data, tiny_backbone, monkeypatch
):
    """Neither weight decay nor momentum moves a weight; a balance loss that has a gradient does."""
    kept, states, original = trained_parameters(monkeypatch), [], loop.train_step

    def train_step(trainer, batches, **keywords):
        result = original(trainer, batches, **keywords)
        states.append({name: tensor.detach().clone() for name, tensor in kept["module"].named_parameters()})
        states[-1] |= {n: b.clone() for n, b in kept["module"].named_buffers() if n.endswith("expert_bias")}
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    unscored_batches(monkeypatch, {2, 3})
    run = tmp_path / "run"
    arguments = [*SHORT, "data.micro_batch_size=8", "train.steps=4", "train.router_bias_update_rate=0.1", *extra]
    assert run_in_process(train_arguments(tiny_data, run, tiny_backbone, *arguments))
    for empty in (1, 2):
        same = all(torch.equal(states[empty][name], states[empty - 1][name]) for name in states[0])
        assert same is not taken
    assert any(not torch.equal(states[3][name], states[2][name]) for name in states[0])
    found = records(run)
    assert [found[step].get("unscored_steps", 0) for step in range(1, 5)] == [0, int(not taken), int(not taken), 0]
    assert [found[step]["scored_tokens"] > 0 for step in range(1, 5)] == [True, False, False, True]
    assert [found[step].get("loss", None) for step in (2, 3)] == [loss, loss] and found[4]["loss"] > 0
    assert ("loss" in found[2]) is (loss is not None), "left out where there is nothing to divide by"
    state = files.read_state(files.find_checkpoints(run)[-1])
    assert (state.step, state.cursor, state.updates) == (4, 32, 4 if taken else 2)


def test_unscored_steps_are_counted_across_a_resume(tmp_path, tiny_data, tiny_backbone, monkeypatch):
    """The loss of a record is that of its scored steps."""
    run = tmp_path / "run"
    arguments = [*SHORT, "data.micro_batch_size=8", "train.log_every_steps=3", "train.steps=3"]
    arguments = train_arguments(tiny_data, run, tiny_backbone, *arguments)
    unscored_batches(monkeypatch, {2})
    with monkeypatch.context() as signalled:
        stops = iter([False, True])
        signalled.setattr(train_run, "StopSignal", lambda: lambda: next(stops))
        assert not run_in_process(arguments)
    state = files.read_state(files.find_checkpoints(run)[-1])
    assert (state.step, state.window.unscored, state.window.in_a_row, state.updates) == (2, 1, 0, 1)
    assert run_in_process(arguments)
    record = records(run)[3]
    assert record["unscored_steps"] == 1 and record["loss"] > 0 and "nonfinite_steps" not in record
    # The speed is that of the one step of this process, over all of its time.
    step_tokens = record["tokens"] / 3
    assert 0 < record["tokens_per_second"] * record["seconds"] <= step_tokens
