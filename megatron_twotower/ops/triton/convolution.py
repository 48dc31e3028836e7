"""The convolutions of `ops.convolution` in Triton: one forward and one backward kernel.

Importing this module imports triton. The kernels are tested in Triton's interpreter and compiled
for compute capability 9.0. They have not yet been run or timed on a GPU.

Shapes: x (b, l, c), a view with a contiguous last dimension is read without a copy; history
(b, n, k - 1, c), the inputs before each block; weight (c, k); bias (c,); documents (b, l). Tap j of
position i reads position i - (k - 1) + j: from x inside i's block, from the history before the
block. It reads zeros in another document, and before the first position without a history.

Memory traffic, in bfloat16 tensors of the size of x: in torch each tap is an operation of its own,
after a copy that puts the history before each block, and the sum is 13 forward and 42 backward. The
kernels need 2 and 3, and the history. The backward pass keeps x and the history and recomputes the
preactivation where it needs it. Everything is computed in float32 and rounded once, at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import dense_last_dimension, round_to

# Positions and channels of one tile.
TILE = 16
CHANNELS = 64
# Positions of one backward program, which sums the gradients of weight and bias over them in
# registers.
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
    """What tap j of positions i reads: (i, cols) float32. `ok`: position and channel exist."""
    HISTORY: tl.constexpr = TAPS - 1
    read, start = i - HISTORY + j, i // BLOCK * BLOCK
    seen = ok
    if not SEEDED:
        seen = ok & (read >= 0)[:, None]
    if DOCUMENTS:
        # Inputs before the first position are of its document.
        own = tl.load(documents + i.to(tl.int64) * docs_l, mask=i < blocks * BLOCK, other=-1)
        other = tl.load(documents + tl.maximum(read, 0).to(tl.int64) * docs_l, mask=i < blocks * BLOCK, other=-2)
        seen = seen & (own == other)[:, None]
    inside = seen & (read >= start)[:, None]
    value = tl.load(x + read.to(tl.int64)[:, None] * x_l + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if SEEDED:
        before = seen & (read < start)[:, None]
        slot = (i // BLOCK).to(tl.int64) * HISTORY + read - start + HISTORY
        value += tl.load(history + slot[:, None] * WIDTH + cols[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _preactivation(
    x,
    history,
    documents,
    weight,
    bias_value,
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
    """The convolution (i, cols) before its activation."""
    total = tl.zeros([i.shape[0], cols.shape[0]], tl.float32) + bias_value[None, :]
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
):
    """The output (b, l, c), contiguous, of one tile of positions and channels."""
    batch, length = tl.program_id(2).to(tl.int64), blocks * BLOCK
    i, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    ok = (i < length)[:, None] & (cols < WIDTH)[None, :]
    bias_value = tl.load(bias + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    before = _preactivation(
        x + batch * x_b,
        history + batch * blocks * (TAPS - 1) * WIDTH,
        documents + batch * docs_b,
        weight,
        bias_value,
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
    offsets = (batch * length + i)[:, None] * WIDTH + cols[None, :]
    value = before / (1.0 + tl.exp(-before))
    tl.store(out + offsets, round_to(value, out.dtype.element_ty), mask=ok)


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
    ALL_ROWS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
):
    """The gradients of ALL_ROWS positions of some channels, tile by tile.

    grad and grad_x (b, l, c) are contiguous. grad_weight (b, programs, k, c) and grad_bias
    (b, programs, c) are float32, one partial sum for each program.
    """
    batch, part, length = tl.program_id(2).to(tl.int64), tl.program_id(0), blocks * BLOCK
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    col_ok = cols < WIDTH
    bias_value = tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)
    batch_x, batch_history = x + batch * x_b, history + batch * blocks * (TAPS - 1) * WIDTH
    batch_documents, batch_grad = documents + batch * docs_b, grad + batch * length * WIDTH
    bias_sum, taps = tl.zeros([COLS], tl.float32), tl.arange(0, TAPS_PADDED)
    weight_sum = tl.zeros([TAPS_PADDED, COLS], tl.float32)
    for first in range(0, ALL_ROWS, ROWS):
        i = part * ALL_ROWS + first + tl.arange(0, ROWS)
        grad_x_i = tl.zeros([ROWS, COLS], tl.float32)
        # Position i is an input of the outputs i + k - 1, ..., i of its block, in this order. After
        # the loop, `upstream` is that of i itself. Not unrolled: the loads of all taps at once
        # would need more registers than there are.
        upstream = grad_x_i
        for tap in tl.range(0, TAPS, loop_unroll_factor=1):
            at = i + TAPS - 1 - tap
            ok = ((at < length) & (at // BLOCK == i // BLOCK))[:, None] & col_ok[None, :]
            before = _preactivation(
                batch_x,
                batch_history,
                batch_documents,
                weight,
                bias_value,
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
            sigmoid = 1.0 / (1.0 + tl.exp(-before))
            g = tl.load(batch_grad + at.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=ok, other=0.0)
            upstream = g.to(tl.float32) * sigmoid * (1.0 + before * (1.0 - sigmoid))
            w = tl.load(weight + cols * TAPS + tap, mask=col_ok, other=0.0).to(tl.float32)
            product = upstream * w[None, :]
            if DOCUMENTS:
                own = tl.load(batch_documents + i.to(tl.int64) * docs_l, mask=i < length, other=-1)
                other = tl.load(batch_documents + at.to(tl.int64) * docs_l, mask=at < length, other=-2)
                product = tl.where((own == other)[:, None], product, 0.0)
            grad_x_i += product
        inside = (i < length)[:, None] & col_ok[None, :]
        bias_sum += tl.sum(upstream, 0)
        for j in tl.static_range(TAPS):
            value = _tap(
                batch_x,
                batch_history,
                batch_documents,
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
            weight_sum += tl.where((taps == j)[:, None], tl.sum(upstream * value, 0)[None, :], 0.0)
        offsets = (batch * length + i)[:, None] * WIDTH + cols[None, :]
        tl.store(grad_x + offsets, round_to(grad_x_i, grad_x.dtype.element_ty), mask=inside)
    number = batch * tl.num_programs(0) + part
    tl.store(grad_bias + number * WIDTH + cols, bias_sum, mask=col_ok)
    rows = (number * TAPS + taps)[:, None] * WIDTH + cols[None, :]
    tl.store(grad_weight + rows, weight_sum, mask=(taps < TAPS)[:, None] & col_ok[None, :])


class _BlockConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, documents: Tensor | None, block: int
    ) -> Tensor:
        ctx.save_for_backward(x, history, weight, bias, documents)
        ctx.block = block
        (b, l, c), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tensors, strides, constants = _arguments(x, history, weight, bias, documents, block)
        with torch.cuda.device_of(x):
            grid = triton.cdiv(l, TILE), triton.cdiv(c, CHANNELS), b
            block_conv_forward_kernel[grid](*tensors, out, *strides, *constants)
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
        tensors, strides, constants = _arguments(x, history, weight, bias, documents, ctx.block)
        with torch.cuda.device_of(x):
            block_conv_backward_kernel[(parts, triton.cdiv(c, CHANNELS), b)](
                grad.contiguous(),
                *tensors,
                grad_x,
                grad_weight,
                grad_bias,
                *strides,
                *constants,
                positions,
                1 << (taps - 1).bit_length(),
            )
        sums = grad_weight.sum(0).t().to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
        return grad_x, None, *sums, None, None


def _arguments(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, documents: Tensor | None, block: int
) -> tuple[list[Tensor], tuple[int, ...], tuple[int | bool, ...]]:
    """Arguments of both kernels: tensors, number of blocks and strides, constants."""
    # The kernels do not read the tensors passed in place of a missing history or documents.
    tensors = [x, x if history is None else history, x if documents is None else documents, weight, bias]
    strides = (x.shape[1] // block, *x.stride()[:2], *((0, 0) if documents is None else documents.stride()))
    flags = (history is not None, documents is not None)
    return tensors, strides, (block, weight.shape[1], x.shape[2], CHANNELS, TILE, *flags)


def block_conv_triton(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, *, block: int, documents: Tensor | None = None
) -> Tensor:
    """`seeded_block_conv`, or `causal_conv` (one block, no history), in bfloat16 or float32.

    Returns:
        (b, l, c), contiguous. Gradients flow into x, weight and bias, not into the history.
    """
    assert x.shape[1] % block == 0, (x.shape, block)
    history = None if history is None else history.contiguous()
    return _BlockConv.apply(dense_last_dimension(x), history, weight.contiguous(), bias.contiguous(), documents, block)
