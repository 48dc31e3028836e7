import io
import json

import pytest
import torch
from rich.console import Console

from megatron_twotower.bench import step as bench_step
from megatron_twotower.bench import training_steps
from megatron_twotower.bench.measure import CaseTimes
from megatron_twotower.bench.step import StepOptions
from megatron_twotower.bench.training_steps import AR, CONCATENATED, FORWARD_BACKWARD, TWO_TOWER, UPDATE
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe


def test_the_recipe_has_every_kind_of_layer_at_a_width_that_counts():
    config = load_recipe("bench_step")
    assert set(config.model.hybrid_override_pattern) == set("M*E-")
    assert config.model.num_layers >= 10 and config.model.hidden_size >= 512


def test_tokens_of_a_step_stay_the_same_at_every_length():
    config = load_recipe("bench_step")
    shapes = [training_steps.random_batch(config, length=length).tokens.shape for length in (512, 1024, 2048, 8192)]
    assert shapes == [(4, 512), (2, 1024), (1, 2048), (1, 8192)]


def test_a_step_does_not_change_the_weights(groups):
    """The rate is zero before the schedule's first step: every timed step is the first."""
    config = load_recipe("bench_step", bench_step.QUICK_OVERRIDES)
    trainers = training_steps.build_trainers(config, groups)
    assert list(trainers) == [AR, TWO_TOWER]
    before = [p.detach().clone() for p in trainers[TWO_TOWER].model.only.parameters()]
    training_steps.step_case("case", trainers[TWO_TOWER], training_steps.random_batch(config, length=64)).run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainers[TWO_TOWER].model.only.parameters(), strict=True))


def test_ratios_are_relative_to_the_reference():
    batch = training_steps.random_batch(load_recipe("bench_step"), length=1024)
    times = {
        name: CaseTimes({FORWARD_BACKWARD: [a, a], UPDATE: [1.0, 1.0]}) for name, a in ((AR, 3.0), (TWO_TOWER, 4.5))
    }
    ar, two = bench_step.step_rows("M*", batch, times, reference=AR)
    assert (ar["ratio"], two["ratio"], two["ratio_with_update"]) == (1.0, 1.5, 5.5 / 4)
    assert two["tokens_per_second"] == 2048 / 5.5


@pytest.mark.parametrize(
    "options, message",
    [
        (StepOptions(lengths=(100,)), "--lengths: found 100, expected multiples of noise.block_size_tokens 16"),
        (StepOptions(seeds=1), "--seeds: found 1, expected at least 2"),
        (StepOptions(draws=(0,)), "--draws: found 0, expected at least 1"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        bench_step.check_options(load_recipe("bench_step"), options)


def test_a_quick_run_prints_tables_and_writes_json_and_a_picture(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    bench_step.run(tmp_path, threads=1, quick=True, console=console)
    text = console.file.getvalue()
    assert all(title in text for title in ("training steps, alternating", "by part", "noise draws", "variance of the"))
    found = json.loads((tmp_path / "step.json").read_text())
    cases = [(row["pattern"], row["case"]) for row in found["steps"]]
    mixed, attention = "ME*-M", "*E*-*"
    assert cases == [
        (mixed, AR),
        (mixed, TWO_TOWER),
        (attention, AR),
        (attention, TWO_TOWER),
        (attention, CONCATENATED),
    ]
    assert found["parts"].keys() == {AR, TWO_TOWER}
    assert [row["draws"] for row in found["draws"]] == [1, 2]
    assert found["recipe"] == "bench_step" and found["machine"]["threads"] == 1
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    assert main(["bench", "step", "--lengths", "100", "--output", str(tmp_path)]) == 2
    assert "expected multiples of" in capsys.readouterr().err
    assert main(["bench", "ops", "--length", "100", "--block", "16", "--output", str(tmp_path)]) == 2
    assert "expected a multiple of --block 16" in capsys.readouterr().err
