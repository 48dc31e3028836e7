"""Which kernels serve on CUDA, and third-party ones with this project's signatures. Not run on a GPU here.

mamba-ssm for the scan of one stream, causal-conv1d for the convolution: `chunk_scan_kernel` and
`causal_conv_kernel` stand for `ops.scan.chunk_scan` and `ops.convolution.causal_conv`, on CUDA
tensors. Argument orders, layouts and dtypes are from the sources of mamba-ssm 2.2.2, 2.2.4 and
2.3.2.post1 (ops/triton/ssd_*.py) and causal-conv1d 1.5.0.post8 and 1.7.0
(causal_conv1d_interface.py, csrc/causal_conv1d.cpp). `make test-mamba` runs mamba-ssm's own in an
interpreter.

Shapes: b batch, l length, m heads, p head size, g groups, d state size, c channels, k taps;
documents (b, l) int32, 0 or more, growing along l.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

# The module whose functions are called, by package.
MODULES = {
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
    "triton": "triton",
    "transformer-engine": "transformer_engine.pytorch",  # called by Megatron's modules (spec.py)
    "deep-ep": "deep_ep",  # called by Megatron's dispatchers
}
# This project's Triton kernels, by what they stand for.
OWN = ("scan", "convolution", "gated norm", "modulation", "cross-entropy")


@functools.cache
def unavailable(package: str) -> str | None:
    """Why a package of MODULES does not serve here, in one line; None when it does. Imports it only with CUDA."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if package in _switched_off:
        return "switched off"
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
    """As if packages of MODULES, or kernels of OWN, were not there: for measuring what each of them brings."""
    assert {*MODULES, *OWN} >= set(names), names
    before = set(_switched_off)
    _switched_off.update(names)
    unavailable.cache_clear()
    try:
        yield
    finally:
        _switched_off.clear()
        _switched_off.update(before)
        unavailable.cache_clear()


def triton_serves(x: Tensor, kernel: str) -> bool:
    """True where a kernel of OWN takes a tensor: on CUDA, with triton, in bfloat16 or float32."""
    assert kernel in OWN, kernel
    narrow = x.dtype in (torch.bfloat16, torch.float32)
    return x.is_cuda and narrow and kernel not in _switched_off and unavailable("triton") is None


def _module(package: str) -> ModuleType:
    return importlib.import_module(MODULES[package])


def chunk_scan_kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan of one stream without gradients: y (b, l, m, p) in x's dtype, states (b, ceil(l / chunk), m, p, d) at
    the start of each chunk, and the final state (b, m, p, d), both float32.

    x (b, l, m, p) and B, C (b, l, g, d) of one dtype, dt (b, l, m), A and D (m,). It takes the
    steps of mamba-ssm's `_mamba_chunk_scan_combined_fwd` one by one, because that gives states in
    C's dtype: bfloat16 would round what every block starts from. Inside y, the kernel rounds them
    to C's dtype all the same.
    """
    ssd = _module("mamba-ssm")
    with torch.no_grad(), torch.cuda.device_of(x):
        decays, steps = ssd._chunk_cumsum_fwd(dt, A, chunk)
        added = ssd._chunk_state_fwd(B, x, steps, decays, seq_idx=documents, states_in_fp32=True)
        states, final = ssd._state_passing_fwd(
            added.flatten(3), decays[..., -1], seq_idx=documents, chunk_size=chunk, out_dtype=torch.float32
        )
        states, final = (t.unflatten(-1, (x.shape[3], B.shape[3])) for t in (states, final))
        scores = ssd._bmm_chunk_fwd(C, B, chunk, seq_idx=documents, output_dtype=torch.float32)
        y, _ = ssd._chunk_scan_fwd(scores, x, steps, decays, C, states, D=D, seq_idx=documents)
    return y, states, final


def scan_kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, documents: Tensor | None = None
) -> Tensor:
    """The scan of one stream with gradients into all six tensors, for next-token training: y (b, l, m, p) alone."""
    with torch.cuda.device_of(x):
        return _module("mamba-ssm").mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, seq_idx=documents)


def conv_unsupported(channels: int, taps: int) -> str | None:
    """Why causal-conv1d does not take such a convolution, in a few words; None when it does."""
    if channels % 8:
        return f"{channels} channels, expected a multiple of 8"
    if not 2 <= taps <= 4:
        return f"{taps} taps, expected 2 to 4"
    return None


def causal_conv_kernel(x: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """silu(bias + sum_i weight[:, i] x[l - k + 1 + i]) for x (b, l, c), weight (c, k), bias (c,); returns (b, l, c).

    Gradients flow into x, weight and bias, which are bfloat16, float16 or float32; bias is cast to
    weight's dtype.
    """
    reason = conv_unsupported(*weight.shape)
    assert reason is None, reason
    # Rows of channels are read 16 bytes at a time.
    eights = x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    x = x if eights else x.clone(memory_format=torch.contiguous_format)
    rows = None if documents is None else documents.to(torch.int32).contiguous()
    with torch.cuda.device_of(x):
        out = _module("causal-conv1d").causal_conv1d_fn(
            x=x.transpose(1, 2), weight=weight, bias=bias.to(weight.dtype), seq_idx=rows, activation="silu"
        )
    return out.transpose(1, 2)
