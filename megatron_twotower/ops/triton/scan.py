"""The two-stream scan of `ops.scan` in Triton, forward and backward.

Importing this module imports triton. The kernels are tested in Triton's interpreter and compiled
for compute capability 9.0. They have not yet been run or timed on a GPU.

Dimensions: b batch, l length, m heads, p head size, g groups, d state size, s block, q chunk. One
program computes a tile, a few complete blocks of one chunk, for all heads of one group, one head
after another. It computes the products C B^T once for all heads of the group, and sums the
gradients of B and C over the heads in registers, without atomics. Tiles, p, d and q are padded to
powers of two of at least 16, with masks.

A first small kernel computes three log decays by position, float32 (b, m, l'), where l' is the
length rounded up to complete chunks. A tilde marks the noisy stream:

    block_decay_i = sum of dt~ A~ from the start of i's block to i
    chunk_decay_i = block_decay_i + sum of clean dt A from the chunk's start to before i's block
    clean_decay_j = sum of clean dt A from the chunk's start to j

With the scores C~_i . B_j, the noisy scores~ C~_i . B~_j, and h the clean state at the chunk's
start, the output is an inter-chunk term, two intra-chunk terms and the skip connection:

    y_i = exp(chunk_decay_i) C~_i h
        + sum_{j before i's block} scores_ij exp(chunk_decay_i - clean_decay_j) dt_j x_j
        + sum_{j <= i in i's block} scores~_ij exp(block_decay_i - block_decay_j) dt~_j x~_j
        + D x~_i

The exponents of masked pairs can be positive. They are limited to 0 before the exponential, and the
scores of these pairs are zero. The backward pass keeps only the inputs of the forward pass. The
gradient of a log decay is the sum over its row of the gradients of the weighted scores, minus the
sum over its column, all in float32. (The shorter formula g . y - u . du of `ops.scan` is the
difference of two large sums, and here y would be rounded to bfloat16.)

Precision: all sums are in float32. Float32 inputs are multiplied as three TF32 products, which
keeps the accuracy of float32. Bfloat16 inputs enter the products unchanged: dt and exp(...) are
multiplied into the scores, which are rounded to bfloat16 once. The clean state can be thousands of
times larger than the inputs, and enters as a high and a low bfloat16 part.

Memory traffic, in units of x: B and C are g d / (m p) each, the float32 states 2 d / q (bfloat16)
or d / q. Forward reads x, clean x, C, B, clean B and the states and writes y. Backward reads the
gradient of y twice, x, clean x, C twice, B, clean B and the states, writes the gradients of x and
B, writes the gradient of C twice and reads it once. At the dimensions of Nano (m 64, p 64, g 8,
d 128, q 128, bfloat16) this is 5.75 and 9 units of 8 KiB per position.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_twotower.ops.scan_chunks import MAX_CHUNK
from megatron_twotower.ops.triton import scan_kernels as kernels
from megatron_twotower.ops.triton.common import dense_last_dimension, padded_size

# The largest block, head size and state size of the kernels, by bytes of an input element: they
# have to fit into 227 KiB of shared memory.
LIMITS = {2: {"block": 128, "head size": 128, "state size": 256}, 4: {"block": 64, "head size": 64, "state size": 128}}


def unsupported(x: Tensor, B: Tensor, *, block: int, chunk: int) -> str | None:
    """`None`, or why the kernels do not take x (b, l, m, p) and B (b, l, g, d)."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}, expected bfloat16 or float32"
    if chunk % block:
        return f"blocks of {block} tokens in chunks of {chunk}, expected whole blocks"
    found = {"block": block, "head size": x.shape[-1], "state size": B.shape[-1], "chunk": chunk}
    limits = {**LIMITS[x.element_size()], "chunk": MAX_CHUNK}
    too_large = (
        f"{name} {size}, expected at most {limits[name]}" for name, size in found.items() if size > limits[name]
    )
    return next(too_large, None)


class TileConstants(NamedTuple):
    """Compile-time constants of the kernels of tiles, in the order of their last parameters.

    Attributes:
        heads: Of one rank.
        group_heads: Heads of one group.
        head_size: p.
        state: d.
        block: s.
        chunk: q.
        tile: Positions of a tile, a multiple of `block`.
        tiles: Tiles of a chunk.
        rows: `tile`, padded.
        keys: Clean positions that are multiplied with a tile at once: all of a chunk, or half.
        head_size_padded: `head_size`, padded.
        state_padded: `state`, padded.
        documents: Whether documents separate positions.
    """

    heads: int
    group_heads: int
    head_size: int
    state: int
    block: int
    chunk: int
    tile: int
    tiles: int
    rows: int
    keys: int
    head_size_padded: int
    state_padded: int
    documents: bool


