"""Transformer Engine's layer modules change names and settings, and nothing else.

`te_twin.py` imitates its modules here; test_te_modules.py builds the real ones.
"""

import dataclasses
import importlib.metadata
import re

import pytest
import torch
from megatron.core import dist_checkpointing
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import te_twin
from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from helpers.runs import records, train_arguments
from megatron_twotower.checkpoint import files
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import FusionConfig
from megatron_twotower.mcore import modules, parallel
from megatron_twotower.mcore import transformer_config as mcore_transformer_config
from megatron_twotower.model import parameter_map, towers

UNFUSED = FusionConfig(**te_twin.UNFUSED)


def with_transformer_impl(config, name):
    train = dataclasses.replace(config.train, transformer_impl=name)
    return dataclasses.replace(config, train=train, fusion=UNFUSED)


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M"])
@pytest.mark.parametrize("recompute", ["", "ME*-"])
def test_both_implementations_compute_the_same(groups, monkeypatch, pattern, recompute):
    te_twin.install(monkeypatch)
    config = tiny_config(pattern, recompute_layers=recompute)
    found = {}
    for name in ("local", "transformer_engine"):
        model, _ = build_two_tower(with_transformer_impl(config, name), groups)
        hidden = model(random_noisy_batch(config))
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (hidden * upstream).sum().backward()
        grads = {parameter_map.canonical_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = hidden.detach(), grads
    (want, want_grads), (got, got_grads) = found["local"], found["transformer_engine"]
    # Grouped experts read the weights of a token's experts in fp32.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert got_grads.keys() == want_grads.keys() and len(got_grads) > 10
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_norm_of_m_and_attention_is_in_the_projection_alone(groups, monkeypatch):
    te_twin.install(monkeypatch)
    model, _ = build_two_tower(with_transformer_impl(tiny_config("ME*-"), "transformer_engine"), groups)
    norms = [name for name, _ in model.tower.named_parameters() if "norm.weight" in name or "norm_weight" in name]
    assert norms == [
        "layers.0.mixer.norm_weight",  # the gated one inside Mamba
        "layers.0.mixer.in_proj.layer_norm_weight",
        "layers.1.norm.weight",
        "layers.2.mixer.linear_qkv.layer_norm_weight",
        "layers.3.norm.weight",
        "final_norm.weight",
    ]


def test_names_in_the_table_are_canonical():
    model = tiny_config("ME*-").model
    for entry in parameter_map.denoiser_entries(model, 16):
        assert parameter_map.canonical_name(entry.megatron_name) == entry.megatron_name


@pytest.mark.parametrize(
    "order", [("local", "transformer_engine"), pytest.param(("transformer_engine", "local"), marks=pytest.mark.slow)]
)
def test_a_run_resumes_with_the_other_implementation(order, monkeypatch, tmp_path, tiny_data, tiny_backbone):
    te_twin.install(monkeypatch)
    plain = [
        "schedule.kind=constant",
        "schedule.warmup_steps=0",
        "train.validate_every_steps=0",
        "train.checkpoint_every_steps=0",
        *(f"fusion.{name}=false" for name in te_twin.UNFUSED),
    ]

    def go(run, name, steps):
        extra = [*plain, f"train.transformer_impl={name}", f"train.steps={steps}"]
        assert main(train_arguments(tiny_data, tmp_path / run, tiny_backbone, *extra)) == 0

    go("whole", "local", 6)
    for steps, name in zip((3, 6), order, strict=True):
        go("parts", name, steps)
    got, want = records(tmp_path / "parts"), records(tmp_path / "whole")
    for step in range(1, 7):
        assert got[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-5), step
        assert got[step]["grad_norm"] == pytest.approx(want[step]["grad_norm"], rel=1e-4), step
    newest = [files.find_checkpoints(tmp_path / run)[-1] for run in ("parts", "whole")]
    parts, whole = (set(dist_checkpointing.load_tensors_metadata(str(folder))) for folder in newest)
    assert parts == whole


LAYOUTS = {
    "one": {"expert": 1},
    "experts": {"expert": 8},
    "tensor": {"tensor": 2, "sequence": True, "expert": 8, "expert_tensor": 1},
    "split experts": {"tensor": 2, "sequence": True, "expert": 4, "expert_tensor": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_nano_has_the_entries_of_the_table(layout, monkeypatch):
    """Three layers of different kinds and full width: names, shapes and groups of gradient sums."""
    te_twin.install(monkeypatch)
    config = load_recipe("nano_30b_a3b", planning=True)
    model = dataclasses.replace(config.model, hybrid_override_pattern="ME*")
    config = dataclasses.replace(
        config,
        model=model,
        phases=[],
        fusion=UNFUSED,
        parallel=dataclasses.replace(config.parallel, ranks=0, **LAYOUTS[layout]),
    )
    found = []
    for name in ("local", "transformer_engine"):
        with parallel.pretend_rank(config, ranks=8, rank=5) as groups, FakeTensorMode():
            megatron = mcore_transformer_config.transformer_config(config, transformer_impl=name)
            megatron.perform_initialization = False
            module = towers.BackboneModel(config, megatron, groups)
            held = parameter_map.canonical_tensors(module)
            found.append(
                {
                    key: (tuple(t.shape), getattr(t, "allreduce", True), getattr(t, "sequence_parallel", False))
                    for key, t in held.items()
                }
            )
            local = [
                parameter_map.name_on_rank(entry, experts=128, rank=groups.ep.rank(), ranks=groups.ep.size())
                for entry in parameter_map.trained_backbone_entries(model)
            ]
            assert sorted(held) == sorted(name for name in local if name is not None)
    assert found[0] == found[1]


def fields(**train):
    config = tiny_config("ME*-", **train)
    return modules.implementation_fields(config, transformer_impl="transformer_engine")


@pytest.mark.parametrize(
    ("precision", "recipe", "dtype"),
    [
        ("fp32", None, torch.float32),
        ("bf16", None, torch.bfloat16),
        ("fp8_delayed", "delayed", torch.bfloat16),
        ("fp8_current", "tensorwise", torch.bfloat16),
        ("fp8_blockwise", "blockwise", torch.bfloat16),
    ],
)
def test_a_precision_is_megatrons_recipe(precision, recipe, dtype):
    found = fields(precision=precision)
    assert found["params_dtype"] is dtype and found["bf16"] == (dtype is torch.bfloat16)
    assert found.get("fp8_recipe") == recipe and found.get("fp8") == (recipe and "hybrid")
    assert "fp8" not in modules.implementation_fields(tiny_config("M", precision=precision), transformer_impl="local")


def test_megatron_takes_the_fields(monkeypatch):
    """Every setting at once, through the checks of Megatron's own configuration."""
    from megatron.core.transformer import transformer_config

    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *_, **__: True)
    config = tiny_config("ME*-", precision="fp8_current", context_precision="fp8_blockwise")
    config = dataclasses.replace(
        config,
        fusion=UNFUSED,
        fp8=dataclasses.replace(config.fp8, first_layers_bf16=1, last_layers_bf16=2, router_padding=True),
        parallel=dataclasses.replace(config.parallel, expert=2, moe_dispatcher="hybridep"),
    )
    megatron = mcore_transformer_config.transformer_config(config, transformer_impl="transformer_engine")
    assert (megatron.fp8, megatron.fp8_recipe, megatron.fp8_param) == ("hybrid", "tensorwise", False)
    assert megatron.moe_router_padding_for_quantization and megatron.moe_grouped_gemm
    assert (megatron.moe_token_dispatcher_type, megatron.moe_flex_dispatcher_backend) == ("flex", "hybridep")
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    assert [is_first_last_bf16_layer(megatron, number) for number in range(4)] == [True, False, True, True]
    context = modules.context_tower_config(config, megatron)
    assert (context.fp8_recipe, context.fp8_param) == ("blockwise", True)
    assert not context.gradient_accumulation_fusion


def test_a_context_tower_in_wide_precision_is_not_in_fp8():
    megatron = mcore_transformer_config.transformer_config(tiny_config("M"))
    megatron.fp8, megatron.fp8_recipe, megatron.transformer_impl = "hybrid", "delayed", "transformer_engine"
    context = modules.context_tower_config(tiny_config("M", precision="fp8_delayed"), megatron)
    assert context.fp8 is None and megatron.fp8 == "hybrid"


def test_the_router_is_fused_in_fp32_only(monkeypatch):
    config = tiny_config("E")
    for dtype, fused in (("fp32", True), ("fp64", False)):
        train = dataclasses.replace(config.train, router_dtype=dtype)
        found = modules.implementation_fields(
            dataclasses.replace(config, train=train), transformer_impl="transformer_engine"
        )
        assert found["moe_router_fusion"] is fused


def test_auto_chooses_what_is_available(monkeypatch):
    config = tiny_config("M", precision="bf16")
    monkeypatch.setattr(modules, "unavailable", lambda package: "no CUDA device")
    assert modules.choose_transformer_impl(config) == "local"
    monkeypatch.setattr(modules, "unavailable", lambda package: None)
    assert modules.choose_transformer_impl(config) == "transformer_engine"
    assert modules.choose_transformer_impl(tiny_config("M")) == "local", "fp32"
    assert (
        modules.choose_transformer_impl(tiny_config("M", transformer_impl="transformer_engine")) == "transformer_engine"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, "train.transformer_impl: found transformer_engine, but no CUDA"),
        ({"precision": "fp8_current"}, "train.precision: found fp8_current, but no CUDA device"),
        ({"precision": "bf16", "context_precision": "fp8_current"}, "train.context_precision: found fp8_current, but"),
    ],
)
def test_what_is_not_available_is_reported_in_one_line(asked, message, monkeypatch):
    monkeypatch.setattr(modules, "unavailable", lambda package: "no CUDA device")
    with pytest.raises(UserError, match=message) as caught:
        modules.choose_transformer_impl(tiny_config("M", **asked))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "settings", "named"),
    [
        ({"transformer-engine": "2.7.0"}, {"precision": "bf16"}, "transformer-engine: found 2.7.0, expected >=2.9"),
        ({"transformer-engine": "2.7.0"}, {"precision": "fp8_current"}, "transformer-engine: found 2.7.0"),
        ({"transformer-engine": "2.7.0"}, {"precision": "bf16", "transformer_impl": "local"}, None),
        ({"transformer-engine": "2.7.0"}, {"precision": "fp32"}, None),
        ({"mamba-ssm": "2.2.4"}, {"precision": "bf16", "transformer_impl": "local"}, "mamba-ssm: found 2.2.4"),
        ({"causal-conv1d": "1.4.0"}, {"precision": "fp32"}, "causal-conv1d: found 1.4.0"),
        ({"mamba-ssm": "2.3.2.post1"}, {"precision": "bf16", "transformer_impl": "local"}, None),
    ],
)
def test_a_version_that_is_too_old_is_refused_before_anything_is_built(found, settings, named, monkeypatch):
    def version(name):
        if name in found:
            return found[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(modules, "is_cpu", lambda: False)
    config = tiny_config("M", **settings)
    if named is None:
        assert modules.choose_transformer_impl(config) == "local"
        return
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        modules.choose_transformer_impl(config)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(modules, "is_cpu", lambda: True)
    if "fp8" not in settings["precision"]:
        assert modules.choose_transformer_impl(config) == "local", "a login node uses none of them"


@pytest.mark.parametrize(
    ("capability", "precision", "taken"),
    [
        ((8, 0), "fp8_current", False),
        ((8, 9), "fp8_current", True),
        ((8, 9), "fp8_blockwise", False),
        ((9, 0), "fp8_blockwise", True),
    ],
)
def test_fp8_needs_a_device_that_supports_it(capability, precision, taken, monkeypatch):
    monkeypatch.setattr(modules, "unavailable", lambda package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = tiny_config("M", precision=precision)
    if taken:
        assert modules.choose_transformer_impl(config) == "transformer_engine"
        return
    with pytest.raises(UserError, match=rf"train\.precision: found {precision}, but the device has compute capab"):
        modules.choose_transformer_impl(config)


def test_a_dispatcher_that_is_not_available_is_reported_in_one_line(monkeypatch):
    config = tiny_config("E", precision="bf16")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, moe_dispatcher="deepep"))
    missing = {"deep-ep": "deep_ep is not installed"}
    monkeypatch.setattr(modules, "unavailable", missing.get)
    with pytest.raises(UserError, match=re.escape("parallel.moe_dispatcher: found deepep, but deep_ep is")):
        modules.choose_transformer_impl(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.transformer_impl=transformer_engine", "train.transformer_impl: found transformer_engine, but no CUDA"),
        ("train.precision=fp8_current", "expected a multiple of 16 with train.precision fp8_current"),
    ],
)
def test_the_command_reports_it_in_one_line(override, message, tmp_path, tiny_data, tiny_backbone, capsys, monkeypatch):
    monkeypatch.setattr(modules, "unavailable", lambda package: "no CUDA device")
    assert main(train_arguments(tiny_data, tmp_path / "run", tiny_backbone, override)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
