"""The short causal convolution in front of the Mamba scan, for one stream and for seeded blocks.

Shapes: inputs (b, l, c) before the activation; weight (c, k); bias (c,). One filter per channel, SiLU after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _filter(padded: Tensor, weight: Tensor, bias: Tensor, length: int) -> Tensor:
    """Sum of shifted copies, in the layout (..., l, c) that the projections give and the scan takes."""
    taps = weight.shape[1]
    out = bias + sum(padded[..., i : i + length, :] * weight[:, i] for i in range(taps))
    return F.silu(out)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(bias + sum_i weight[:, i] x[l - k + 1 + i]), with zeros before the sequence. Returns (b, l, c)."""
    return _filter(F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight, bias, x.shape[1])


def seeded_block_conv(x: Tensor, clean: Tensor, weight: Tensor, bias: Tensor, *, block: int) -> Tensor:
    """The convolution inside every block of the noisy stream, its history the clean inputs just before the block.

    Args:
        x: noisy inputs (b, l, c), l a multiple of `block`.
        clean: clean inputs (b, l, c); the last k - 1 before each block are read, zeros before block 0.

    Returns:
        (b, l, c).
    """
    b, l, c = x.shape
    taps = weight.shape[1]
    history = F.pad(clean, (0, 0, taps - 1, 0)).unfold(1, taps - 1, block)[:, : l // block].transpose(-1, -2)
    blocks = F.pad(x.reshape(b, l // block, block, c), (0, 0, taps - 1, 0))
    blocks[..., : taps - 1, :] = history
    return _filter(blocks, weight, bias, block).reshape(b, l, c)


def seeded_block_conv_ref(x: Tensor, clean: Tensor, weight: Tensor, bias: Tensor, *, block: int) -> Tensor:
    """Every block by itself, through `torch.nn.functional.conv1d`."""
    outs = []
    for start in range(0, x.shape[1], block):
        whole = torch.cat([clean[:, :start], x[:, start : start + block]], dim=1).transpose(1, 2)
        padded = F.pad(whole, (weight.shape[1] - 1, 0))
        out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])
        outs.append(F.silu(out[..., start:]).transpose(1, 2))
    return torch.cat(outs, dim=1)
