"""The command `bench gpu`: all of it at a tiny size on the CPU, and the choice of layers."""

import io
import json

import pytest
from rich.console import Console

from megatron_twotower.bench import results as bench_results
from megatron_twotower.bench.gpu import command, steps, tables
from megatron_twotower.bench.gpu.command import GpuOptions, choose_layers
from megatron_twotower.bench.training_steps import AR, TWO_TOWER
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.plan.layout import ACCELERATORS

ROUTER, CONTEXT_SCAN = "router in fp64", "context tower's scan in torch"


def test_the_recipe_is_the_real_model_at_full_width():
    config, real = load_recipe("bench_gpu"), load_recipe("nano_30b_a3b", planning=True)
    assert config.model == real.model and config.model.n_routed_experts == 128
    assert config.data.sequence_length_tokens == real.data.sequence_length_tokens == 8192
    assert config.train.precision == "bf16" and config.noise.block_size_tokens == 16


@pytest.mark.parametrize(("accelerator", "pattern"), [("h100", "MEMEM*"), ("h200", "MEMEM*EMEM")])
def test_as_many_layers_as_the_plan_says_fit(accelerator, pattern):
    config = choose_layers(load_recipe("bench_gpu"), layers=0, memory_bytes=ACCELERATORS[accelerator].memory_bytes)
    assert config.model.hybrid_override_pattern == pattern
    assert set("ME*") <= set(pattern), "every kind of layer"


def test_a_given_number_of_layers():
    config = load_recipe("bench_gpu")
    assert choose_layers(config, layers=3, memory_bytes=0).model.hybrid_override_pattern == "MEM"
    with pytest.raises(UserError, match="--layers: found 53, expected at most the 52"):
        choose_layers(config, layers=53, memory_bytes=0)
    with pytest.raises(UserError, match=r"memory: found 8\.0 GiB, expected .* for one layer"):
        choose_layers(config, layers=0, memory_bytes=8 * 2**30)


def test_a_quick_run_measures_everything_and_says_that_it_was_a_cpu(tmp_path):
    console = Console(file=io.StringIO(), width=240)
    assert command.run(tmp_path, quick=True, options=GpuOptions(rungs=(ROUTER, CONTEXT_SCAN)), console=console)
    text, found = console.file.getvalue(), json.loads((tmp_path / "gpu.json").read_text())
    assert text.count(tables.ON_A_CPU) == 2 and tables.FORMULA[:40] in text
    assert not found["on_a_gpu"] and found["pattern"] == "ME*-M" and found["peak_flops"] is None
    assert set(found["packages"].values()) == {"no CUDA device"}
    ar, two = found["steps"]
    assert (ar["case"], two["case"]) == (AR, TWO_TOWER)
    config = load_recipe("bench_gpu", command.QUICK_OVERRIDES)
    for row, objective in ((ar, "ar"), (two, "two_tower")):
        flops = step_flops(config, objective=objective)
        assert row["model_tflops"] == pytest.approx(flops.model * row["tokens"] / row["seconds"] / 1e12)
        assert row["tokens"] == 64 and row["utilisation"] is None and row["busiest_expert"] >= 1
        assert sum(row["classes"]["seconds"].values()) > 0.5 * row["seconds"]
        assert row["classes"]["seconds"]["GEMM"] > 0
    assert ar["planned_bytes"] is None and two["planned_bytes"] > 0
    assert found["two_tower_over_ar"] == two["seconds"] / ar["seconds"]
    assert found["scan"]["times_bound"] > 1, "no scan can be faster than its traffic"
    assert found["rungs"] == [ROUTER, CONTEXT_SCAN]
    measured, skipped = found["ladder"]
    assert measured["rung"] == ROUTER and measured["cases"][TWO_TOWER]["seconds"] > 0
    assert skipped["skipped"] == "mamba-ssm: no CUDA device" and "cases" not in skipped


@pytest.mark.slow
def test_a_failed_rung_does_not_lose_the_results_of_the_others(tmp_path, monkeypatch):
    """A kernel may fail that never ran on such a GPU. The command reports it and returns false."""
    original, written = steps.measure_trainer, []

    def measure_trainer(config, case, groups, measurement):
        if config.train.recompute_layers == "ME" and case == TWO_TOWER:
            raise RuntimeError("CUDA error: [an illegal address]\nsecond line")
        return original(config, case, groups, measurement)

    def write_results(folder, name, results, picture=None):
        written.append(json.loads(json.dumps(results)))
        return []

    monkeypatch.setattr(steps, "measure_trainer", measure_trainer)
    monkeypatch.setattr(bench_results, "write_results", write_results)
    console = Console(file=io.StringIO(), width=240)
    options = GpuOptions(rungs=("M and E recomputed", ROUTER))
    assert not command.run(tmp_path, quick=True, options=options, console=console)
    assert "failed: two towers: RuntimeError: CUDA error: [an illegal address]" in console.file.getvalue()
    assert [len(found["ladder"]) for found in written] == [0, 1, 2, 2] and all(found["steps"] for found in written)
    failed, measured = written[-1]["ladder"]
    assert "second line" in failed["traceback"] and failed["skipped"] is None and "cases" not in failed
    assert measured["failed"] is None and measured["cases"][TWO_TOWER]["seconds"] > 0


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    for arguments, said in (
        (["--layers", "53"], "--layers: found 53"),
        (["--quick", "--layers", "6"], "--layers: found 6"),
        (["--rungs", "rooter"], "--rungs: found"),
    ):
        assert main(["bench", "gpu", *arguments, "--output", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
