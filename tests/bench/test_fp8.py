"""The rounding of FP8, element by element, and the comparison of two predictions."""

import json

import pytest
import torch
import torch.nn.functional as F

from helpers.modeling import MASK, random_ids, tiny_model
from megatron_twotower.bench import fp8
from megatron_twotower.bench.fp8 import MASKED, NEXT, compare_logits, summarise
from megatron_twotower.bench.fp8_rounding import E4M3, LARGEST, ROUNDINGS, RoundedLinear, rounded, rounded_tower, scales
from megatron_twotower.cli import main
from megatron_twotower.config.hf_config import model_from_hf
from megatron_twotower.config.precision import CONTEXT_PRECISIONS
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.hf.modeling_nemotron_h_twotower import context_tensors


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_config(model) -> ModelConfig:
    return model_from_hf(model.config.to_dict(), source="test")


def test_a_scale_brings_the_largest_value_to_the_largest_of_e4m3():
    largest = torch.tensor([0.0, 1.0, 448.0, 3.0, 1e-45])
    assert scales(largest, powers_of_two=False)[:4].tolist() == pytest.approx([1.0, 448.0, 1.0, 448 / 3])
    # Down, so that nothing is above it: 448 / 3 = 149.3.
    assert scales(largest, powers_of_two=True)[:4].tolist() == [1.0, 256.0, 1.0, 128.0]
    for powers_of_two in (False, True):
        assert scales(largest, powers_of_two=powers_of_two).isfinite().all()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_is_within_half_a_step_and_is_done_once(name):
    rounding, x = ROUNDINGS[name], draw(200, 300)
    narrow = rounded(x, rounding.weights, powers_of_two=rounding.powers_of_two)
    assert narrow.dtype == torch.float32 and narrow.shape == x.shape
    # Three bits after the binary point: half a step is a sixteenth; below the normal numbers, half
    # of the least one.
    step = x.abs().max() / LARGEST * 2**-10 * (2 if rounding.powers_of_two else 1)
    assert ((narrow - x).abs() <= x.abs() / 16 + step).all() and not torch.equal(narrow, x)
    if rounding.powers_of_two:
        assert torch.equal(rounded(narrow, rounding.weights, powers_of_two=True), narrow)


def test_values_of_e4m3_do_not_change():
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()].unsqueeze(0)
    assert torch.equal(rounded(every, None, powers_of_two=False), every)


def test_zeros_stay_zeros():
    for rounding in ROUNDINGS.values():
        for block in (rounding.weights, rounding.inputs):
            assert not rounded(torch.zeros(3, 130), block, powers_of_two=rounding.powers_of_two).any()


def test_a_block_has_a_scale_of_its_own():
    """Small values next to a large one are lost if they share its scale."""
    x = torch.full((256, 256), 1e-5)
    x[0, 0] = 1e3
    one, many = (rounded(x, block, powers_of_two=False) for block in (None, (128, 128)))
    assert not one[128:, 128:].any() and not many[1:128, 1:128].any()
    torch.testing.assert_close(many[128:, :], x[128:, :], rtol=0.04, atol=0)
    rows = rounded(x, (1, 128), powers_of_two=True)
    torch.testing.assert_close(rows[1:], x[1:], rtol=0.07, atol=0)
    assert not rows[0, 1:128].any() and rows[0, 128:].all()


def test_blocks_at_the_edge_are_smaller():
    x = draw(130, 150)
    x[:128, :128] *= 1e6
    narrow = rounded(x, (128, 128), powers_of_two=True)
    assert torch.equal(narrow[128:, 128:], rounded(x[128:, 128:], None, powers_of_two=True))


