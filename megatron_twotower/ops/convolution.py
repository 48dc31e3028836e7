"""The short causal convolution in front of the Mamba scan, for one stream and for seeded blocks.

Shapes: inputs (b, l, c) before the activation; weight (c, k); bias (c,); history (b, n, k - 1, c);
documents (b, l) int32. One filter per channel, SiLU after it. What lies before the sequence, or in
another document, counts as zeros.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Inputs worked on at a time on a CPU: what passes between operations takes no more memory than
# this.
CACHED = 1 << 20


def _channels(padded: Tensor) -> Iterator[slice]:
    """The channels in pieces."""
    rows, channels = padded.shape[0] * padded.shape[1], padded.shape[2]
    step = channels if padded.is_cuda else max(16, CACHED // rows)
    return (slice(start, start + step) for start in range(0, channels, step))


def _taps(padded: Tensor, same: list[Tensor] | None, taps: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Each tap: its number, the positions it reads, and what it reads, (rows, l, c)."""
    length = padded.shape[1] - taps + 1
    for i in range(taps):
        read = slice(i, i + length)
        yield i, read, padded[:, read] if same is None else padded[:, read] * same[i]


def _preactivation(padded: Tensor, same: list[Tensor] | None, weight: Tensor, bias: Tensor) -> Tensor:
    out = bias.expand(len(padded), padded.shape[1] - weight.shape[1] + 1, -1)
    for i, _, seen in _taps(padded, same, weight.shape[1]):
        out = torch.addcmul(out, seen, weight[:, i]) if i == 0 else out.addcmul_(seen, weight[:, i])
    return out


class _Filter(torch.autograd.Function):
    """silu of the convolution (rows, l, c) of padded (rows, k - 1 + l, c); what is before the activation is made again
    in the backward pass. same: for each tap, (rows, l, 1) bool, or None."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, same: list[Tensor] | None) -> Tensor:
        ctx.save_for_backward(padded, weight, bias)
        ctx.same = same
        out = padded.new_empty(len(padded), padded.shape[1] - weight.shape[1] + 1, padded.shape[2])
        for part in _channels(padded):
            out[..., part] = F.silu(_preactivation(padded[..., part], same, weight[part], bias[part]), inplace=True)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias = ctx.saved_tensors
        grad_padded, grad_weight = torch.zeros_like(padded), torch.empty_like(weight)
        grad_bias = torch.empty_like(bias)
        for part in _channels(padded):
            before = _preactivation(padded[..., part], ctx.same, weight[part], bias[part])
            upstream = torch.ops.aten.silu_backward(grad[..., part], before)
            grad_bias[part] = upstream.sum((0, 1))
            for i, read, seen in _taps(padded[..., part], ctx.same, weight.shape[1]):
                grad_weight[part, i] = torch.mul(upstream, seen, out=before).sum((0, 1))
                taken = upstream if ctx.same is None else upstream * ctx.same[i]
                grad_padded[:, read, part].addcmul_(taken, weight[part, i])
        return grad_padded, grad_weight, grad_bias, None


def _filter(padded: Tensor, documents: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """padded (rows, k - 1 + l, c) -> (rows, l, c); documents (rows, k - 1 + l)."""
    same, taps = None, weight.shape[1]
    if documents is not None:
        length = padded.shape[1] - taps + 1
        own = documents[:, taps - 1 :]
        same = [(documents[:, i : i + length] == own).unsqueeze(-1) for i in range(taps)]
    return _Filter.apply(padded, weight, bias, same)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """silu(bias + sum_i weight[:, i] x[l - k + 1 + i]), with zeros before the sequence. Returns (b, l, c).

    On CUDA by causal-conv1d, if it is installed and takes such shapes, else by the kernels of
    `convolution_triton`.
    """
    narrow = x.is_cuda and x.dtype != torch.float64
    if narrow and dispatch.unavailable("causal-conv1d") is None and dispatch.conv_unsupported(*weight.shape) is None:
        return dispatch.causal_conv_kernel(x, weight, bias, documents=documents)
    if dispatch.triton_serves(x, "convolution"):
        from megatron_twotower.ops.triton.convolution import block_conv_triton

        return block_conv_triton(x, None, weight, bias, block=x.shape[1], documents=documents)
    before = weight.shape[1] - 1
    if documents is not None:
        documents = F.pad(documents, (before, 0), value=-1)
    return _filter(F.pad(x, (0, 0, before, 0)), documents, weight, bias)


def block_history(x: Tensor, *, taps: int, block: int) -> Tensor:
    """The k - 1 inputs just before each block, all that the noisy stream needs of a clean one: (b, n, k - 1, c)."""
    windows = F.pad(x, (0, 0, taps - 1, 0)).unfold(1, taps - 1, block)[:, : x.shape[1] // block]
    return windows.transpose(-1, -2).contiguous()


def seeded_block_conv(
    x: Tensor, history: Tensor, weight: Tensor, bias: Tensor, *, documents: Tensor | None = None
) -> Tensor:
    """The convolution inside every block of the noisy stream, its past the clean inputs just before the block.

    On CUDA, with triton, by the kernels of `convolution_triton`.

    Args:
        x: noisy inputs (b, l, c).
        history: (b, n, k - 1, c) of the clean stream, from `block_history`.

    Returns:
        (b, l, c).
    """
    (b, l, c), n, before = x.shape, history.shape[1], history.shape[2]
    if dispatch.triton_serves(x, "convolution"):
        from megatron_twotower.ops.triton.convolution import block_conv_triton

        return block_conv_triton(x, history, weight, bias, block=l // n, documents=documents)
    blocks = torch.cat([history, x.view(b, n, -1, c)], dim=2).flatten(0, 1)
    if documents is not None:
        documents = F.pad(documents, (before, 0), value=-1).unfold(1, before + l // n, l // n).flatten(0, 1)
    return _filter(blocks, documents, weight, bias).view(b, l, c)


def seeded_block_conv_ref(
    x: Tensor, clean: Tensor, weight: Tensor, bias: Tensor, *, block: int, documents: Tensor | None = None
) -> Tensor:
    """Every position by itself, from its window of clean inputs and the inputs of its block."""
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