class Launch(NamedTuple):
    """How a kernel of tiles is launched.

    Attributes:
        tile: The most positions of a tile, unless one block has more.
        warps: Triton's num_warps.
        stages: Triton's num_stages.
    """

    tile: int
    warps: int
    stages: int


# By kernel and bytes of an input element, at head sizes and states up to those of Nano. Chosen from
# the compiler's reports for compute capability 9.0, not from timings. In bfloat16: eight warps per
# multiprocessor, the loads of the next head overlap with the current one, and the loops read some
# spilled registers from memory but write hardly any.
LAUNCHES = {
    ("forward", 2): Launch(128, 8, 2),
    ("forward", 4): Launch(64, 4, 1),
    ("backward_clean", 2): Launch(128, 8, 2),
    ("backward_clean", 4): Launch(64, 8, 1),
    ("backward_block", 2): Launch(64, 4, 2),
    ("backward_block", 4): Launch(32, 4, 1),
}
NANO_HEAD = 64 * 128


def tile_constants(
    kernel: str, x: Tensor, B: Tensor, *, block: int, chunk: int, documents: bool
) -> tuple[TileConstants, Launch]:
    """The constants and the launch of a kernel. x (b, l, m, p), B (b, l, g, d)."""
    m, p, g, d = *x.shape[2:], *B.shape[2:]
    launch = LAUNCHES[kernel, x.element_size()]
    if padded_size(p) * padded_size(d) > NANO_HEAD:
        launch = Launch(min(launch.tile, 64), 4, 1)
    tile = block * min(max(1, launch.tile // block), chunk // block)
    if padded_size(tile) > launch.tile:
        launch = launch._replace(warps=8)
    constants = TileConstants(
        heads=m,
        group_heads=m // g,
        head_size=p,
        state=d,
        block=block,
        chunk=chunk,
        tile=tile,
        tiles=-(-chunk // tile),
        rows=padded_size(tile),
        keys=min(padded_size(chunk), MAX_CHUNK // 2),
        head_size_padded=padded_size(p),
        state_padded=padded_size(d),
        documents=documents,
    )
    return constants, launch


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that a kernel takes: all of (b, l) and (b, l, m), all but the last of others."""
    return tensor.stride()[: max(3, tensor.dim() - 1)]


def _launch_by_head(
    kernel: Any, tensors: list[Tensor], *, like: Tensor, strided: list[Tensor], block: int, chunk: int
) -> None:
    """Launch one program per head and chunk. like: dt (b, l, m)."""
    b, l, m = like.shape
    strides = [stride for tensor in strided for stride in _strides(tensor)]
    sizes = (m, block, chunk, padded_size(chunk), min(32, padded_size(chunk)))
    kernel[(b * m * -(-l // chunk),)](*tensors, *strides, l, *sizes, num_warps=4, enable_fp_fusion=True)


def _launch_tiles(
    name: str, compiled: tuple[TileConstants, Launch], tensors: list[Tensor], *, strided: list[Tensor]
) -> None:
    """Launch one program per tile and group. strided starts with a tensor (b, l, m, p)."""
    constants, launch = compiled
    b, l = strided[0].shape[:2]
    strides = [stride for tensor in strided for stride in _strides(tensor)]
    grid = (b * -(-l // constants.chunk) * constants.tiles, constants.heads // constants.group_heads)
    kernel = getattr(kernels, f"{name}_kernel")
    # Fused multiply-add, the default of Triton up to 3.9.
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    kernel[grid](*tensors, *strides, l, *constants, **options)


def _decays(dt: Tensor, A: Tensor, clean_dt: Tensor, clean_A: Tensor, block: int, chunk: int) -> list[Tensor]:
    """block_decay, chunk_decay and clean_decay of the module's docstring."""
    out = [_by_head(dt, chunk) for _ in range(3)]
    _launch_by_head(
        kernels.decay_kernel,
        [dt, A, clean_dt, clean_A, *out],
        like=dt,
        strided=[dt, clean_dt],
        block=block,
        chunk=chunk,
    )
    return out


def _by_head(dt: Tensor, chunk: int) -> Tensor:
    """An uninitialised float32 tensor (b, m, l')."""
    b, l, m = dt.shape
    return torch.empty(b, m, -(-l // chunk) * chunk, dtype=torch.float32, device=dt.device)


class _TwoStreamScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        clean_x: Tensor,
        clean_dt: Tensor,
        clean_A: Tensor,
        clean_B: Tensor,
        states: Tensor,
        block: int,
        chunk: int,
        documents: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, documents)
        ctx.block, ctx.chunk = block, chunk
        rows = dt[..., 0] if documents is None else documents  # the kernels do not read them without documents
        compiled = tile_constants("forward", x, B, block=block, chunk=chunk, documents=documents is not None)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            decays = _decays(dt, A, clean_dt, clean_A, block, chunk)
            _launch_tiles(
                "forward",
                compiled,
                [x, dt, B, C, D, clean_x, clean_dt, clean_B, states, *decays, rows, y],
                strided=[x, dt, B, C, clean_x, clean_dt, clean_B, states, y, rows],
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, documents = ctx.saved_tensors
        block, chunk, m = ctx.block, ctx.chunk, x.shape[2]
        rows = dt[..., 0] if documents is None else documents
        grad = dense_last_dimension(grad)
        through_clean, in_block = (
            tile_constants(name, x, B, block=block, chunk=chunk, documents=documents is not None)
            for name in ("backward_clean", "backward_block")
        )
        grad_x, grad_dt, grad_B, grad_C = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        parts = x.shape[0] * states.shape[1]
        grad_A, grad_D = (dt.new_empty(count, m) for count in (parts, parts * in_block[0].tiles))
        grad_dt_direct, grad_block_decay, grad_chunk_decay = (_by_head(dt, chunk) for _ in range(3))
        with torch.cuda.device_of(x):
            decays = _decays(dt, A, clean_dt, clean_A, block, chunk)
            _launch_tiles(
                "backward_clean",
                through_clean,
                [grad, C, clean_x, clean_dt, clean_B, states, *decays[1:], rows, grad_C, grad_chunk_decay],
                strided=[grad, C, clean_x, clean_dt, clean_B, states, rows],
            )
            _launch_tiles(
                "backward_block",
                in_block,
                [
                    grad,
                    x,
                    dt,
                    B,
                    C,
                    D,
                    decays[0],
                    rows,
                    grad_x,
                    grad_B,
                    grad_C,
                    grad_D,
                    grad_dt_direct,
                    grad_block_decay,
                ],
                strided=[grad, x, dt, B, C, rows],
            )
            _launch_by_head(
                kernels.decay_backward_kernel,
                [dt, A, grad_dt_direct, grad_block_decay, grad_chunk_decay, grad_dt, grad_A],
                like=dt,
                strided=[dt],
                block=block,
                chunk=chunk,
            )
        sums = grad_A.sum(0).to(A.dtype), grad_D.sum(0).to(D.dtype)
        return grad_x, grad_dt, sums[0], grad_B, grad_C, sums[1], *[None] * 8


def two_stream_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    clean_x: Tensor,
    clean_dt: Tensor,
    clean_A: Tensor,
    clean_B: Tensor,
    states: Tensor,
    block: int,
    chunk: int,
    documents: Tensor | None = None,
) -> Tensor:
    """`ops.scan.two_stream_scan` for inputs that are not `unsupported`.

    Args:
        x: (b, l, m, p), bfloat16 or float32, like B, C, clean_x and clean_B. Views whose last
            dimension is contiguous are read without a copy.
        dt: (b, l, m) float32, like clean_dt.
        A: (m,), of any floating dtype, like D and clean_A.
        states: (b, ceil(l / chunk), m, p, d) float32, the clean state at the start of each chunk.
        block: s.
        chunk: q, a multiple of `block`.
        documents: (b, l), of an integer dtype, not negative.

    Returns:
        y (b, l, m, p) in x's dtype, contiguous. Gradients flow into x, dt, A, B, C and D, not into
        the clean stream.
    """
    reason = unsupported(x, B, block=block, chunk=chunk)
    assert reason is None, reason
    assert x.shape[1] % block == 0, (x.shape, block)
    assert {t.dtype for t in (B, C, clean_x, clean_B)} == {x.dtype}
    assert {t.dtype for t in (dt, clean_dt, states)} == {torch.float32}
    assert states.shape == (x.shape[0], -(-x.shape[1] // chunk), *x.shape[2:], B.shape[3]), states.shape
    x, B, C, clean_x, clean_B, states = (dense_last_dimension(t) for t in (x, B, C, clean_x, clean_B, states))
    clean = (clean_x, clean_dt, clean_A.contiguous(), clean_B, states)
    return _TwoStreamScan.apply(x, dt, A.contiguous(), B, C, D.contiguous(), *clean, block, chunk, documents)