def test_the_precisions_are_those_of_the_context_tower():
    assert ROUNDINGS.keys() == CONTEXT_PRECISIONS.keys() - {"wide"}


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_projections_and_experts_are_rounded_and_nothing_else(name, inputs):
    model, rounding = tiny_model(dtype=torch.float32), ROUNDINGS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    narrow = rounded_tower(model.context_tower, model_config(model), rounding, inputs=inputs)
    own = dict(model.context_tower.named_parameters())
    changed = {key for key, value in narrow.tower.named_parameters() if value is not own[key]}
    assert changed == {f"{key}.weight" for key, module in narrow.tower.named_modules() if type(module) is RoundedLinear}
    assert changed == {
        f"{key}.weight" for key, module in model.context_tower.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert narrow.elements == sum(own[key].numel() for key in changed) < narrow.total
    assert 0.005 < narrow.error < 0.05
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    key = next(key for key in changed if key.endswith("out_proj.weight"))
    expected = rounded(own[key], rounding.weights, powers_of_two=rounding.powers_of_two)
    linear, x = narrow.tower.get_submodule(key.removesuffix(".weight")), draw(3, own[key].shape[1], seed=2)
    assert torch.equal(linear.weight, expected)
    if inputs:
        x = rounded(x, rounding.inputs, powers_of_two=rounding.powers_of_two)
    assert torch.equal(linear(x), F.linear(x, expected))


def test_queries_keys_and_values_are_one_matrix():
    """A large value of q decides on the scale of k, too."""
    model = tiny_model(dtype=torch.float32)
    number = model.context_tower.kinds.index("full_attention")
    with torch.no_grad():
        model.context_tower.layers[number].mixer.q_proj.weight[0, 0] = 1e6
    narrow = rounded_tower(model.context_tower, model_config(model), ROUNDINGS["fp8_current"], inputs=False)
    assert not narrow.tower.layers[number].mixer.k_proj.weight.any()


def test_two_predictions_are_compared():
    wide, other = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    targets, counted = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[True, True, False], [True, False, False]])
    found = summarise(compare_logits(wide, other, targets, counted))
    p, q = wide[counted].log_softmax(-1).double(), other[counted].log_softmax(-1).double()
    own = targets[counted].unsqueeze(-1)
    assert found["tokens"] == 3
    assert found["wide"] == pytest.approx(-p.gather(-1, own).mean().item(), rel=1e-5)
    assert found["difference"] == pytest.approx((p - q).gather(-1, own).mean().item(), rel=1e-4)
    assert found["kl"] == pytest.approx(F.kl_div(q, p, reduction="batchmean", log_target=True).item(), rel=1e-5)
    assert found["same_choice"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found["largest_logit_error"] == pytest.approx((wide - other)[counted].abs().max().item())
    same = summarise(compare_logits(wide, wide, targets, counted))
    assert same["kl"] == same["difference"] == same["largest_logit_error"] == 0.0 and same["same_choice"] == 1.0


def test_the_same_tower_changes_nothing_and_a_rounded_one_reaches_the_denoiser():
    model, rows = tiny_model(dtype=torch.float32), random_ids(2, 16)
    uniform = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0))
    settings = {"block": 4, "levels": (0.5, 1.0), "mask_id": MASK}
    own = model.context_tower
    nothing = fp8.compare_masked_tokens(model, own, rows, uniform, **settings)
    assert nothing.largest == 0.0 and fp8.compare_next_token(model, own, rows).largest == 0.0
    assert int(nothing.count.sum()) == int((uniform[:, 4:] < 0.5).sum()) + uniform[:, 4:].numel()
    narrow = rounded_tower(own, model_config(model), ROUNDINGS["fp8_current"], inputs=True)
    reached = fp8.compare_masked_tokens(model, narrow.tower, rows, uniform, **settings)
    for sums in (fp8.compare_next_token(model, narrow.tower, rows), reached):
        assert sums.largest > 0 and (sums.kl > 0).all()
    assert model.context_tower is own


def test_the_command_prints_and_writes(identity_folder, tiny_data, tmp_path, capsys):
    arguments = ["bench", "fp8", "--model", str(identity_folder), "--data", str(tiny_data), "--output", str(tmp_path)]
    assert main.main([*arguments, "--quick"]) == 0
    said = capsys.readouterr().out
    assert "emulated FP8" in said and "not compared (no CUDA device)" in said
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert found["emulated"] and [row["of"] for row in found["rows"]] == [NEXT, MASKED] * 4
    assert main.main([*arguments, "--sequences", "1"]) == 2


def test_a_backbone_alone_has_no_denoiser_to_measure():
    backbone = recipes_folder() / "backbones" / "small"
    model, _, denoiser = fp8.open_model(backbone)
    assert not denoiser and model.context_lm_head.weight.dtype == torch.float32
    for name, tensor in context_tensors(backbone):
        assert torch.equal(model.state_dict()[name], tensor.float())


@pytest.mark.te
def test_the_arithmetic_is_transformer_engine_s_own():
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import CurrentScalingQuantizerRef

    for powers_of_two in (False, True):
        theirs = CurrentScalingQuantizerRef(E4M3, columnwise=False, pow_2_scales=powers_of_two)
        for seed, x in enumerate((draw(64, 96), 1e-4 * draw(7, 5), torch.zeros(3, 3), draw(40, 8).bfloat16())):
            narrow, inverse, _, _ = theirs._quantize(x)
            expected = narrow.float() * inverse
            assert torch.equal(rounded(x, None, powers_of_two=powers_of_two), expected), (seed, powers_of_two)


@pytest.mark.te
def test_quantizers_of_transformer_engine_scale_as_the_rounding_does():
    from megatron_twotower.mcore import modules

    for name, rounding in ROUNDINGS.items():
        quantizer = modules._quantizer(name, torch.device("cpu"))
        assert quantizer.force_pow_2_scales == rounding.powers_of_two and quantizer.amax_epsilon == 0.0
        if rounding.weights is not None:
            assert (quantizer.block_len, quantizer.block_scaling_dim) == (rounding.weights[0], 2)
