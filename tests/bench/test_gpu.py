"""The measurements of one GPU, whole at a tiny size on the CPU, and what they are computed from."""

import contextlib
import importlib
import io
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_twotower.bench import gpu, gpu_tables, kernel_classes, step
from megatron_twotower.bench.gpu import LADDER, Settings, card_named, fitting, rungs_of
from megatron_twotower.bench.gpu_scan import scan_traffic
from megatron_twotower.bench.kernel_classes import class_of, split
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.plan.layout import ACCELERATORS

ROUTER, CONTEXT_SCAN = "router in fp64", "context tower's scan in torch"


def test_the_recipe_is_the_real_model_at_full_width():
    config, real = load_recipe("bench_gpu"), load_recipe("nano_30b_a3b", planning=True)
    assert config.model == real.model and config.model.n_routed_experts == 128
    assert config.data.sequence_length_tokens == real.data.sequence_length_tokens == 8192
    assert config.train.precision == "bf16" and config.noise.block_size_tokens == 16


@pytest.mark.parametrize(("card", "pattern"), [("h100", "MEMEM*"), ("h200", "MEMEM*EMEM")])
def test_as_many_layers_as_the_plan_says_fit(card, pattern):
    config = fitting(load_recipe("bench_gpu"), layers=0, memory_bytes=ACCELERATORS[card].memory_bytes)
    assert config.model.hybrid_override_pattern == pattern
    assert set("ME*") <= set(pattern), "every kind of layer"


def test_layers_that_are_asked_for():
    config = load_recipe("bench_gpu")
    assert fitting(config, layers=3, memory_bytes=0).model.hybrid_override_pattern == "MEM"
    with pytest.raises(UserError, match="--layers: found 53, expected at most the 52"):
        fitting(config, layers=53, memory_bytes=0)
    with pytest.raises(UserError, match=r"memory: found 8\.0 GiB, expected .* for one layer"):
        fitting(config, layers=0, memory_bytes=8 * 2**30)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_peak_is_that_of_the_very_card(name, known):
    assert card_named(name) == (known and ACCELERATORS[known])


NAMES = {
    "scan": [
        "_chunk_scan_fwd_kernel",
        "_chunk_state_fwd_kernel",
        "_state_passing_fwd_kernel",
        "_bmm_chunk_fwd_kernel",
        "_chunk_cumsum_fwd_kernel",
        "_TwoStreamScanBackward",
    ],
    "convolution": ["void causal_conv1d_channellast_fwd_kernel<...>", "causal_conv1d_bwd_kernel"],
    "attention": [
        "triton_tem_fused_flex_attention_0",
        "triton_tem_fused_flex_attention_backward_1",
        "triton_tem_fused_0",
        "void pytorch_flash::flash_fwd_kernel<...>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>",
    ],
    "GEMM": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32",
        "aten::bmm",
        "void gemvNSP_kernel<...>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>",
    ],
    "communication": ["ncclDevKernel_AllReduce_Sum_f32_RING_LL", "ncclDevKernel_ReduceScatter_Sum_f32"],
    "copies": ["Memcpy DtoD (Device -> Device)", "Memset (Device)", "aten::copy_"],
    "norm and elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, ...>",
        "triton_poi_fused_silu_0",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel",
    ],
    "optimizer": ["void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor>", "aten::_fused_adamw_"],
    "routing": ["_permute_kernel", "_unpermute_bwd_with_merging_probs_kernel", "void at::native::sbtopk::gatherTopK"],
    "other": ["a_kernel_of_tomorrow"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kernels_have_their_class(kind, name):
    assert class_of(name) == kind


OUR_KERNELS = {
    "scan_triton_kernels": ("scan", 5),
    "convolution_triton": ("convolution", 2),
    "norm_triton": ("norm and elementwise", 2),
    "cross_entropy_triton": ("norm and elementwise", 1),
    "modulation_triton": ("norm and elementwise", 2),
}


@pytest.mark.parametrize("module", OUR_KERNELS)
def test_every_kernel_of_this_project_has_its_class(module):
    pytest.importorskip("triton")
    (kind, count), found = OUR_KERNELS[module], vars(importlib.import_module(f"megatron_twotower.ops.{module}"))
    kernels = [name for name in found if name.endswith("_kernel")]
    assert len(kernels) == count
    assert {class_of(name) for name in kernels} == {kind}


def event(key, *, device=None, cpu=0.0, cuda=False, annotation=False):
    return SimpleNamespace(
        key=key,
        self_device_time_total=device,
        self_cpu_time_total=cpu,
        is_user_annotation=annotation,
        device_type=DeviceType.CUDA if cuda else DeviceType.CPU,
    )


def test_on_a_device_only_kernels_count_and_each_once():
    events = [
        event("aten::mm", device=7e6, cpu=1e6),  # carries the time of the kernel that it starts
        event("nvjet_tst", device=7e6, cuda=True),
        event("ncclDevKernel_AllReduce", device=1e6, cuda=True),
        event("Optimizer.step", device=8e6, cuda=True, annotation=True),
        event("mystery", device=2e6, cuda=True),
    ]
    found = split(events, elapsed=20.0, on_device=True)
    assert {name: value for name, value in found.seconds.items() if value} == {
        "GEMM": 7.0,
        "communication": 1.0,
        "other": 2.0,
    }
    assert found.unnamed == {"mystery": 2.0} and found.busy == 0.5
    assert split(events, elapsed=20.0, on_device=False).seconds["GEMM"] == 1.0


def test_a_device_is_profiled_by_its_kernels_alone(monkeypatch):
    asked = []

    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)
            asked.append(activities)

        def key_averages(self):
            return [event("nvjet_tst", device=7e6, cuda=True), event("cudaLaunchKernel", cpu=9e6)]

    monkeypatch.setattr(kernel_classes, "profile", Profile)
    monkeypatch.setattr(kernel_classes.host, "is_host", lambda: False)
    found = kernel_classes.time_by_class(lambda: None)
    assert asked == [[ProfilerActivity.CUDA]]
    assert sum(found.seconds.values()) == found.seconds["GEMM"] == 7.0 and found.elapsed < 5.0


