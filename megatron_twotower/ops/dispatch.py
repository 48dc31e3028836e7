"""Decide which kernels are used on CUDA, and call those of other packages.

Other packages: mamba-ssm for the scan of one stream, causal-conv1d for the convolution.
`mamba_ssm_chunk_scan`, `mamba_ssm_scan` and `causal_conv1d` take the arguments of
`ops.scan.chunk_scan`, `ops.scan.stream_scan` and `ops.convolution.causal_conv`, on CUDA. The order
of arguments, layouts and dtypes follow the sources of mamba-ssm 2.2.2, 2.2.4 and 2.3.2.post1
(ops/triton/ssd_*.py) and causal-conv1d 1.5.0.post8 and 1.7.0 (causal_conv1d_interface.py,
csrc/causal_conv1d.cpp). `make test-mamba` runs the kernels of mamba-ssm in Triton's interpreter.
The calls have not been run on a GPU.

Shapes: b batch, l length, m heads, p head size, g groups, d state size, c channels, k taps;
documents (b, l) int32, not negative, growing along l.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from megatron_twotower.common import versions
from megatron_twotower.ops.context_parallel import ContextRanks, Steps

# By package: the module to import.
MODULES = {
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
    "triton": "triton",
    "transformer-engine": "transformer_engine.pytorch",  # called by Megatron's modules (mcore.modules)
    "deep-ep": "deep_ep",  # called by Megatron's dispatchers
}
# The operations that have Triton kernels in this project (`ops.triton`).
TRITON_KERNELS = ("scan", "convolution", "gated norm", "modulation", "cross-entropy")


@functools.cache
def unavailable(package: str) -> str | None:
    """`None` if a package of MODULES can be used here, otherwise why not, in one line.

    The package is imported only if there is a CUDA device.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    if package in _switched_off:
        return "switched off"
    if wrong := versions.unfit(package):
        return f"{package} {wrong.removeprefix('found ')}"
    try:
        _module(package)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a package built for another torch can raise anything
        return f"{package} cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


_switched_off: set[str] = set()


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Switch packages of MODULES or kernels of TRITON_KERNELS off, to measure their gain."""
    assert {*MODULES, *TRITON_KERNELS} >= set(names), names
    before = set(_switched_off)
    _switched_off.update(names)
    unavailable.cache_clear()
    try:
        yield
    finally:
        _switched_off.clear()
        _switched_off.update(before)
        unavailable.cache_clear()


def uses_triton(x: Tensor, kernel: str) -> bool:
    """Whether x goes to a kernel of TRITON_KERNELS: on CUDA with triton, bfloat16 or float32."""
    assert kernel in TRITON_KERNELS, kernel
    supported = x.dtype in (torch.bfloat16, torch.float32)
    return x.is_cuda and supported and kernel not in _switched_off and unavailable("triton") is None


def _module(package: str) -> ModuleType:
    return importlib.import_module(MODULES[package])


# The largest offset of packages that compute offsets in 32 bits.
MAX_OFFSET = 2**31 - 1


def _reach(tensor: Tensor) -> int:
    """The offset of a tensor's last element from its first, in elements."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _too_far(offset: int) -> str | None:
    return f"offsets up to {offset:,} elements, expected at most {MAX_OFFSET:,}" if offset > MAX_OFFSET else None


