"""The benchmark of denoiser passes at the smallest size: its units, and its arithmetic."""

import json

import pytest
import torch

from helpers.modeling import MASK, random_ids, tiny_model
from megatron_twotower.bench import passes
from megatron_twotower.bench.kernel_classes import CLASSES, TimeByClass
from megatron_twotower.bench.passes import PASS, READ, STEP, break_even
from megatron_twotower.cli import main


def test_the_break_even_is_where_both_take_as_long():
    enough = break_even(16, denoiser=2.0, step=1.0, read=2.5)
    assert 16 / enough * 2.0 + 2.5 == pytest.approx(16 * 1.0)
    assert break_even(4, denoiser=1.0, step=1.0, read=4.0) is None


def test_the_units_are_those_of_generation():
    model, prompt = tiny_model(), random_ids(1, 6)
    work = passes.generation_work(model, block_size=4, mask_id=MASK)
    cache = model.prefill(prompt)
    predicted = work[PASS](cache)
    assert cache.length == 6 and predicted.shape == (1, 4)
    expected = model.denoise_block(torch.full((1, 4), MASK), torch.ones(1), model.prefill(prompt)).argmax(-1)
    assert torch.equal(predicted, expected)
    work[READ](cache)
    assert cache.length == 10
    token = work[STEP](cache)
    whole = torch.cat([prompt, torch.full((1, 5), MASK)], dim=1)
    assert cache.length == 11 and token.item() == model(whole).logits[0, -1].argmax().item()


def test_every_case_is_timed_counted_and_broken_down():
    model = tiny_model()
    found = passes.measure_passes(model, mask_id=MASK, block_size=4, prompt_tokens=6, rounds=2)
    assert [row["case"] for row in found["cases"]] == [STEP, PASS, READ]
    for row in found["cases"]:
        assert 0 < row["minimum_seconds"] <= row["median_seconds"]
        assert row["seconds_by_layer"].keys() == set(model.context_tower.kinds)
        assert row["operations"] > 20 and 0 < row["matrix_products"] < 1
    by_case = {row["case"]: row for row in found["cases"]}
    assert by_case[PASS]["operations"] > by_case[STEP]["operations"]
    ratio = by_case[PASS]["minimum_seconds"] / by_case[STEP]["minimum_seconds"]
    assert found["pass_in_steps"] == pytest.approx(ratio)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.denoiser_tower.layers)


@pytest.mark.parametrize(("gemm", "share"), [(3.0, 0.75), (None, None)])
def test_on_a_device_the_share_of_products_is_that_of_its_kernels(gemm, share, monkeypatch):
    model, prompt = tiny_model(), random_ids(1, 6)
    seconds = dict.fromkeys(CLASSES, 0.0) | ({} if gemm is None else {"GEMM": gemm, "copies": 1.0})
    monkeypatch.setattr(passes, "time_by_class", lambda work: TimeByClass(seconds, {}, 5.0))
    monkeypatch.setattr(passes.common_device, "is_cpu", lambda: False)
    found = passes.profile_operations(model, prompt, passes.generation_work(model, block_size=4, mask_id=MASK)[PASS])
    assert found["matrix_products"] == share and found["operations"] > 20


def test_the_command_prints_and_writes(identity_folder, tmp_path, capsys):
    arguments = ["bench", "passes", "--model", str(identity_folder), "--block", "4", "--rounds", "2", "--output"]
    assert main.main([*arguments, str(tmp_path)]) == 0
    assert "a denoiser pass costs" in capsys.readouterr().out
    assert json.loads((tmp_path / "passes.json").read_text())["block_size"] == 4
    assert main.main([*arguments[:-2], "0", "--output", str(tmp_path)]) == 2
