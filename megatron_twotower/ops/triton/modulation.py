"""Modulation and gate of `ops.modulation` in Triton: one forward and one backward kernel for both.

Importing this module imports triton. The kernels are tested in Triton's interpreter and compiled
for compute capability 9.0. They have not yet been run or timed on a GPU.

Both operations are y = base + factor * x with one factor for each segment of l / k positions:
shift + (1 + scale) * x, and residual + gate * x. Memory traffic of the backward passes, in tensors
of the size of x: torch writes products of that size only to sum them over segments, and needs 9 and
8. The kernel needs 3.

Shapes: x (l, b, h) contiguous; factor (k, b, h), one row for each segment; base (k, b, h) or
(l, b, h). The last dimension of factor and base is contiguous. Everything is computed in float32
and rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import dense_last_dimension, padded_size, round_to

# Elements of one tile, and the most positions of a tile.
TILE = 4096
MAX_POSITIONS = 64


@triton.jit
def _program_tile(segment_length, batches, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of this program: segment, batch, columns, offsets in (l, b, h), their mask, positions."""
    chunks = tl.cdiv(segment_length, ROWS)
    segment, batch = tl.program_id(0) // chunks, tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) % chunks * ROWS + tl.arange(0, ROWS)
    cols, positions = tl.program_id(1) * COLS + tl.arange(0, COLS), segment * segment_length + index
    ok = (index < segment_length)[:, None] & (cols < WIDTH)[None, :]
    offsets = (positions.to(tl.int64) * batches + batch)[:, None] * WIDTH + cols[None, :]
    return segment, batch, cols, offsets, ok, positions


@triton.jit
def _row(base, segment, batch, cols, segment_stride, batch_stride, WIDTH: tl.constexpr):
    """The row of a segment, in float32."""
    start = base + segment.to(tl.int64) * segment_stride + batch * batch_stride
    return tl.load(start + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def modulation_forward_kernel(
    x,
    factor,
    base,
    out,
    segment_length,
    batches,
    factor_k,
    factor_b,
    base_k,
    base_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADDEND: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """ADDEND is added to the factor. BY_POSITION: base is (l, b, h), otherwise (k, b, h)."""
    segment, batch, cols, offsets, ok, positions = _program_tile(segment_length, batches, WIDTH, ROWS, COLS)
    value = tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32)
    value *= ADDEND + _row(factor, segment, batch, cols, factor_k, factor_b, WIDTH)[None, :]
    if BY_POSITION:
        start = base + positions.to(tl.int64) * base_k + batch * base_b
        value += tl.load(start[:, None] + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        value += _row(base, segment, batch, cols, base_k, base_b, WIDTH)[None, :]
    tl.store(out + offsets, round_to(value, out.dtype.element_ty), mask=ok)


@triton.jit
def modulation_backward_kernel(
    grad,
    x,
    factor,
    grad_x,
    sums,
    segment_length,
    batches,
    factor_k,
    factor_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADDEND: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """The gradient of x, and partial sums for those of factor and base.

    sums (1 or 2, k, chunks of a segment, b, h) float32: of grad * x; with BY_POSITION false also of
    grad.
    """
    segment, batch, cols, offsets, ok, _ = _program_tile(segment_length, batches, WIDTH, ROWS, COLS)
    g = tl.load(grad + offsets, mask=ok, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32)
    scaled = g * (ADDEND + _row(factor, segment, batch, cols, factor_k, factor_b, WIDTH)[None, :])
    tl.store(grad_x + offsets, round_to(scaled, grad_x.dtype.element_ty), mask=ok)
    to_sums = sums + (tl.program_id(0).to(tl.int64) * batches + batch) * WIDTH + cols
    tl.store(to_sums, tl.sum(g * value, 0), mask=cols < WIDTH)
    if not BY_POSITION:
        size = tl.num_programs(0).to(tl.int64) * batches * WIDTH
        tl.store(to_sums + size, tl.sum(g, 0), mask=cols < WIDTH)


def _arguments(
    x: Tensor, factor: Tensor, addend: float, by_position: bool
) -> tuple[tuple[int, int, int], int, tuple[int | float | bool, ...]]:
    """The grid, the chunks of a segment, and the compile-time constants."""
    l, b, h = x.shape
    length = l // len(factor)
    rows = min(padded_size(length), MAX_POSITIONS)
    cols, chunks = TILE // rows, triton.cdiv(length, rows)
    return ((len(factor) * chunks, triton.cdiv(h, cols), b), chunks, (h, rows, cols, addend, by_position))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, base: Tensor, addend: float, by_position: bool) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.addend, ctx.by_position, ctx.base_dtype = addend, by_position, base.dtype
        out, length = torch.empty_like(x), len(x) // len(factor)
        grid, _, constants = _arguments(x, factor, addend, by_position)
        with torch.cuda.device_of(x):
            modulation_forward_kernel[grid](
                x, factor, base, out, length, x.shape[1], *factor.stride()[:2], *base.stride()[:2], *constants
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        grid, chunks, constants = _arguments(x, factor, ctx.addend, ctx.by_position)
        dense, grad_x = grad.contiguous(), torch.empty_like(x)
        shape = (1 if ctx.by_position else 2, len(factor), chunks, *x.shape[1:])
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            modulation_backward_kernel[grid](
                dense, x, factor, grad_x, sums, len(x) // len(factor), x.shape[1], *factor.stride()[:2], *constants
            )
        segment_sums = sums.sum(2)
        grad_base = grad if ctx.by_position else segment_sums[1].to(ctx.base_dtype)
        return grad_x, segment_sums[0].to(factor.dtype), grad_base, None, None


def modulate_triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`ops.modulation.modulate` in bfloat16 or float32."""
    return _Scaled.apply(x.contiguous(), dense_last_dimension(scale), dense_last_dimension(shift), 1.0, False)


def add_gated_triton(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """`ops.modulation.add_gated` in bfloat16 or float32, all tensors of one dtype."""
    assert x.dtype == out.dtype, (x.dtype, out.dtype)
    return _Scaled.apply(out.contiguous(), dense_last_dimension(gate), dense_last_dimension(x), 0.0, True)