def test_the_least_traffic_of_a_scan_at_the_widths_of_nano():
    """By hand, in bytes of a position: x 8192, B or C 2048, dt 256, and a state of 16 KiB for each of 128."""
    model = load_recipe("bench_gpu").model
    states = 64 * 64 * 128 * 4 // 128
    forward = 3 * 8192 + 3 * 2048 + 2 * 256 + states
    backward = 4 * 8192 + 5 * 2048 + 3 * 256 + states
    assert scan_traffic(model, length=8192, block=16, element_bytes=2) == 8192 * (forward + backward)
    # What ops/scan_triton.py says that its kernels move, in units of x: 5.75 and 9, of which 1.75
    # twice.
    assert (forward - 512) / 8192 == 5.75 and (backward - 768) / 8192 == 9 - 1.75


def test_weights_drawn_on_the_device_are_keyed_by_name():
    model = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES).model
    first, again, other = (gpu.random_on_device(model, seed=seed) for seed in (0, 0, 1))
    shapes = hf_shapes(backbone_entries(model), model)
    for name, shape in shapes.items():
        assert first(name).shape == shape and torch.equal(first(name), again(name))
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    assert all(not torch.equal(first(name), other(name)) for name in matrices)
    assert not torch.equal(*(first(name)[:4, :4] for name in matrices[:2]))


def test_every_rung_can_be_climbed():
    """Its keys and values are those of a recipe, and it changes something."""
    config = load_recipe("bench_gpu")
    for rung in LADDER:
        found = gpu.changed(config, rung, recipe="bench_gpu", overrides=[])
        assert not isinstance(found, str), (rung, found)
        assert (found != config) == bool(rung.overrides)
        assert bool(rung.overrides) != bool(rung.without)
    assert len({rung.name for rung in LADDER}) == len(LADDER)
    same = gpu.Rung("as it is", ("train.precision=bf16",))
    assert gpu.changed(config, same, recipe="bench_gpu", overrides=[]) == "configured so"
    wrong = gpu.Rung("wrong", ("noise.block_size_tokens=48",))
    assert "expected a multiple" in gpu.changed(config, wrong, recipe="bench_gpu", overrides=[])


def test_which_rungs_are_measured():
    assert rungs_of(Settings()) == [] and rungs_of(Settings(ladder=True)) == list(LADDER)
    assert [rung.name for rung in rungs_of(Settings(rungs=(ROUTER,)))] == [ROUTER]
    with pytest.raises(UserError, match="--rungs: found 'rooter', expected some of"):
        rungs_of(Settings(rungs=("rooter",)))


def test_a_quick_run_measures_everything_and_says_that_it_was_a_cpu(tmp_path):
    console = Console(file=io.StringIO(), width=240)
    assert gpu.run(tmp_path, quick=True, wanted=Settings(rungs=(ROUTER, CONTEXT_SCAN)), console=console)
    text, found = console.file.getvalue(), json.loads((tmp_path / "gpu.json").read_text())
    assert text.count(gpu_tables.ON_A_CPU) == 2 and gpu_tables.FORMULA[:40] in text
    assert not found["on_a_gpu"] and found["pattern"] == "ME*-M" and found["peak_flops"] is None
    assert set(found["packages"].values()) == {"no CUDA device"}
    ar, two = found["steps"]
    assert (ar["case"], two["case"]) == (step.AR, step.TWO_TOWER)
    config = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES)
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
    climbed, passed_over = found["ladder"]
    assert climbed["rung"] == ROUTER and climbed["cases"][step.TWO_TOWER]["seconds"] > 0
    assert passed_over["skipped"] == "mamba-ssm: no CUDA device" and "cases" not in passed_over


