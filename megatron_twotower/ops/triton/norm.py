"""The gated norm of `ops.norm` in Triton, one kernel each way. Importing this module imports triton.

Tested in Triton's interpreter, and compiled for compute capability 9.0; not yet run or timed on a
GPU.

In torch it is a chain of operations that each pass over memory, and read and write 21 tensors of
the size of y forward and 59 backward, counted in bfloat16. Here it is three and five: y, z and the
result; those two, the gradient that comes, and the two that go. All is computed in float32 and
rounded once, at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import narrow, padded

# Elements that a program holds at a time, and the rows that it goes through: the gradient of the
# weight is summed over them in registers.
TILE = 2048
ROWS = 64


@triton.jit
def _gated(y, z):
    """silu(z) and its derivative, and y * silu(z)."""
    open_ = 1.0 / (1.0 + tl.exp(-z))
    gate = z * open_
    return gate, open_ * (1.0 + z - gate), y * gate


@triton.jit
def _places(row, group, cols, length, z_b, z_l, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Where rows of one group are in a dense tensor, and in z."""
    wide, own = row.to(tl.int64), group * WIDTH + cols
    return (
        wide[:, None] * (GROUPS * WIDTH) + own[None, :],
        (wide // length * z_b + wide % length * z_l)[:, None] + own[None, :],
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
    INTERPRETED: tl.constexpr,
):
    """A tile of rows of one group. y, out (rows, groups, width) and weight (groups, width) are contiguous; z has
    `length` rows, z_l elements apart, for each step of z_b."""
    group, cols = tl.program_id(1), tl.arange(0, COLS)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    ok = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    place, z_place = _places(row, group, cols, length, z_b, z_l, GROUPS, WIDTH)
    w = tl.load(weight + group * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    y_ = tl.load(y + place, mask=ok, other=0.0).to(tl.float32)
    z_ = tl.load(z + z_place, mask=ok, other=0.0).to(tl.float32)
    _, _, gated = _gated(y_, z_)
    scale = tl.rsqrt(tl.sum(gated * gated, 1) / WIDTH + epsilon)
    tl.store(out + place, narrow(gated * scale[:, None] * w[None, :], out.dtype.element_ty, INTERPRETED), mask=ok)


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
    INTERPRETED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """ALL_ROWS rows of one group, tile by tile. grad_weight (programs, groups, width) float32, a part of the sum."""
    part, group, cols = tl.program_id(0), tl.program_id(1), tl.arange(0, COLS)
    w = tl.load(weight + group * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, ALL_ROWS, TILE_ROWS):
        row = part * ALL_ROWS + start + tl.arange(0, TILE_ROWS)
        ok = (row < rows)[:, None] & (cols < WIDTH)[None, :]
        place, z_place = _places(row, group, cols, length, z_b, z_l, GROUPS, WIDTH)
        y_ = tl.load(y + place, mask=ok, other=0.0).to(tl.float32)
        z_ = tl.load(z + z_place, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
        gate, slope, gated = _gated(y_, z_)
        scale = tl.rsqrt(tl.sum(gated * gated, 1) / WIDTH + epsilon)[:, None]
        normed, upstream = gated * scale, g * w[None, :]
        along = tl.sum(upstream * normed, 1)[:, None] / WIDTH
        into = (upstream - normed * along) * scale
        tl.store(grad_y + place, narrow(into * gate, grad_y.dtype.element_ty, INTERPRETED), mask=ok)
        tl.store(grad_z + place, narrow(into * y_ * slope, grad_z.dtype.element_ty, INTERPRETED), mask=ok)
        total += tl.sum(g * normed, 0)
    tl.store(grad_weight + (part * GROUPS + group) * WIDTH + cols, total, mask=cols < WIDTH)


def _numbers(weight: Tensor, interpreted: bool) -> tuple[int, int, int, int, bool]:
    """The compile-time numbers of both kernels. weight (groups, width)."""
    groups, width = weight.shape
    cols = padded(width)
    return groups, width, cols, min(ROWS, max(1, TILE // cols)), interpreted


def _dense_rows(z: Tensor) -> bool:
    return z.dim() == 3 and z.stride(-1) == 1


def _lies(z: Tensor) -> tuple[int, ...]:
    """Rows that lie in even steps, the step from one such run to the next, and the step from row to row."""
    return (z.shape[1], *z.stride()[:2]) if _dense_rows(z) else (z.numel(), 0, z.shape[-1])


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, z, weight = y.contiguous(), z if _dense_rows(z) else z.contiguous(), weight.contiguous()
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon = epsilon
        out, rows = torch.empty_like(y), y.numel() // weight.numel()
        numbers = _numbers(weight, not y.is_cuda)
        with torch.cuda.device_of(y):
            grid = triton.cdiv(rows, numbers[3]), numbers[0]
            gated_norm_forward_kernel[grid](y, z, weight, out, rows, epsilon, *_lies(z), *numbers)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        rows, numbers = y.numel() // weight.numel(), _numbers(weight, not y.is_cuda)
        parts = triton.cdiv(rows, ROWS)
        grad_y, grad_z = torch.empty_like(y), torch.empty(z.shape, dtype=z.dtype, device=z.device)
        grad_weight = torch.empty(parts, *weight.shape, dtype=torch.float32, device=y.device)
        with torch.cuda.device_of(y):
            gated_norm_backward_kernel[(parts, numbers[0])](
                grad.contiguous(),
                y,
                z,
                weight,
                grad_y,
                grad_z,
                grad_weight,
                rows,
                ctx.epsilon,
                *_lies(z),
                *numbers,
                ROWS,
            )
        return grad_y, grad_z, grad_weight.sum(0).to(weight.dtype), None


def gated_rms_norm_triton(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`ops.norm.gated_rms_norm` of bfloat16 or float32: y and z (..., h) of one dtype, weight (groups, h / groups).

    z (b, l, h), the gate of a Mamba layer, is read as it lies in the layer's projection.
    """
    assert y.dtype == z.dtype, (y.dtype, z.dtype)
    return _GatedRMSNorm.apply(y, z, weight, epsilon)
