"""The gated norm of `ops.norm` in Triton: one forward and one backward kernel.

Importing this module imports triton. The kernels are tested in Triton's interpreter and compiled
for compute capability 9.0. They have not yet been run or timed on a GPU.

Memory traffic, in bfloat16 tensors of the size of y: a chain of operations in torch reads and
writes 21 forward and 59 backward. The kernels need 3 (y, z and the result) and 5 (y, z, the
gradient of the result, and the gradients of y and z). Everything is computed in float32 and rounded
once, at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import padded_size, round_to

# Elements of one tile.
TILE = 2048
# Rows of one backward program, which sums the gradient of the weight over them in registers.
ROWS = 64


@triton.jit
def _gated(y, z):
    """Three values: silu(z), its derivative, and y * silu(z)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    gate = z * sigmoid
    return gate, sigmoid * (1.0 + z - gate), y * gate


@triton.jit
def _offsets(row, group, cols, length, z_b, z_l, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of the rows of one group in a contiguous tensor, and in z."""
    row64, within_row = row.to(tl.int64), group * WIDTH + cols
    return (
        row64[:, None] * (GROUPS * WIDTH) + within_row[None, :],
        (row64 // length * z_b + row64 % length * z_l)[:, None] + within_row[None, :],
    )


@triton.jit
def gated_norm_forward_kernel(
    y,
    z,
    weight,
    out,
    rows,
    epsilon,
    length,
    z_b,
    z_l,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The output of a tile of rows of one group.

    y, out (rows, groups, width) and weight (groups, width) are contiguous. Row i of z starts at
    i // length * z_b + i % length * z_l.
    """
    group, cols = tl.program_id(1), tl.arange(0, COLS)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    ok = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    offsets, z_offsets = _offsets(row, group, cols, length, z_b, z_l, GROUPS, WIDTH)
    w = tl.load(weight + group * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    y_ = tl.load(y + offsets, mask=ok, other=0.0).to(tl.float32)
    z_ = tl.load(z + z_offsets, mask=ok, other=0.0).to(tl.float32)
    _, _, gated = _gated(y_, z_)
    scale = tl.rsqrt(tl.sum(gated * gated, 1) / WIDTH + epsilon)
    tl.store(out + offsets, round_to(gated * scale[:, None] * w[None, :], out.dtype.element_ty), mask=ok)


@triton.jit
def gated_norm_backward_kernel(
    grad,
    y,
    z,
    weight,
    grad_y,
    grad_z,
    grad_weight,
    rows,
    epsilon,
    length,
    z_b,
    z_l,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """The gradients of ALL_ROWS rows of one group, tile by tile.

    grad_weight (programs, groups, width) is float32, one partial sum for each program.
    """
    part, group, cols = tl.program_id(0), tl.program_id(1), tl.arange(0, COLS)
    w = tl.load(weight + group * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, ALL_ROWS, TILE_ROWS):
        row = part * ALL_ROWS + start + tl.arange(0, TILE_ROWS)
        ok = (row < rows)[:, None] & (cols < WIDTH)[None, :]
        offsets, z_offsets = _offsets(row, group, cols, length, z_b, z_l, GROUPS, WIDTH)
        y_ = tl.load(y + offsets, mask=ok, other=0.0).to(tl.float32)
        z_ = tl.load(z + z_offsets, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + offsets, mask=ok, other=0.0).to(tl.float32)
        gate, slope, gated = _gated(y_, z_)
        scale = tl.rsqrt(tl.sum(gated * gated, 1) / WIDTH + epsilon)[:, None]
        normed, upstream = gated * scale, g * w[None, :]
        mean_product = tl.sum(upstream * normed, 1)[:, None] / WIDTH
        grad_gated = (upstream - normed * mean_product) * scale
        tl.store(grad_y + offsets, round_to(grad_gated * gate, grad_y.dtype.element_ty), mask=ok)
        tl.store(grad_z + offsets, round_to(grad_gated * y_ * slope, grad_z.dtype.element_ty), mask=ok)
        total += tl.sum(g * normed, 0)
    tl.store(grad_weight + (part.to(tl.int64) * GROUPS + group) * WIDTH + cols, total, mask=cols < WIDTH)


def _constants(weight: Tensor) -> tuple[int, int, int, int]:
    """The compile-time constants of both kernels. weight (groups, width)."""
    groups, width = weight.shape
    cols = padded_size(width)
    return groups, width, cols, min(ROWS, max(1, TILE // cols))


def _dense_rows(z: Tensor) -> bool:
    return z.dim() == 3 and z.stride(-1) == 1


def _row_strides(z: Tensor) -> tuple[int, ...]:
    """The arguments `length`, z_b and z_l of the kernels."""
    return (z.shape[1], *z.stride()[:2]) if _dense_rows(z) else (z.numel(), 0, z.shape[-1])


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, z, weight = y.contiguous(), z if _dense_rows(z) else z.contiguous(), weight.contiguous()
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon = epsilon
        out, rows = torch.empty_like(y), y.numel() // weight.numel()
        constants = _constants(weight)
        with torch.cuda.device_of(y):
            grid = triton.cdiv(rows, constants[3]), constants[0]
            gated_norm_forward_kernel[grid](y, z, weight, out, rows, epsilon, *_row_strides(z), *constants)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        rows, constants = y.numel() // weight.numel(), _constants(weight)
        parts = triton.cdiv(rows, ROWS)
        grad_y, grad_z = torch.empty_like(y), torch.empty(z.shape, dtype=z.dtype, device=z.device)
        grad_weight = torch.empty(parts, *weight.shape, dtype=torch.float32, device=y.device)
        with torch.cuda.device_of(y):
            gated_norm_backward_kernel[(parts, constants[0])](
                grad.contiguous(),
                y,
                z,
                weight,
                grad_y,
                grad_z,
                grad_weight,
                rows,
                ctx.epsilon,
                *_row_strides(z),
                *constants,
                ROWS,
            )
        return grad_y, grad_z, grad_weight.sum(0).to(weight.dtype), None


def gated_rms_norm_triton(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`ops.norm.gated_rms_norm` in bfloat16 or float32.

    Args:
        y: (..., h).
        z: (..., h), of y's dtype. A view (b, l, h) of the projection of a Mamba layer is read
            without a copy.
        weight: (groups, h / groups).
        epsilon: Added to the mean of squares.
    """
    assert y.dtype == z.dtype, (y.dtype, z.dtype)
    return _GatedRMSNorm.apply(y, z, weight, epsilon)