def mamba_ssm_unsupported(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *, chunk: int) -> str | None:
    """`None`, or why mamba-ssm does not take these inputs, in a few words.

    Its kernels multiply the index of a chunk with strides in 32 bits (mamba-ssm 2.3.2.post1,
    ops/triton/ssd_*.py; github.com/state-spaces/mamba/issues/1015). Beyond that they read and write
    at wrong addresses, often without an error.
    """
    b, l, m, p = x.shape
    chunks = b * -(-l // chunk)
    states, scores = chunks * m * p * B.shape[3], chunks * B.shape[2] * chunk**2
    return _too_far(max(*map(_reach, (x, dt, B, C)), x.numel(), states, scores))


def mamba_ssm_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk: int,
    documents: Tensor | None = None,
    context: ContextRanks | None = None,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """The scan of one stream by mamba-ssm, without gradients.

    It calls the steps of mamba-ssm's `_mamba_chunk_scan_combined_fwd` one by one, because that
    function returns the states in C's dtype, and bfloat16 would round the states that the blocks
    start from. For y, the kernel still rounds them to C's dtype.

    Args:
        x: (b, l, m, p), of the dtype of B and C; dt is (b, l, m), B and C are (b, l, g, d), A and D
            are (m,).
        chunk: Positions of a chunk.
        documents: (b, l), or `None` for one document.
        context: As in `ops.scan.chunk_scan`.

    Returns:
        y (b, l, m, p) in x's dtype; states (b, ceil(l / chunk), m, p, d) at the start of each chunk
        and the final state (b, m, p, d), both float32.
    """
    ssd = _module("mamba-ssm")
    sizes, initial = (x.shape[3], B.shape[3]), None
    if context is not None and documents is not None:
        # To mamba-ssm a start state is one of document 0.
        documents = documents - documents[:, :1]
    with torch.no_grad(), torch.cuda.device_of(x):
        decays, steps = ssd._chunk_cumsum_fwd(dt, A, chunk)
        added = ssd._chunk_state_fwd(B, x, steps, decays, seq_idx=documents, states_in_fp32=True).flatten(3)
        passing = functools.partial(
            ssd._state_passing_fwd, added, decays[..., -1], seq_idx=documents, chunk_size=chunk, out_dtype=torch.float32
        )
        states, final = passing()
    if context is not None:
        keep = decays[..., -1].sum(-1).exp()
        if documents is not None:
            keep = keep * (documents[:, -1:] == 0)
        initial = yield from context.states_before(final.unflatten(-1, sizes), keep)
    with torch.no_grad(), torch.cuda.device_of(x):
        if initial is not None:
            states, final = passing(initial_states=initial.flatten(2))
        states, final = (t.unflatten(-1, sizes) for t in (states, final))
        scores = ssd._bmm_chunk_fwd(C, B, chunk, seq_idx=documents, output_dtype=torch.float32)
        y, _ = ssd._chunk_scan_fwd(scores, x, steps, decays, C, states, D=D, seq_idx=documents)
    return y, states, final


def mamba_ssm_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, documents: Tensor | None = None
) -> Tensor:
    """The y (b, l, m, p) of one stream by mamba-ssm, with gradients into all six tensors."""
    with torch.cuda.device_of(x):
        return _module("mamba-ssm").mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, seq_idx=documents)


def causal_conv1d_unsupported(channels: int, taps: int, *, reach: int = 0) -> str | None:
    """`None`, or why causal-conv1d does not take such a convolution, in a few words.

    Its offsets are 32-bit (csrc/causal_conv1d.h, index_t).

    Args:
        channels: The number of channels.
        taps: The width of the filter.
        reach: The largest offset in the input or the output.
    """
    if channels % 8:
        return f"{channels} channels, expected a multiple of 8"
    if not 2 <= taps <= 4:
        return f"{taps} taps, expected 2 to 4"
    return _too_far(reach)


def causal_conv1d_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether causal-conv1d takes inputs x (b, l, c) and weight (c, k)."""
    return causal_conv1d_unsupported(*weight.shape, reach=max(_reach(x), x.numel())) is None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """`ops.convolution.causal_conv` by causal-conv1d: (b, l, c), with gradients into all tensors.

    Args:
        x: (b, l, c), bfloat16, float16 or float32, like weight and bias.
        weight: (c, k).
        bias: (c,), cast to the dtype of `weight`.
        documents: (b, l), or `None` for one document.
    """
    reason = causal_conv1d_unsupported(*weight.shape)
    assert reason is None, reason
    # The kernel reads rows of channels 16 bytes at a time.
    aligned = x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    x = x if aligned else x.clone(memory_format=torch.contiguous_format)
    rows = None if documents is None else documents.to(torch.int32).contiguous()
    with torch.cuda.device_of(x):
        out = _module("causal-conv1d").causal_conv1d_fn(
            x=x.transpose(1, 2), weight=weight, bias=bias.to(weight.dtype), seq_idx=rows, activation="silu"
        )
    return out.transpose(1, 2)
