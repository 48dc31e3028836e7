"""The short causal convolution before the Mamba scan, for one stream and for blocks with a history.

Shapes: inputs (b, l, c); weight (c, k); bias (c,); history (b, n, k - 1, c); documents (b, l)
int32. One filter per channel, followed by SiLU. Inputs in another document count as zeros, and so
do those before the first position, unless they are given.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Inputs that are filtered at a time on a CPU: intermediate results have no more elements.
CPU_ELEMENTS = 1 << 20


def _channel_slices(padded: Tensor) -> Iterator[slice]:
    """The slices of channels that are filtered at a time; on CUDA one."""
    rows, channels = padded.shape[0] * padded.shape[1], padded.shape[2]
    step = channels if padded.is_cuda else max(16, CPU_ELEMENTS // rows)
    return (slice(start, start + step) for start in range(0, channels, step))


def _taps(padded: Tensor, same: list[Tensor] | None, taps: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Of each tap: its index, the positions that it reads, and the inputs there (rows, l, c)."""
    length = padded.shape[1] - taps + 1
    for i in range(taps):
        read = slice(i, i + length)
        yield i, read, padded[:, read] if same is None else padded[:, read] * same[i]


def _preactivation(padded: Tensor, same: list[Tensor] | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution (rows, l, c) of padded (rows, k - 1 + l, c), before its activation."""
    out = bias.expand(len(padded), padded.shape[1] - weight.shape[1] + 1, -1)
    for i, _, inputs in _taps(padded, same, weight.shape[1]):
        out = torch.addcmul(out, inputs, weight[:, i]) if i == 0 else out.addcmul_(inputs, weight[:, i])
    return out


class _Filter(torch.autograd.Function):
    """The convolution with its activation; the backward pass recomputes the preactivation.

    same: for each tap, whether it reads the document of the position (rows, l, 1) bool, or `None`.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, same: list[Tensor] | None) -> Tensor:
        ctx.save_for_backward(padded, weight, bias)
        ctx.same = same
        out = padded.new_empty(len(padded), padded.shape[1] - weight.shape[1] + 1, padded.shape[2])
        for part in _channel_slices(padded):
            out[..., part] = F.silu(_preactivation(padded[..., part], same, weight[part], bias[part]), inplace=True)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias = ctx.saved_tensors
        grad_padded, grad_weight = torch.zeros_like(padded), torch.empty_like(weight)
        grad_bias = torch.empty_like(bias)
        for part in _channel_slices(padded):
            before = _preactivation(padded[..., part], ctx.same, weight[part], bias[part])
            upstream = torch.ops.aten.silu_backward(grad[..., part], before)
            grad_bias[part] = upstream.sum((0, 1))
            for i, read, inputs in _taps(padded[..., part], ctx.same, weight.shape[1]):
                grad_weight[part, i] = torch.mul(upstream, inputs, out=before).sum((0, 1))
                masked = upstream if ctx.same is None else upstream * ctx.same[i]
                grad_padded[:, read, part].addcmul_(masked, weight[part, i])
        return grad_padded, grad_weight, grad_bias, None


def _filter(padded: Tensor, documents: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The filter of padded (rows, k - 1 + l, c): (rows, l, c); documents (rows, k - 1 + l)."""
    same, taps = None, weight.shape[1]
    if documents is not None:
        length = padded.shape[1] - taps + 1
        own = documents[:, taps - 1 :]
        same = [(documents[:, i : i + length] == own).unsqueeze(-1) for i in range(taps)]
    return _Filter.apply(padded, weight, bias, same)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """silu(bias + sum_i weight[:, i] x[l - k + 1 + i]): (b, l, c).

    On CUDA, causal-conv1d computes it if it is installed and takes the shapes, otherwise the
    kernels of `ops.triton.convolution`.

    Args:
        x: (b, l, c).
        weight: (c, k).
        bias: (c,).
        documents: (b, l), or `None` for one document.
        before: (b, k - 1, c), the inputs before x, of the document of its first position; zeros if
            `None`.
    """
    if before is not None:
        count = before.shape[1]
        joined = torch.cat([before, x], dim=1)
        known = None if documents is None else _extended(documents, count)
        return causal_conv(joined, weight, bias, documents=known)[:, count:]
    available = x.is_cuda and x.dtype != torch.float64 and dispatch.unavailable("causal-conv1d") is None
    if available and dispatch.causal_conv1d_takes(x, weight):
        return dispatch.causal_conv1d(x, weight, bias, documents=documents)
    if dispatch.uses_triton(x, "convolution"):
        from megatron_twotower.ops.triton.convolution import block_conv_triton

        return block_conv_triton(x, None, weight, bias, block=x.shape[1], documents=documents)
    count = weight.shape[1] - 1
    known = None if documents is None else _extended(documents, count)
    return _filter(F.pad(x, (0, 0, count, 0)), known, weight, bias)


def _extended(documents: Tensor, count: int) -> Tensor:
    """Documents (b, l) -> (b, count + l): inputs before the first position are of its document."""
    return torch.cat([documents[:, :1].expand(-1, count), documents], dim=1)


def block_history(x: Tensor, *, taps: int, block: int, before: Tensor | None = None) -> Tensor:
    """The k - 1 inputs before each block: (b, n, k - 1, c).

    The convolution of the noisy stream needs nothing else of the clean stream.

    Args:
        x: (b, l, c), the clean inputs.
        taps: k.
        block: Block size s.
        before: As in `causal_conv`.
    """
    padded = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat([before, x], dim=1)
    windows = padded.unfold(1, taps - 1, block)[:, : x.shape[1] // block]
    return windows.transpose(-1, -2).contiguous()


def seeded_block_conv(
    x: Tensor, history: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None
) -> Tensor:
    """The convolution in every block of the noisy stream, with clean inputs before the block.

    On CUDA with triton, the kernels of `ops.triton.convolution` compute it.

    Args:
        x: (b, l, c), the noisy inputs.
        history: (b, n, k - 1, c), the clean inputs, from `block_history`.
        documents: (b, l), or `None` for one document.

    Returns:
        (b, l, c).
    """
    (b, l, c), n, before = x.shape, history.shape[1], history.shape[2]
    if dispatch.uses_triton(x, "convolution"):
        from megatron_twotower.ops.triton.convolution import block_conv_triton

        return block_conv_triton(x, history, weight, bias, block=l // n, documents=documents)
    blocks = torch.cat([history, x.view(b, n, -1, c)], dim=2).flatten(0, 1)
    if documents is not None:
        documents = _extended(documents, before).unfold(1, before + l // n, l // n).flatten(0, 1)
    return _filter(blocks, documents, weight, bias).view(b, l, c)


def seeded_block_conv_ref(
    x: Tensor, clean: Tensor, weight: Tensor, bias: Tensor, *, block: int, documents: Tensor | None = None
) -> Tensor:
    """Reference implementation of `seeded_block_conv`: each position by itself."""
    (_, l, _), taps = x.shape, weight.shape[1]
    outs = []
    for i in range(l):
        start = i // block * block
        total = bias.expand_as(x[:, i])
        for j in range(max(0, i - taps + 1), i + 1):
            value = x[:, j] if j >= start else clean[:, j]
            if documents is not None:
                value = value * (documents[:, j] == documents[:, i]).unsqueeze(-1)
            total = total + weight[:, taps - 1 - i + j] * value
        outs.append(F.silu(total))
    return torch.stack(outs, dim=1)