def test_memory_that_runs_out_ends_a_rung_and_not_the_run(groups, monkeypatch):
    config = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES)

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(step, "trainer_of", full)
    row = gpu.measure_rung(config, gpu.Rung("large", ("data.micro_batch_size=2",)), gpu.QUICK, groups)
    assert row["cases"] == dict.fromkeys(gpu.OBJECTIVES)
    base = {"classes": {}, "tokens": 1, "seconds": 1.0, "peak_bytes": 1}
    figures = {"steps": [base | {"case": name} for name in gpu.OBJECTIVES], "ladder": [row], "on_a_gpu": True}
    figures |= {"pattern": "M", "experts": 4, "length": 64, "block": 16, "precision": "bf16"}
    screen = io.StringIO()
    Console(file=screen, width=200).print(gpu_tables.ladder_table(figures))
    assert screen.getvalue().count("out of memory") == 2


def test_what_cannot_be_built_ends_a_rung_and_not_the_run(groups, monkeypatch):
    def refused(*_, **__):
        raise UserError("train.precision: found fp4")

    monkeypatch.setattr(step, "trainer_of", refused)
    config = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES)
    row = gpu.measure_rung(config, gpu.Rung("narrow", ("train.precision=bf16",)), gpu.QUICK, groups)
    assert row["skipped"] == "train.precision: found fp4" and "cases" not in row


def test_a_rung_that_fails_loses_nothing_of_the_others(tmp_path, monkeypatch):
    """As a kernel does that was never run on such a card: the command says so, and does not say that all was done."""
    measured, written = gpu.look_at, []

    def look_at(config, name, groups, look):
        if config.train.recompute_layers == "ME" and name == step.TWO_TOWER:
            raise RuntimeError("CUDA error: [an illegal address]\nsecond line")
        return measured(config, name, groups, look)

    def write_files(folder, name, figures, picture):
        written.append(json.loads(json.dumps(figures)))

    monkeypatch.setattr(gpu, "look_at", look_at)
    monkeypatch.setattr(gpu.measure, "write_files", write_files)
    console = Console(file=io.StringIO(), width=240)
    wanted = Settings(rungs=("M and E recomputed", ROUTER))
    assert not gpu.run(tmp_path, quick=True, wanted=wanted, console=console)
    assert "failed: two towers: RuntimeError: CUDA error: [an illegal address]" in console.file.getvalue()
    assert [len(found["ladder"]) for found in written] == [0, 1, 2] and all(found["steps"] for found in written)
    failed, climbed = written[-1]["ladder"]
    assert "second line" in failed["traceback"] and failed["skipped"] is None and "cases" not in failed
    assert climbed["failed"] is None and climbed["cases"][step.TWO_TOWER]["seconds"] > 0


def test_what_ran_out_of_memory_keeps_none(groups, monkeypatch):
    """The wrapper and its gradients are there, and the optimizer's state does not fit any more."""
    config, alive = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES), []

    def full(_, wrapped, __):
        alive.append(weakref.ref(wrapped.only))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(step, "build_optimizer", full)
    row = gpu.measure_rung(config, gpu.Rung("large"), gpu.QUICK, groups)
    assert row["cases"] == dict.fromkeys(gpu.OBJECTIVES)
    gpu.free()
    assert len(alive) == 2 and all(reference() is None for reference in alive)


def test_nothing_of_a_measured_side_stays(groups, monkeypatch):
    """Both objectives do not fit at a time."""
    config, alive = load_recipe("bench_gpu", gpu.QUICK_OVERRIDES), []
    original = step.trainer_of

    def remembered(*arguments, **named):
        parts = original(*arguments, **named)
        alive.append(weakref.ref(parts.model.only))
        return parts

    monkeypatch.setattr(step, "trainer_of", remembered)
    gpu.measure_side(config, step.TWO_TOWER, gpu.QUICK, groups)
    assert [reference() for reference in alive] == [None]


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    for arguments, said in (
        (["--layers", "53"], "--layers: found 53"),
        (["--quick", "--layers", "6"], "--layers: found 6"),
        (["--rungs", "rooter"], "--rungs: found"),
    ):
        assert main(["bench", "gpu", *arguments, "--output", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
