"""The modulation and the gate of `adaln` in Triton, one kernel each way. Importing this module imports triton.

Tested in Triton's interpreter, and compiled for compute capability 9.0; not yet run or timed on a
GPU.

Both are y = base + factor * x, with a factor for each stretch of a sequence: shift + (1 + scale) *
x, and residual + gate * x. In torch the backward pass writes products of the size of x only to sum
them up over stretches: it reads and writes 9 and 8 tensors of that size. Here it is three.

Shapes: x (l, b, h) contiguous; factor (k, b, h), each row for l / k positions; base (k, b, h) or
(l, b, h). The last dimension of factor and base is dense. All is computed in float32 and rounded
once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import last_dense, narrow, padded

# Elements that a program holds, and the most positions of them.
TILE = 4096
POSITIONS = 64


@triton.jit
def _places(stretch_length, batches, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of this program: stretch, batch, columns, its elements in (l, b, h), which are there, and their positions."""
    chunks = tl.cdiv(stretch_length, ROWS)
    stretch, batch = tl.program_id(0) // chunks, tl.program_id(2)
    within = tl.program_id(0) % chunks * ROWS + tl.arange(0, ROWS)
    cols, positions = tl.program_id(1) * COLS + tl.arange(0, COLS), stretch * stretch_length + within
    ok = (within < stretch_length)[:, None] & (cols < WIDTH)[None, :]
    place = (positions.to(tl.int64) * batches + batch)[:, None] * WIDTH + cols[None, :]
    return stretch, batch, cols, place, ok, positions


@triton.jit
def _row(base, stretch, batch, cols, by_stretch, by_batch, WIDTH: tl.constexpr):
    """The row of a stretch, in float32."""
    start = base + stretch.to(tl.int64) * by_stretch + batch * by_batch
    return tl.load(start + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def modulation_forward_kernel(
    x,
    factor,
    base,
    out,
    stretch_length,
    batches,
    factor_k,
    factor_b,
    base_k,
    base_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MORE: tl.constexpr,
    BY_POSITION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """MORE is added to the factor. BY_POSITION: base is (l, b, h)."""
    stretch, batch, cols, place, ok, positions = _places(stretch_length, batches, WIDTH, ROWS, COLS)
    value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    value *= MORE + _row(factor, stretch, batch, cols, factor_k, factor_b, WIDTH)[None, :]
    if BY_POSITION:
        start = base + positions.to(tl.int64) * base_k + batch * base_b
        value += tl.load(start[:, None] + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        value += _row(base, stretch, batch, cols, base_k, base_b, WIDTH)[None, :]
    tl.store(out + place, narrow(value, out.dtype.element_ty, INTERPRETED), mask=ok)


@triton.jit
def modulation_backward_kernel(
    grad,
    x,
    factor,
    grad_x,
    sums,
    stretch_length,
    batches,
    factor_k,
    factor_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MORE: tl.constexpr,
    BY_POSITION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sums (1 or 2, k, chunks of a stretch, b, h) float32: of grad * x, and of grad where base is by stretch."""
    stretch, batch, cols, place, ok, _ = _places(stretch_length, batches, WIDTH, ROWS, COLS)
    g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    scaled = g * (MORE + _row(factor, stretch, batch, cols, factor_k, factor_b, WIDTH)[None, :])
    tl.store(grad_x + place, narrow(scaled, grad_x.dtype.element_ty, INTERPRETED), mask=ok)
    own = sums + (tl.program_id(0).to(tl.int64) * batches + batch) * WIDTH + cols
    tl.store(own, tl.sum(g * value, 0), mask=cols < WIDTH)
    if not BY_POSITION:
        all_ = tl.num_programs(0).to(tl.int64) * batches * WIDTH
        tl.store(own + all_, tl.sum(g, 0), mask=cols < WIDTH)


def _arguments(
    x: Tensor, factor: Tensor, more: float, by_position: bool
) -> tuple[tuple[int, int, int], int, tuple[int | float | bool, ...]]:
    """The grid, chunks of a stretch, and the compile-time numbers."""
    l, b, h = x.shape
    length = l // len(factor)
    rows = min(padded(length), POSITIONS)
    cols, chunks = TILE // rows, triton.cdiv(length, rows)
    return ((len(factor) * chunks, triton.cdiv(h, cols), b), chunks, (h, rows, cols, more, by_position, not x.is_cuda))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, base: Tensor, more: float, by_position: bool) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.more, ctx.by_position, ctx.base_dtype = more, by_position, base.dtype
        out, length = torch.empty_like(x), len(x) // len(factor)
        grid, _, numbers = _arguments(x, factor, more, by_position)
        with torch.cuda.device_of(x):
            modulation_forward_kernel[grid](
                x, factor, base, out, length, x.shape[1], *factor.stride()[:2], *base.stride()[:2], *numbers
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        grid, chunks, numbers = _arguments(x, factor, ctx.more, ctx.by_position)
        dense, grad_x = grad.contiguous(), torch.empty_like(x)
        shape = (1 if ctx.by_position else 2, len(factor), chunks, *x.shape[1:])
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            modulation_backward_kernel[grid](
                dense, x, factor, grad_x, sums, len(x) // len(factor), x.shape[1], *factor.stride()[:2], *numbers
            )
        by_stretch = sums.sum(2)
        grad_base = grad if ctx.by_position else by_stretch[1].to(ctx.base_dtype)
        return grad_x, by_stretch[0].to(factor.dtype), grad_base, None, None


def modulate_triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`adaln.modulate` of bfloat16 or float32."""
    return _Scaled.apply(x.contiguous(), last_dense(scale), last_dense(shift), 1.0, False)


def add_gated_triton(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """`adaln.add_gated` of bfloat16 or float32, all of one dtype."""
    assert x.dtype == out.dtype, (x.dtype, out.dtype)
    return _Scaled.apply(out.contiguous(), last_dense(gate), last_dense(x), 0.0, True)
