"""Multi-run sweeps: each value gives the run of that value alone, and mistakes are one line."""

import pytest

from helpers.runs import losses, records
from megatron_twotower.bench import ranks
from megatron_twotower.cli import main
from megatron_twotower.config.recipes import load_recipe


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_data):
    """The folder of a sweep of two seeds, its arguments, and its exit status."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    arguments = [
        "recipe=tiny_ar",
        f"data.folder={tiny_data}",
        f"output={output}",
        "train.steps=6",
        "train.validate_every_steps=0",
    ]
    return output, arguments, main.main(["train", "--multirun", *arguments, "seed=1,2"])


def test_a_sweep_of_two_values_is_two_runs(sweep):
    output, _, status = sweep
    assert status == 0
    runs = {path.name: path for path in output.iterdir() if path.is_dir()}
    assert set(runs) == {"seed=1", "seed=2"}
    for seed, path in ((1, runs["seed=1"]), (2, runs["seed=2"])):
        config = load_recipe(str(path / "config.yaml"))
        assert (config.seed, config.output) == (seed, str(path))
        assert len(records(path)) == 6
    assert losses(runs["seed=1"]) != losses(runs["seed=2"])


def test_each_run_is_that_of_its_value_alone(sweep, tmp_path):
    output, arguments, _ = sweep
    assert main.main(["train", *arguments, f"output={tmp_path}/alone", "seed=2"]) == 0
    assert losses(tmp_path / "alone") == losses(output / "seed=2")


def test_the_same_sweep_again_takes_no_step(sweep):
    output, arguments, _ = sweep
    before = {path: (path / "metrics.jsonl").read_text() for path in output.glob("seed=*")}
    assert main.main(["train", "--multirun", *arguments, "seed=1,2"]) == 0
    after = {path: (path / "metrics.jsonl").read_text() for path in before}
    assert after == before and before


@pytest.mark.slow
def test_several_ranks_run_all_jobs(sweep, tmp_path):
    """Each job has its own part of the ranks' store: they would else read old addresses there."""
    output, arguments, _ = sweep
    arguments = [f"output={tmp_path}/out" if text.startswith("output=") else text for text in arguments]
    job = ranks.start(2, ["train", "--multirun", *arguments, "seed=1,2"], logs=tmp_path / "logs")
    try:
        assert job.wait(240) == [0, 0], job.output()
    finally:
        job.kill()
    for name in ("seed=1", "seed=2"):
        assert losses(tmp_path / "out" / name) == pytest.approx(losses(output / name), rel=1e-4)


def test_ranks_do_not_each_launch_the_jobs(sweep, capsys, monkeypatch):
    _, arguments, _ = sweep
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["train", "--multirun", *arguments, "seed=1,2", "hydra/launcher=submitit_slurm"]) == 2
    assert "hydra/launcher=submitit_slurm: found 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["seed=1"], "no key with several values"),
        (["output=a,b"], "output: found several values"),
        (["seed=1,2", "train.steeps=3"], "steeps"),
        (["train.steps=0,-1"], "train.steps: found 0"),
        (["seed=1,2", "+more=1"], "cannot be added"),
    ],
)
def test_a_mistake_is_one_line_after_hydras_own_that_names_the_job(values, named, sweep, capsys):
    _, arguments, _ = sweep
    assert main.main(["train", "--multirun", *arguments[:2], *values]) == 2
    said = capsys.readouterr().err.splitlines()
    assert named in said[-1] and said[-1].startswith("twotower: ")
    assert all(line.startswith("Error executing job with overrides") for line in said[:-1])
