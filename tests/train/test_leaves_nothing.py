"""A run that ends leaves nothing in the process: threads, files, memory."""

import gc

import psutil
import pytest

from helpers.runs import settings
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run

# Validation is off: a forward pass without gradients would free the graph of the last step.
SHORT = ("train.steps=2", "schedule.warmup_steps=1", "train.validate_every_steps=0", "train.checkpoint_every_steps=2")


def resources():
    """What this process holds: threads, open files and sockets, resident MiB."""
    gc.collect()
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "mebibytes": process.memory_info().rss / 2**20,
    }


def grown(run, times):
    """How much more there is after further runs than after the first."""
    run(0)
    before = resources()
    for number in range(1, 1 + times):
        run(number)
    after = resources()
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["tiny", pytest.param("tiny_ar", marks=pytest.mark.slow)])
def test_runs_one_after_the_other_leave_nothing(recipe, times, tmp_path, tiny_data, tiny_backbone):
    def run(number):
        backbone = tiny_backbone if recipe == "tiny" else None
        overrides = settings(tiny_data, tmp_path / f"{number}", backbone, *SHORT)
        try:
            assert train_run.run_training(load_recipe(recipe, overrides))
        finally:
            parallel.shutdown()

    more = grown(run, times)
    # The allocator keeps some of what was freed; a run that stays would keep its optimizer too.
    assert more.pop("mebibytes") < 60
    assert more == {"threads": 0, "files": 0}


def test_a_run_that_fails_after_a_step_leaves_nothing(tmp_path, tiny_data, tiny_backbone, monkeypatch):
    def fail(saver, progress):
        raise OSError("no space left")

    monkeypatch.setattr(train_run.checkpoints.CheckpointSaver, "save", fail)

    def run(number):
        config = load_recipe("tiny", settings(tiny_data, tmp_path / f"{number}", tiny_backbone, *SHORT))
        try:
            with pytest.raises(OSError, match="no space left"):
                train_run.run_training(config)
        finally:
            parallel.shutdown()

    more = grown(run, 2)
    assert (more["threads"], more["files"]) == (0, 0)
