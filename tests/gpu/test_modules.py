"""Transformer Engine's modules against Megatron's own on a CUDA device: layers, FP8, and runs.

Not run on a GPU yet. `pytest -m gpu tests/gpu/test_modules.py`
"""

import dataclasses
import math

import pytest
import torch

from helpers.models import TINY, build_two_tower, random_noisy_batch, tiny_config, write_backbone
from helpers.runs import losses, train_arguments
from megatron_twotower import doctor
from megatron_twotower.cli.main import main
from megatron_twotower.common import device
from megatron_twotower.config.schema import Fp8Config, FusionConfig
from megatron_twotower.model import parameter_map

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.is_cpu(), reason="needs a CUDA device")]

# Every side of every matrix is a multiple of 16: FP8 takes it.
MODEL = dataclasses.replace(
    TINY,
    vocab_size=512,
    hidden_size=64,
    head_dim=16,
    mamba_num_heads=16,
    mamba_head_dim=16,
    ssm_state_size=16,
    chunk_size=32,
    intermediate_size=128,
    n_routed_experts=8,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=64,
)
FP8 = ["fp8_delayed", "fp8_current", "fp8_blockwise"]
UNFUSED = FusionConfig(gradient_accumulation=False)  # there is no buffer to sum into without Megatron's DDP


def config_of(pattern, *, served, fusion=UNFUSED, **train):
    config = tiny_config(pattern, block=16, length=64, transformer_impl=served, **train)
    model = dataclasses.replace(MODEL, hybrid_override_pattern=pattern)
    router = dataclasses.replace(config.train, router_dtype="fp32")
    return dataclasses.replace(config, model=model, train=router, fusion=fusion)


