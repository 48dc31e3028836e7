"""Classes of kernels by name, and sums of the profiler's events by class."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_twotower.bench import kernel_classes
from megatron_twotower.bench.kernel_classes import class_of, sum_by_class

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
    "scan_kernels": ("scan", 5),
    "convolution": ("convolution", 2),
    "norm": ("norm and elementwise", 2),
    "cross_entropy": ("norm and elementwise", 1),
    "modulation": ("norm and elementwise", 2),
}


@pytest.mark.parametrize("module", OUR_KERNELS)
def test_every_kernel_of_this_project_has_its_class(module):
    pytest.importorskip("triton")
    (kind, count), found = OUR_KERNELS[module], vars(importlib.import_module(f"megatron_twotower.ops.triton.{module}"))
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
        event("aten::mm", device=7e6, cpu=1e6),  # repeats the time of its kernel
        event("nvjet_tst", device=7e6, cuda=True),
        event("ncclDevKernel_AllReduce", device=1e6, cuda=True),
        event("Optimizer.step", device=8e6, cuda=True, annotation=True),
        event("mystery", device=2e6, cuda=True),
    ]
    found = sum_by_class(events, elapsed=20.0, on_device=True)
    assert {name: value for name, value in found.seconds.items() if value} == {
        "GEMM": 7.0,
        "communication": 1.0,
        "other": 2.0,
    }
    assert found.unnamed == {"mystery": 2.0} and found.busy == 0.5
    assert sum_by_class(events, elapsed=20.0, on_device=False).seconds["GEMM"] == 1.0


def test_a_device_is_profiled_by_its_kernels_alone(monkeypatch):
    recorded = []

    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)
            recorded.append(activities)

        def key_averages(self):
            return [event("nvjet_tst", device=7e6, cuda=True), event("cudaLaunchKernel", cpu=9e6)]

    monkeypatch.setattr(kernel_classes, "profile", Profile)
    monkeypatch.setattr(kernel_classes.device, "is_cpu", lambda: False)
    found = kernel_classes.time_by_class(lambda: None)
    assert recorded == [[ProfilerActivity.CUDA]]
    assert sum(found.seconds.values()) == found.seconds["GEMM"] == 7.0 and found.elapsed < 5.0
