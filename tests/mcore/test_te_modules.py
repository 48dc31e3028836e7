"""Transformer Engine's real layer modules, built without memory: names, shapes and marks.

Needs transformer-engine with its torch extension, and no GPU: nothing is computed here. `pytest -m
te`
"""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_twotower.common import device
from megatron_twotower.config.pipeline_stages import stages_of_rank
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import modules, parallel, transformer_config
from megatron_twotower.model import parameter_map, towers

pytestmark = pytest.mark.te

LAYOUTS = {
    "h100x8": {},
    "one": {"ranks": 1, "expert": 1},
    "split experts": {"ranks": 16, "tensor": 2, "sequence": True, "expert": 4, "expert_tensor": 2},
    "stages": {"ranks": 16, "pipeline": 2, "expert": 8},
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Let modules of transformer-engine 2.11 be built on a CPU.

    They only check that there is a CUDA device; Megatron decides where parameters are. They also
    fork random state around weights that are not initialised, which is not possible for tensors
    without memory.
    """
    from megatron.core.extensions import transformer_engine

    no_tracker = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(transformer_engine, "get_cuda_rng_tracker", lambda: no_tracker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A tensor without memory on a CUDA device would start the driver.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
    monkeypatch.setattr(device, "is_cpu", lambda: True)


def nano(layout, **train):
    name = layout if layout in ("h100x64", "h100x8") else "h100x64"
    config = load_recipe("nano_30b_a3b", [f"parallel={name}"], planning=True)
    settings = dataclasses.replace(config.parallel, **LAYOUTS.get(layout, {}))
    return dataclasses.replace(config, parallel=settings, train=dataclasses.replace(config.train, **train), phases=[])


def te_config(config):
    return transformer_config.transformer_config(config, transformer_impl="transformer_engine")


def uninitialised_te_config(config):
    megatron = te_config(config)
    megatron.perform_initialization = False
    return megatron


def build(config, transformer_impl, *, rank):
    """(context tower, two-tower model) of a stage on one rank, as a few facts about each tensor."""
    with parallel.pretend_rank(config, ranks=config.parallel.ranks, rank=rank) as groups, FakeTensorMode():
        megatron = transformer_config.transformer_config(config, transformer_impl=transformer_impl)
        megatron.perform_initialization = False
        (stage,) = stages_of_rank(config.model, config.parallel, groups.pp.rank())
        context = towers.build_context_tower(config, megatron, groups, stage)
        model = towers.TwoTower(config, megatron, groups, context)
        entries = parameter_map.entries_of_stage(parameter_map.denoiser_entries(config.model, 256), stage)
        ranks = {"experts": 128, "rank": groups.ep.rank(), "ranks": groups.ep.size()}
        wanted = {parameter_map.name_on_rank(entry, **ranks) for entry in entries} - {None}
        return facts(context), facts(model), wanted, {type(part).__name__ for part in model.modules()}


def facts(module):
    """The shape, dtype and marks for gradient sums of every parameter and router bias."""
    return {
        name: (
            tuple(t.shape),
            t.dtype,
            getattr(t, "allreduce", True),
            getattr(t, "sequence_parallel", False),
            t.requires_grad,
        )
        for name, t in parameter_map.canonical_tensors(module).items()
    }


@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed"])
def test_nano_has_the_same_tensors_as_with_local_modules(precision):
    config = nano("h100x64", precision=precision)
    context, model, wanted, found = build(config, "transformer_engine", rank=13)
    own_context, own_model, _, own = build(config, "local", rank=13)
    assert model.keys() == own_model.keys() == wanted
    assert model == own_model and context == own_context
    linears = {"TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear"}
    assert linears | {"TEGroupedMLP", "RMSNorm"} <= found and "SequentialMLP" not in found and "TEGroupedMLP" not in own


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", ["first", "last"])
def test_ranks_of_every_layout_have_the_same_tensors_as_with_local_modules(layout, rank):
    config = nano(layout, precision="bf16")
    number = 0 if rank == "first" else config.parallel.ranks - 1
    of_te, own = (build(config, name, rank=number)[:2] for name in ("transformer_engine", "local"))
    assert of_te == own


def test_split_parameters_are_marked_so_that_gradient_norms_count_each_shard_once():
    config = nano("split experts", precision="bf16")
    with parallel.pretend_rank(config, ranks=16, rank=3) as groups, FakeTensorMode():
        megatron = uninitialised_te_config(config)
        held = parameter_map.canonical_tensors(towers.Tower(config.model, megatron, groups))
    projections = [name for name in held if ".mixer." in name and re.search(r"(proj|qkv|fc[12])\.weight$", name)]
    assert len(projections) > 52
    for name in projections:
        assert held[name].tensor_model_parallel, name
    norms = [name for name in held if name.endswith(".norm.weight") or name == "final_norm.weight"]
    assert len(norms) == 53 and all(held[name].sequence_parallel for name in norms)


def test_the_norms_are_where_the_released_order_has_them():
    """Modulation before the norm in M and *: there the norm is inside the projection."""
    config = nano("h100x64", precision="bf16")
    with parallel.pretend_rank(config, ranks=64, rank=0) as groups, FakeTensorMode():
        megatron = uninitialised_te_config(config)
        tower = towers.Tower(config.model, megatron, groups)
        for kind, layer in zip(config.model.hybrid_override_pattern, tower.layers.values(), strict=True):
            assert isinstance(layer.norm, torch.nn.Identity) == (kind in "M*")


def test_fusions_are_enabled_where_they_apply():
    megatron = transformer_config.transformer_config(
        nano("h100x64", precision="bf16"), transformer_impl="transformer_engine"
    )
    assert megatron.gradient_accumulation_fusion and megatron.moe_permute_fusion and megatron.moe_grouped_gemm
    assert megatron.use_fused_weighted_squared_relu and not megatron.moe_router_fusion, "its router is fp64"
    wide = transformer_config.transformer_config(
        nano("h100x64", precision="bf16", router_dtype="fp32"), transformer_impl="transformer_engine"
    )
    assert wide.moe_router_fusion


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        ("fp8_delayed", "TEDelayedScaling"),
        ("fp8_current", "Float8CurrentScaling"),
        ("fp8_blockwise", "Float8BlockScaling"),
    ],
)
def test_a_precision_is_the_recipe_of_transformer_engine(precision, recipe):
    from megatron.core.fp8_utils import get_fp8_recipe

    found = get_fp8_recipe(
        transformer_config.transformer_config(
            nano("h100x64", precision=precision), transformer_impl="transformer_engine"
        )
    )
    assert type(found).__name__ == recipe
    if precision == "fp8_delayed":
        assert (found.amax_history_len, found.amax_compute_algo, found.margin) == (1024, "max", 0)


def test_a_layer_computes_in_the_precision_of_its_tower(monkeypatch):
    """Which recipe is in force in each layer of both towers, from the outside in."""
    from transformer_engine.pytorch import quantization

    monkeypatch.setattr(quantization, "check_recipe_support", lambda recipe: None)
    monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: (9, 0))
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as state

    def inside(context):
        with context:
            return type(state.get_fp8_recipe()).__name__ if state.is_fp8_enabled() else "bf16"

    delayed = nano("h100x64", precision="fp8_delayed", context_precision="wide")
    with parallel.pretend_rank(delayed, ranks=64, rank=0):
        megatron = transformer_config.transformer_config(delayed, transformer_impl="transformer_engine")
        context = modules.context_tower_config(delayed, megatron)
        with modules.fp8_model_context(megatron):
            assert inside(modules.fp8_layer_context(megatron, 3)) == "TEDelayedScaling"
            assert inside(modules.fp8_layer_context(context, 3)) == "bf16"
            assert inside(modules.fp8_layer_context(megatron, 4)) == "TEDelayedScaling", "what a layer enters it leaves"

    ends = nano("h100x64", precision="fp8_current", context_precision="fp8_blockwise")
    ends = dataclasses.replace(ends, fp8=dataclasses.replace(ends.fp8, first_layers_bf16=1, last_layers_bf16=2))
    with parallel.pretend_rank(ends, ranks=64, rank=0):
        megatron = transformer_config.transformer_config(ends, transformer_impl="transformer_engine")
        context = modules.context_tower_config(ends, megatron)
        with modules.fp8_model_context(megatron):
            layers = [inside(modules.fp8_layer_context(megatron, number)) for number in (0, 1, 49, 50, 51)]
            assert layers == ["bf16", "Float8CurrentScaling", "Float8CurrentScaling", "bf16", "bf16"]
            assert inside(modules.fp8_layer_context(context, 1)) == "Float8BlockScaling"
            assert inside(modules.fp8_layer_context(context, 51)) == "bf16"
