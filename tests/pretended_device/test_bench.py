"""The benchmarks on a pretended GPU: no operation mixes devices, and no step waits."""

import io

import pytest
import torch
from rich.console import Console

from helpers.modeling import MASK, random_ids, tiny_fields, tiny_model
from helpers.pretended_device import pretended_cuda
from megatron_twotower.bench import concatenated, fp8, measure, ops, passes, step
from megatron_twotower.bench.gpu import command as gpu
from megatron_twotower.config.hf_config import model_from_hf
from megatron_twotower.ops.attention import block_attention_ref


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_steps_of_the_real_layers(console, tmp_path):
    rungs = ("M and E recomputed",)
    with pretended_cuda() as waits:
        assert gpu.run(tmp_path, quick=True, options=gpu.GpuOptions(rungs=rungs), console=console)
    assert "failed" not in console.file.getvalue()
    # Weights are loaded once into each model; one number is read at the end.
    places = {place.partition(": ")[2] for place in waits.counted("ours")}
    assert places == {"load.load_weights", "steps.busiest_expert"}


@pytest.mark.slow
def test_alternating_steps_and_noise_draws(console, tmp_path, monkeypatch):
    # FlexAttention is compiled there, which cannot be pretended.
    monkeypatch.setattr(concatenated, "flex_block_attention", block_attention_ref)
    with pretended_cuda():
        step.run(tmp_path, threads=1, quick=True, console=console)
    assert (tmp_path / "step.json").is_file()


@pytest.mark.slow
def test_operations_and_their_baselines(console, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "in_new_process", lambda function, *arguments, preload: function(*arguments))
    with pretended_cuda():
        ops.run(tmp_path, blocks=[8], threads=1, quick=True, repeats=1, budget_seconds=0.0, console=console)
    assert (tmp_path / "ops.json").is_file()


def test_passes_and_fp8(monkeypatch):
    monkeypatch.setattr(passes, "PROFILED_RUNS", 1)
    config = model_from_hf(tiny_fields(), source="config.json")
    options = fp8.Fp8Options(sequences=2, length_tokens=16, block_size_tokens=8, levels=(1.0,))
    with pretended_cuda():
        model = tiny_model(dtype=torch.float32).to("cuda")
        found = passes.measure_passes(model, mask_id=MASK, block_size=4, prompt_tokens=6, rounds=1)
        rows = fp8.measure_fp8(model, config, random_ids(2, 16), options=options, mask_id=MASK, denoiser=True)
    assert len(found["cases"]) == 3 and len(rows) == 8