def to_device(batch):
    moved = {
        field.name: value.to(device.device())
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


def computed(config, groups, *, dtype):
    """Final hidden states, and every gradient by its name in the parameter map."""
    model, _ = build_two_tower(config, groups, dtype=dtype)
    hidden = model(to_device(random_noisy_batch(config)))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(hidden.shape, generator=generator).to(hidden)
    (hidden * upstream).float().sum().backward()
    grads = {parameter_map.canonical_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads


def error(got, want):
    """The error of a tensor, relative to its norm."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M"])
@pytest.mark.parametrize("recompute", ["", "ME*-"])
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("fp32", torch.float32, 2e-3), ("bf16", torch.bfloat16, 3e-2)]
)
def test_both_specs_compute_the_same(groups, pattern, recompute, precision, dtype, tolerance):
    want, want_grads = computed(
        config_of(pattern, served="local", precision=precision, recompute_layers=recompute), groups, dtype=dtype
    )
    got, got_grads = computed(
        config_of(pattern, served="transformer_engine", precision=precision, recompute_layers=recompute),
        groups,
        dtype=dtype,
    )
    assert error(got, want) < tolerance
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert error(got_grads[name], grad) < 5 * tolerance, name


@pytest.mark.parametrize("fusion", ["permutation", "router", "squared_relu"])
def test_a_fusion_changes_nothing(groups, fusion):
    plain = dataclasses.replace(UNFUSED, permutation=False, router=False, squared_relu=False)
    fused = dataclasses.replace(plain, **{fusion: True})
    of = {"served": "transformer_engine", "precision": "fp32"}
    want, want_grads = computed(config_of("E", fusion=plain, **of), groups, dtype=torch.float32)
    got, got_grads = computed(config_of("E", fusion=fused, **of), groups, dtype=torch.float32)
    assert error(got, want) < 1e-3
    for name, grad in want_grads.items():
        assert error(got_grads[name], grad) < 5e-3, name


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-"])
def test_fp8_is_near_bf16(groups, precision, pattern):
    of = {"served": "transformer_engine"}
    want, _ = computed(config_of(pattern, precision="bf16", **of), groups, dtype=torch.bfloat16)
    got, grads = computed(config_of(pattern, precision=precision, **of), groups, dtype=torch.bfloat16)
    assert 0 < error(got, want) < 0.15
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


def test_layers_at_the_ends_stay_in_bf16(groups):
    """If every layer is at an end, the result with FP8 is that of bf16, bit for bit."""
    of = {"served": "transformer_engine"}
    want, _ = computed(config_of("M*", precision="bf16", **of), groups, dtype=torch.bfloat16)
    config = config_of("M*", precision="fp8_current", **of)
    ends = dataclasses.replace(config, fp8=Fp8Config(first_layers_bf16=1, last_layers_bf16=1))
    got, _ = computed(ends, groups, dtype=torch.bfloat16)
    assert torch.equal(got, want)


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_blockwise"])
@pytest.mark.parametrize("trained", ["bf16", "fp8_delayed"])
def test_a_frozen_tower_in_fp8_stores_its_weights_in_fp8(groups, precision, trained):
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    of = {"served": "transformer_engine", "precision": trained}
    config = config_of("M*E-", context_precision=precision, **of)
    wide = config_of("M*E-", **of)
    batch = to_device(random_noisy_batch(config))
    found = []
    for each in (wide, config):
        model, _ = build_two_tower(each, groups, dtype=torch.bfloat16)
        with torch.no_grad():
            found.append((model.context, model(batch)))
    (wide_tower, want), (tower, got) = found
    projections = [p for name, p in tower.layers.named_parameters() if name.endswith("weight") and p.dim() == 2]
    quantised = [p for p in projections if isinstance(p, QuantizedTensor)]
    assert len(quantised) >= 8 and not any(isinstance(p, QuantizedTensor) for p in wide_tower.parameters())
    assert all(p.requires_grad is False for p in tower.parameters())
    assert 0 < error(got, want) < 0.15


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder with a NemotronH of MODEL's shape and random weights."""
    model = dataclasses.replace(MODEL, hybrid_override_pattern="ME*-M")
    return write_backbone(tmp_path_factory.mktemp("backbone") / "hf", model)


PLAIN = [
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    "train.validate_every_steps=0",
    "train.checkpoint_every_steps=0",
]


def go(data, run, backbone, steps, *extra):
    assert main(train_arguments(data, run, backbone, *PLAIN, f"train.steps={steps}", *extra)) == 0
    return losses(run)


def test_a_run_resumes_with_the_other_modules(tmp_path, tiny_data, backbone):
    impl = "train.transformer_impl"
    want = go(tiny_data, tmp_path / "whole", backbone, 6, f"{impl}=local")
    for first, second in (("local", "transformer_engine"), ("transformer_engine", "local")):
        run = tmp_path / first
        go(tiny_data, run, backbone, 3, f"{impl}={first}")
        got = go(tiny_data, run, backbone, 6, f"{impl}={second}")
        assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", *FP8])
def test_curves_stay_near_that_of_fp32(tmp_path, tiny_data, backbone, precision):
    want = go(tiny_data, tmp_path / "fp32", backbone, 60)
    got = go(tiny_data, tmp_path / precision, backbone, 60, f"train.precision={precision}")
    last = list(want)[-20:]
    assert all(math.isfinite(loss) for loss in got.values())
    assert sum(got[s] for s in last) == pytest.approx(sum(want[s] for s in last), rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", *FP8])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, tiny_data, backbone, precision):
    extra = [f"train.precision={precision}", "fp8.history_steps=16"]
    want = go(tiny_data, tmp_path / "whole", backbone, 8, *extra)
    go(tiny_data, tmp_path / "parts", backbone, 4, *extra)
    assert go(tiny_data, tmp_path / "parts", backbone, 8, *extra) == pytest.approx(want, rel=1e-4)


def test_the_fused_optimizer_is_transformer_engines():
    assert doctor.diagnose()[-1].implementation == "FusedAdam of transformer_engine"


def test_gradients_that_go_straight_into_the_sums_are_the_same(tmp_path, tiny_data, backbone):
    impl = ["train.transformer_impl=transformer_engine", "data.micro_batch_size=2"]
    want = go(tiny_data, tmp_path / "plain", backbone, 4, *impl, "fusion.gradient_accumulation=false")
    got = go(tiny_data, tmp_path / "fused", backbone, 4, *impl, "fusion.gradient_accumulation=true")
    assert got == pytest.approx(want, rel=1e-3)
