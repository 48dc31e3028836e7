"""Where the time of a step goes, by class of kernel: torch's profiler, and a table of names.

On CUDA the kernels themselves are counted. On a CPU it is operators, by their own time: a product
inside a scan then counts as GEMM.
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
# The first pattern that is found in a name, upper or lower case, gives its class. Kernels of this
# project are named as in ops/*_triton*.py; those of others as in mamba-ssm 2.3, causal-conv1d 1.7,
# NCCL, cuBLAS, cuDNN, FlashAttention, TorchInductor and Transformer Engine.
PATTERNS = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|gloo|c10d|broadcast_"),
    (
        "scan",
        r"^(decay|decay_backward|forward|backward_clean|backward_block)_kernel|TwoStream|ChunkScan|"
        r"_chunk_(cumsum|state|scan)|_state_passing|_bmm_chunk|cumsum|_scan_",
    ),
    ("convolution", r"causal_conv1d|conv1d|block_conv|BlockConv|SeededConv"),
    # triton_tem_: TorchInductor's templates, of which FlexAttention alone is compiled here.
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
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class Split:
    """Seconds of one piece of work by class, those of the ten longest names that have none, and how long it took."""

    seconds: dict[str, float]
    unnamed: dict[str, float]
    elapsed: float

    @property
    def busy(self) -> float:
        """Share of the time in which a kernel ran, if only one runs at a time."""
        return sum(self.seconds.values()) / self.elapsed


def split(events: Iterable[Any], *, elapsed: float, on_device: bool) -> Split:
    """Sum averaged events of torch's profiler by class.

    Operators carry the time of the kernels that they start, which have events of their own, and so
    have ranges that a program marks: on a device only kernels count.
    """
    seconds, unnamed = dict.fromkeys(CLASSES, 0.0), dict[str, float]()
    for event in events:
        if event.is_user_annotation or on_device == (event.device_type == DeviceType.CPU):
            continue
        took = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        kind = class_of(event.key)
        seconds[kind] += took
        if kind == OTHER:
            unnamed[event.key] = unnamed.get(event.key, 0.0) + took
    longest = sorted(unnamed.items(), key=lambda item: -item[1])[:10]
    return Split(seconds, dict(longest), elapsed)


def time_by_class(work: Callable[[], Any]) -> Split:
    """Run the work once under the profiler."""
    on_device = not device.is_cpu()
    # On a device the kernels alone: to note operators too would slow down the host, which then
    # holds up the kernels.
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        elapsed = measure.seconds(work)
    return split(found.key_averages(), elapsed=elapsed, on_device=on_device)
