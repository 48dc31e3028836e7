"""The convolutions of `ops.convolution` in Triton, one kernel each way. Importing this module imports triton.

Tested in Triton's interpreter, and compiled for compute capability 9.0; not yet run or timed on a
GPU.

Shapes: x (b, l, c), a view with a dense last dimension is read as it lies; history (b, n, k - 1,
c), what comes before each block; weight (c, k); bias (c,); documents (b, l). Tap j of position i
reads position i - (k - 1) + j: of x within i's block, of the history before it, zeros where there
is none and in another document.

In torch the taps are operations that each pass over memory, after a copy of everything behind its
history: they read and write 13 tensors of the size of x forward and 42 backward, counted in
bfloat16. Here it is two and three, and the history. The backward pass keeps x and the history and
makes what is before the activation again, wherever it is needed; all is computed in float32 and
rounded once, at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import last_dense, narrow

# Positions and channels that a program holds at a time, and the positions that it goes through: the
# gradients of weight and bias are summed over them in registers.
TILE = 16
CHANNELS = 64
POSITIONS = 256


@triton.jit
def _tap(
    x,
    history,
    documents,
    i,
    j: tl.constexpr,
    cols,
    ok,
    blocks,
    x_l,
    docs_l,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SEEDED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """What tap j of positions i reads (i, cols), in float32; `ok` where position and channel are there."""
    back: tl.constexpr = TAPS - 1
    read, start = i - back + j, i // BLOCK * BLOCK
    seen = ok & (read >= 0)[:, None]
    if DOCUMENTS:
        own = tl.load(documents + i * docs_l, mask=i < blocks * BLOCK, other=-1)
        other = tl.load(documents + read * docs_l, mask=(read >= 0) & (i < blocks * BLOCK), other=-2)
        seen = seen & (own == other)[:, None]
    inside = seen & (read >= start)[:, None]
    value = tl.load(x + read.to(tl.int64)[:, None] * x_l + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if SEEDED:
        before = seen & (read < start)[:, None]
        slot = (i // BLOCK).to(tl.int64) * back + read - start + back
        value += tl.load(history + slot[:, None] * WIDTH + cols[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _before_activation(
    x,
    history,
    documents,
    weight,
    bias_,
    i,
    cols,
    ok,
    blocks,
    x_l,
    docs_l,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SEEDED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    total = tl.zeros([i.shape[0], cols.shape[0]], tl.float32) + bias_[None, :]
    for j in tl.static_range(TAPS):
        w = tl.load(weight + cols * TAPS + j, mask=cols < WIDTH, other=0.0).to(tl.float32)
        total += w[None, :] * _tap(
            x, history, documents, i, j, cols, ok, blocks, x_l, docs_l, BLOCK, TAPS, WIDTH, SEEDED, DOCUMENTS
        )
    return total


@triton.jit
def block_conv_forward_kernel(
    x,
    history,
    documents,
    weight,
    bias,
    out,
    blocks,
    x_b,
    x_l,
    docs_b,
    docs_l,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    SEEDED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of positions and channels. out (b, l, c) contiguous."""
    batch, length = tl.program_id(2).to(tl.int64), blocks * BLOCK
    i, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    ok = (i < length)[:, None] & (cols < WIDTH)[None, :]
    bias_ = tl.load(bias + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    before = _before_activation(
        x + batch * x_b,
        history + batch * blocks * (TAPS - 1) * WIDTH,
        documents + batch * docs_b,
        weight,
        bias_,
        i,
        cols,
        ok,
        blocks,
        x_l,
        docs_l,
        BLOCK,
        TAPS,
        WIDTH,
        SEEDED,
        DOCUMENTS,
    )
    place = (batch * length + i)[:, None] * WIDTH + cols[None, :]
    value = before / (1.0 + tl.exp(-before))
    tl.store(out + place, narrow(value, out.dtype.element_ty, INTERPRETED), mask=ok)


@triton.jit
def block_conv_backward_kernel(
    grad,
    x,
    history,
    documents,
    weight,
    bias,
    grad_x,
    grad_weight,
    grad_bias,
    blocks,
    x_b,
    x_l,
    docs_b,
    docs_l,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    SEEDED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
):
    """ALL_ROWS positions of some channels, tile by tile. grad, grad_x (b, l, c) contiguous; grad_weight (b, programs,
    k, c) and grad_bias (b, programs, c) float32, parts of the sums."""
    batch, part, length = tl.program_id(2).to(tl.int64), tl.program_id(0), blocks * BLOCK
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = cols < WIDTH
    bias_ = tl.load(bias + cols, mask=there, other=0.0).to(tl.float32)
    own_x, own_history = x + batch * x_b, history + batch * blocks * (TAPS - 1) * WIDTH
    own_documents, own_grad = documents + batch * docs_b, grad + batch * length * WIDTH
    into_bias, taps = tl.zeros([COLS], tl.float32), tl.arange(0, TAPS_PADDED)
    into_weight = tl.zeros([TAPS_PADDED, COLS], tl.float32)
    for first in range(0, ALL_ROWS, ROWS):
        i = part * ALL_ROWS + first + tl.arange(0, ROWS)
        into = tl.zeros([ROWS, COLS], tl.float32)
        # The outputs that position i enters: those of its block from k - 1 places on to its own,
        # which is the last. Not unrolled: the loads of all at a time would take more registers than
        # there are.
        upstream = into
        for behind in tl.range(0, TAPS, loop_unroll_factor=1):
            at = i + TAPS - 1 - behind
            ok = ((at < length) & (at // BLOCK == i // BLOCK))[:, None] & there[None, :]
            before = _before_activation(
                own_x,
                own_history,
                own_documents,
                weight,
                bias_,
                at,
                cols,
                ok,
                blocks,
                x_l,
                docs_l,
                BLOCK,
                TAPS,
                WIDTH,
                SEEDED,
                DOCUMENTS,
            )
            open_ = 1.0 / (1.0 + tl.exp(-before))
            g = tl.load(own_grad + at.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=ok, other=0.0).to(tl.float32)
            upstream = g * open_ * (1.0 + before * (1.0 - open_))
            w = tl.load(weight + cols * TAPS + behind, mask=there, other=0.0).to(tl.float32)
            taken = upstream * w[None, :]
            if DOCUMENTS:
                own = tl.load(own_documents + i * docs_l, mask=i < length, other=-1)
                other = tl.load(own_documents + at * docs_l, mask=at < length, other=-2)
                taken = tl.where((own == other)[:, None], taken, 0.0)
            into += taken
        inside = (i < length)[:, None] & there[None, :]
        into_bias += tl.sum(upstream, 0)
        for j in tl.static_range(TAPS):
            value = _tap(
                own_x,
                own_history,
                own_documents,
                i,
                j,
                cols,
                inside,
                blocks,
                x_l,
                docs_l,
                BLOCK,
                TAPS,
                WIDTH,
                SEEDED,
                DOCUMENTS,
            )
            into_weight += tl.where((taps == j)[:, None], tl.sum(upstream * value, 0)[None, :], 0.0)
        place = (batch * length + i)[:, None] * WIDTH + cols[None, :]
        tl.store(grad_x + place, narrow(into, grad_x.dtype.element_ty, INTERPRETED), mask=inside)
    number = batch * tl.num_programs(0) + part
    tl.store(grad_bias + number * WIDTH + cols, into_bias, mask=there)
    rows = (number * TAPS + taps)[:, None] * WIDTH + cols[None, :]
    tl.store(grad_weight + rows, into_weight, mask=(taps < TAPS)[:, None] & there[None, :])


class _BlockConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, documents: Tensor | None, block: int
    ) -> Tensor:
        ctx.save_for_backward(x, history, weight, bias, documents)
        ctx.block = block
        (b, l, c), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tensors, strides, numbers = _arguments(x, history, weight, bias, documents, block)
        with torch.cuda.device_of(x):
            grid = triton.cdiv(l, TILE), triton.cdiv(c, CHANNELS), b
            block_conv_forward_kernel[grid](*tensors, out, *strides, *numbers)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, history, weight, bias, documents = ctx.saved_tensors
        (b, length, c), taps = x.shape, weight.shape[1]
        positions = min(POSITIONS, triton.cdiv(length, TILE) * TILE)
        parts = triton.cdiv(length, positions)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight, grad_bias = (
            torch.empty(b * parts, *shape, dtype=torch.float32, device=x.device) for shape in ((taps, c), (c,))
        )
        tensors, strides, numbers = _arguments(x, history, weight, bias, documents, ctx.block)
        with torch.cuda.device_of(x):
            block_conv_backward_kernel[(parts, triton.cdiv(c, CHANNELS), b)](
                grad.contiguous(),
                *tensors,
                grad_x,
                grad_weight,
                grad_bias,
                *strides,
                *numbers,
                positions,
                1 << (taps - 1).bit_length(),
            )
        sums = grad_weight.sum(0).t().to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
        return grad_x, None, *sums, None, None


def _arguments(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, documents: Tensor | None, block: int
) -> tuple[list[Tensor], tuple[int, ...], tuple[int | bool, ...]]:
    """What both kernels read, the numbers of blocks and of steps, and the compile-time numbers."""
    # What is not there is not read.
    tensors = [x, x if history is None else history, x if documents is None else documents, weight, bias]
    strides = (x.shape[1] // block, *x.stride()[:2], *((0, 0) if documents is None else documents.stride()))
    flags = (history is not None, documents is not None, not x.is_cuda)
    return tensors, strides, (block, weight.shape[1], x.shape[2], CHANNELS, TILE, *flags)


def block_conv_triton(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, *, block: int, documents: Tensor | None = None
) -> Tensor:
    """`ops.convolution.seeded_block_conv` of bfloat16 or float32, or, with one block and no history, `causal_conv`.

    Returns:
        (b, l, c) contiguous, with gradients into x, weight and bias, none into the history.
    """
    assert x.shape[1] % block == 0, (x.shape, block)
    history = None if history is None else history.contiguous()
    return _BlockConv.apply(last_dense(x), history, weight.contiguous(), bias.contiguous(), documents, block)
