"""Time by class of kernel, from torch's profiler and a table of names.

On CUDA kernels are counted. On a CPU operators are counted, by their own time, so that a matrix
product inside a scan counts as GEMM.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_twotower.bench import measure
from megatron_twotower.common import device

OTHER = "other"
# The first pattern that matches in a name, in any case, gives its class. The names are those of
# this project (ops/triton), and of mamba-ssm 2.3, causal-conv1d 1.7, NCCL, cuBLAS, cuDNN,
# FlashAttention, TorchInductor and Transformer Engine.
PATTERNS = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|gloo|c10d|broadcast_"),
    (
        "scan",
        r"^(decay|decay_backward|forward|backward_clean|backward_block)_kernel|TwoStream|ChunkScan|"
        r"_chunk_(cumsum|state|scan)|_state_passing|_bmm_chunk|cumsum|_scan_",
    ),
    ("convolution", r"causal_conv1d|conv1d|block_conv|BlockConv|SeededConv"),
    # triton_tem_: TorchInductor's templates. Only FlexAttention is compiled from one here.
    ("attention", r"flex_attention|triton_tem_|fmha|flash|attention|sdpa|softmax"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|wgmma|splitk|addmm|bmm|::mm$|::matmul|::linear"),
    ("optimizer", r"adam|multi_tensor|l2norm|lamb_"),
    ("routing", r"permute|topk|sort|histc|scatter|gather|index|bitmap|row_map|bincount|fused_router"),
    ("copies", r"memcpy|memset|copy_|::clone|contiguous|::fill_|::zero_|CatArray|::cat$"),
    (
        "norm and elementwise",
        r"norm|elementwise|reduce|triton_(poi|red|per)|vectorized|silu|relu|sigmoid|softplus|exp|"
        r"cross_entropy|modulation|::(add|mul|sub|div|square|pow|rsqrt|neg|sum|mean|where|clamp)|cast|quantize|amax",
    ),
)
CLASSES = (*(name for name, _ in PATTERNS), OTHER)
_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in PATTERNS)


def class_of(name: str) -> str:
    """The class of a kernel or operator by its name."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class TimeByClass:
    """Profiled times of one piece of work.

    Attributes:
        seconds: Seconds of each class of `CLASSES`.
        unnamed: Seconds of the ten longest names without a class.
        elapsed: Seconds by the clock.
    """

    seconds: dict[str, float]
    unnamed: dict[str, float]
    elapsed: float

    @property
    def busy(self) -> float:
        """The share of the elapsed time in which a kernel ran, if only one runs at a time."""
        return sum(self.seconds.values()) / self.elapsed


def sum_by_class(events: Iterable[Any], *, elapsed: float, on_device: bool) -> TimeByClass:
    """Sum averaged events of torch's profiler by class.

    Args:
        on_device: Count kernels only. Operators and ranges that a program marks repeat the time of
            their kernels, which have events of their own.
    """
    seconds, unnamed = dict.fromkeys(CLASSES, 0.0), dict[str, float]()
    for event in events:
        if event.is_user_annotation or on_device == (event.device_type == DeviceType.CPU):
            continue
        duration = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        kind = class_of(event.key)
        seconds[kind] += duration
        if kind == OTHER:
            unnamed[event.key] = unnamed.get(event.key, 0.0) + duration
    longest = sorted(unnamed.items(), key=lambda item: -item[1])[:10]
    return TimeByClass(seconds, dict(longest), elapsed)


def time_by_class(work: Callable[[], Any]) -> TimeByClass:
    """Run the work once under the profiler and sum its time by class."""
    on_device = not device.is_cpu()
    # On a device only kernels are recorded: recording operators too would slow down the host, and
    # the kernels would wait for it.
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        elapsed = measure.elapsed_seconds(work)
    return sum_by_class(record.key_averages(), elapsed=elapsed, on_device=on_device)
