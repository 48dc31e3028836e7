"""The spec of Transformer Engine with its real modules, built without memory: names, shapes, marks, and their numbers.

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
    """Modules of transformer-engine 2.11 ask only whether there is a CUDA device; parameters go where Megatron says.

    They fork random state around weights that are not initialised, which tensors without memory
    cannot.
    """
    from megatron.core.extensions import transformer_engine

    no_tracker = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(transformer_engine, "get_cuda_rng_tracker", lambda: no_tracker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Tensors without memory would start the driver for one that is on a device.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
    monkeypatch.setattr(device, "is_cpu", lambda: True)


def nano(layout, **train):
    name = layout if layout in ("h100x64", "h100x8") else "h100x64"
    config = load_recipe("nano_30b_a3b", [f"parallel={name}"], planning=True)
    settings = dataclasses.replace(config.parallel, **LAYOUTS.get(layout, {}))
    return dataclasses.replace(config, parallel=settings, train=dataclasses.replace(config.train, **train), phases=[])


def built_by_te(config):
    megatron = transformer_config.transformer_config(config, served="transformer_engine")
    megatron.perform_initialization = False
    return megatron


def build(config, served, *, rank):
    """(context tower, two-tower model) of a stage on one rank, as a few facts about each of their tensors."""
    with parallel.pretend_rank(config, ranks=config.parallel.ranks, rank=rank) as groups, FakeTensorMode():
        megatron = transformer_config.transformer_config(config, served=served)
        megatron.perform_initialization = False
        (stage,) = stages_of_rank(config.model, config.parallel, groups.pp.rank())
        context = towers.build_context_tower(config, megatron, groups, stage)
        model = towers.TwoTower(config, megatron, groups, context)
        entries = parameter_map.entries_of_stage(parameter_map.denoiser_entries(config.model, 256), stage)
        ranks = {"experts": 128, "rank": groups.ep.rank(), "ranks": groups.ep.size()}
        wanted = {parameter_map.local_expert_name(entry, **ranks) for entry in entries} - {None}
        return facts(context), facts(model), wanted, {type(part).__name__ for part in model.modules()}


def facts(module):
    """Of every parameter and router bias: shape, dtype, and the marks by which gradients are summed over ranks."""
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
def test_all_of_nano_holds_what_its_own_modules_hold(precision):
    config = nano("h100x64", precision=precision)
    context, model, wanted, found = build(config, "transformer_engine", rank=13)
    own_context, own_model, _, own = build(config, "local", rank=13)
    assert model.keys() == own_model.keys() == wanted
    assert model == own_model and context == own_context
    linears = {"TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear"}
    assert linears | {"TEGroupedMLP", "RMSNorm"} <= found and "SequentialMLP" not in found and "TEGroupedMLP" not in own


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", ["first", "last"])
def test_ranks_of_every_layout_hold_what_their_own_modules_hold(layout, rank):
    config = nano(layout, precision="bf16")
    number = 0 if rank == "first" else config.parallel.ranks - 1
    of_te, own = (build(config, served, rank=number)[:2] for served in ("transformer_engine", "local"))
    assert of_te == own


def test_what_is_split_is_marked_so_that_norms_of_gradients_count_every_part_once():
    config = nano("split experts", precision="bf16")
    with parallel.pretend_rank(config, ranks=16, rank=3) as groups, FakeTensorMode():
        megatron = built_by_te(config)
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
        megatron = built_by_te(config)
        tower = towers.Tower(config.model, megatron, groups)
        for kind, layer in zip(config.model.hybrid_override_pattern, tower.layers.values(), strict=True):
            assert isinstance(layer.norm, torch.nn.Identity) == (kind in "M*")


def test_fusions_are_megatrons_where_they_hold():
    megatron = transformer_config.transformer_config(nano("h100x64", precision="bf16"), served="transformer_engine")
    assert megatron.gradient_accumulation_fusion and megatron.moe_permute_fusion and megatron.moe_grouped_gemm
    assert megatron.use_fused_weighted_squared_relu and not megatron.moe_router_fusion, "its router is fp64"
    wide = transformer_config.transformer_config(
        nano("h100x64", precision="bf16", router_dtype="fp32"), served="transformer_engine"
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
        transformer_config.transformer_config(nano("h100x64", precision=precision), served="transformer_engine")
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
        megatron = transformer_config.transformer_config(delayed, served="transformer_engine")
        context = modules.frozen(delayed, megatron)
        with modules.model_computing(megatron):
            assert inside(modules.computing(megatron, 3)) == "TEDelayedScaling"
            assert inside(modules.computing(context, 3)) == "bf16"
            assert inside(modules.computing(megatron, 4)) == "TEDelayedScaling", "what a layer enters it leaves"

    ends = nano("h100x64", precision="fp8_current", context_precision="fp8_blockwise")
    ends = dataclasses.replace(ends, fp8=dataclasses.replace(ends.fp8, first_layers_bf16=1, last_layers_bf16=2))
    with parallel.pretend_rank(ends, ranks=64, rank=0):
        megatron = transformer_config.transformer_config(ends, served="transformer_engine")
        context = modules.frozen(ends, megatron)
        with modules.model_computing(megatron):
            layers = [inside(modules.computing(megatron, number)) for number in (0, 1, 49, 50, 51)]
            assert layers == ["bf16", "Float8CurrentScaling", "Float8CurrentScaling", "bf16", "bf16"]
            assert inside(modules.computing(context, 1)) == "Float8BlockScaling"
            assert inside(modules.computing(context, 51)) == "bf16"
