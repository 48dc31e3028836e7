"""The two-stream scan of `ops.scan` in Triton, forward and backward. Importing this module imports triton.

Tested in Triton's interpreter, and compiled for compute capability 9.0; not yet run or timed on a
GPU.

Dimensions: b batch, l length, m heads, p head size, g groups, d state size, r = m / g heads per
group, s block, q chunk. A program takes the positions of a few whole blocks of one chunk (a tile)
for the heads of one group, one after the other: the products C B^T are made once for all heads of a
group, and the gradients of B and C are summed over them in registers, without atomics. Tiles, p, d
and q are padded to powers of two of at least 16 by masks.

Log decays come from a first small kernel, by position, in float32 (b, m, l'), l' the length in
whole chunks:

    own_i   = sum of dt~ A~ from the start of i's block to i
    since_i = own_i + sum of clean dt A from the chunk's start to just before i's block
    clean_j = sum of clean dt A from the chunk's start to j

Then, with scores C~_i . B_j of either stream and h the clean state at the chunk's start,

    y_i = exp(since_i) C~_i h + sum_{j before i's block} scores_ij exp(since_i - clean_j) dt_j x_j
        + sum_{j <= i in i's block} scores~_ij exp(own_i - own_j) dt~_j x~_j + D x~_i

Exponents of pairs that do not count can be positive: they are cut off at 0 before the exponential,
and their scores are zero. The backward pass needs nothing of the forward pass but its inputs: the
gradient of a log decay is the sum of its row of weighted scores' gradients, less that of its
column, all in float32. (The shorter g . y - u . du is the difference of two large sums, and y would
be rounded to bfloat16.)

Precision: sums in float32. Float32 inputs are multiplied as three TF32 products, which keeps
float32's accuracy. Bfloat16 inputs enter products as they are, dt and exp(...) folded into the
scores, which are rounded to bfloat16 once; the clean state, which can be thousands of times the
inputs, as a high and a low bfloat16 part.

Memory traffic, in units of x, with B and C g d / (m p) each and the float32 states 2 d / q
(bfloat16) or d / q: forward reads x, clean x, C, B, clean B and the states and writes y; backward
reads y's gradient twice, x, clean x, C twice, B, clean B and the states, writes the gradients of x
and B, and that of C twice, reading it once. At Nano's dimensions (m 64, p 64, g 8, d 128, q 128,
bfloat16) that is 5.75 and 9 units of 8 KiB per position. Between forward and backward only the
inputs are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_twotower.ops.triton import scan_kernels as kernels
from megatron_twotower.ops.triton.common import last_dense, padded

# Most that the kernels take of block, head size and state size, by bytes per input element: what
# fits in 227 KiB of shared memory.
MOST = {2: {"block": 128, "head size": 128, "state size": 256}, 4: {"block": 64, "head size": 64, "state size": 128}}
MAX_CHUNK = 128


def supported(x: Tensor, B: Tensor, *, block: int, chunk: int) -> str | None:
    """Why the kernels do not take these inputs, in a few words; None when they do. x (b, l, m, p), B (b, l, g, d)."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}, expected bfloat16 or float32"
    if chunk % block:
        return f"blocks of {block} tokens in chunks of {chunk}, expected whole blocks"
    found = {"block": block, "head size": x.shape[-1], "state size": B.shape[-1], "chunk": chunk}
    most = {**MOST[x.element_size()], "chunk": MAX_CHUNK}
    too_large = (f"{name} {found[name]}, expected at most {most[name]}" for name in found if found[name] > most[name])
    return next(too_large, None)


class TileNumbers(NamedTuple):
    """Compile-time numbers of the kernels of tiles, in the order of their last parameters."""

    heads: int
    share: int  # heads of a group
    head_size: int
    state: int
    block: int
    chunk: int
    tile: int  # positions of a tile, whole blocks
    tiles: int  # of a chunk
    rows_padded: int
    keys: int  # clean positions of the chunk that meet a tile at once: all, or half of them
    head_size_padded: int
    state_padded: int
    documents: bool
    interpreted: bool


class Launch(NamedTuple):
    """Positions that a tile aims at, and how its kernel is compiled."""

    tile: int
    warps: int
    stages: int


# By kernel and bytes per input element, at head sizes and states up to Nano's. From the compiler's
# reports for compute capability 9.0, not from timings. With bfloat16: eight warps per
# multiprocessor, loads of the next head under way, and loops that reload some registers from memory
# but write hardly any.
LAUNCHES = {
    ("forward", 2): Launch(128, 8, 2),
    ("forward", 4): Launch(64, 4, 1),
    ("backward_left", 2): Launch(128, 8, 2),
    ("backward_left", 4): Launch(64, 8, 1),
    ("backward_own", 2): Launch(64, 4, 2),
    ("backward_own", 4): Launch(32, 4, 1),
}
NANO_HEAD = 64 * 128


def tile_numbers(
    kernel: str, x: Tensor, B: Tensor, *, block: int, chunk: int, documents: bool, interpreted: bool
) -> tuple[TileNumbers, Launch]:
    """What to compile a kernel for, and how. x (b, l, m, p), B (b, l, g, d)."""
    m, p, g, d = *x.shape[2:], *B.shape[2:]
    launch = LAUNCHES[kernel, x.element_size()]
    if padded(p) * padded(d) > NANO_HEAD:
        launch = Launch(min(launch.tile, 64), 4, 1)
    tile = block * min(max(1, launch.tile // block), chunk // block)
    if padded(tile) > launch.tile:
        launch = launch._replace(warps=8)
    numbers = TileNumbers(
        heads=m,
        share=m // g,
        head_size=p,
        state=d,
        block=block,
        chunk=chunk,
        tile=tile,
        tiles=-(-chunk // tile),
        rows_padded=padded(tile),
        keys=min(padded(chunk), MAX_CHUNK // 2),
        head_size_padded=padded(p),
        state_padded=padded(d),
        documents=documents,
        interpreted=interpreted,
    )
    return numbers, launch


def _steps(tensor: Tensor) -> tuple[int, ...]:
    """Strides that a kernel takes: all of (b, l) and (b, l, m), all but the last, which is 1, of the others."""
    return tensor.stride()[: max(3, tensor.dim() - 1)]


def _run_by_head(
    kernel: Any, tensors: list[Tensor], *, like: Tensor, strided: list[Tensor], block: int, chunk: int
) -> None:
    """One program per head and chunk. like: dt (b, l, m)."""
    b, l, m = like.shape
    steps = [step for tensor in strided for step in _steps(tensor)]
    sizes = (m, block, chunk, padded(chunk), min(32, padded(chunk)))
    kernel[(b * m * -(-l // chunk),)](*tensors, *steps, l, *sizes, num_warps=4, enable_fp_fusion=True)


def _run_tiles(name: str, planned: tuple[TileNumbers, Launch], tensors: list[Tensor], *, strided: list[Tensor]) -> None:
    """One program per tile and group. strided begins with a tensor (b, l, m, p)."""
    numbers, launch = planned
    b, l = strided[0].shape[:2]
    steps = [step for tensor in strided for step in _steps(tensor)]
    grid = (b * -(-l // numbers.chunk) * numbers.tiles, numbers.heads // numbers.share)
    kernel = getattr(kernels, f"{name}_kernel")
    # Multiplications and additions join where they can, as is Triton's default up to 3.9.
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    kernel[grid](*tensors, *steps, l, *numbers, **options)


def _decays(dt: Tensor, A: Tensor, clean_dt: Tensor, clean_A: Tensor, block: int, chunk: int) -> list[Tensor]:
    """own, since and clean of the module's docstring: (b, m, l') float32 each."""
    out = [_by_head(dt, chunk) for _ in range(3)]
    _run_by_head(
        kernels.decay_kernel,
        [dt, A, clean_dt, clean_A, *out],
        like=dt,
        strided=[dt, clean_dt],
        block=block,
        chunk=chunk,
    )
    return out


def _by_head(dt: Tensor, chunk: int) -> Tensor:
    """An empty (b, m, l')."""
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
        rows = dt[..., 0] if documents is None else documents  # not read without documents
        planned = tile_numbers(
            "forward", x, B, block=block, chunk=chunk, documents=documents is not None, interpreted=not x.is_cuda
        )
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            decays = _decays(dt, A, clean_dt, clean_A, block, chunk)
            _run_tiles(
                "forward",
                planned,
                [x, dt, B, C, D, clean_x, clean_dt, clean_B, states, *decays, rows, y],
                strided=[x, dt, B, C, clean_x, clean_dt, clean_B, states, y, rows],
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, documents = ctx.saved_tensors
        block, chunk, m = ctx.block, ctx.chunk, x.shape[2]
        rows = dt[..., 0] if documents is None else documents
        grad = last_dense(grad)
        left, own = (
            tile_numbers(
                name, x, B, block=block, chunk=chunk, documents=documents is not None, interpreted=not x.is_cuda
            )
            for name in ("backward_left", "backward_own")
        )
        grad_x, grad_dt, grad_B, grad_C = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        parts = x.shape[0] * states.shape[1]
        grad_A, grad_D = (dt.new_empty(count, m) for count in (parts, parts * own[0].tiles))
        into_dt, into_own, into_since = (_by_head(dt, chunk) for _ in range(3))
        with torch.cuda.device_of(x):
            decays = _decays(dt, A, clean_dt, clean_A, block, chunk)
            _run_tiles(
                "backward_left",
                left,
                [grad, C, clean_x, clean_dt, clean_B, states, *decays[1:], rows, grad_C, into_since],
                strided=[grad, C, clean_x, clean_dt, clean_B, states, rows],
            )
            _run_tiles(
                "backward_own",
                own,
                [grad, x, dt, B, C, D, decays[0], rows, grad_x, grad_B, grad_C, grad_D, into_dt, into_own],
                strided=[grad, x, dt, B, C, rows],
            )
            _run_by_head(
                kernels.decay_backward_kernel,
                [dt, A, into_dt, into_own, into_since, grad_dt, grad_A],
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
    """`ops.scan.two_stream_scan` for what `supported` takes, in one kernel forward and two backward.

    Args: x, B, C, clean_x, clean_B: of one dtype, bfloat16 or float32; views are read by their
        strides, without copies, as long as their last dimension is dense. A, D and clean_A: dense,
        of any floating dtype. dt, clean_dt: (b, l, m) float32. states: (b, ceil(l / chunk), m, p,
        d) float32. documents: (b, l), of an integer dtype, 0 or more.

    Returns: y (b, l, m, p) in x's dtype, contiguous. Gradients of x, dt, A, B, C and D, none into
        the clean stream.
    """
    reason = supported(x, B, block=block, chunk=chunk)
    assert reason is None, reason
    assert x.shape[1] % block == 0, (x.shape, block)
    assert {t.dtype for t in (B, C, clean_x, clean_B)} == {x.dtype}
    assert {t.dtype for t in (dt, clean_dt, states)} == {torch.float32}
    assert states.shape == (x.shape[0], -(-x.shape[1] // chunk), *x.shape[2:], B.shape[3]), states.shape
    x, B, C, clean_x, clean_B, states = (last_dense(t) for t in (x, B, C, clean_x, clean_B, states))
    clean = (clean_x, clean_dt, clean_A.contiguous(), clean_B, states)
    return _TwoStreamScan.apply(x, dt, A.contiguous(), B, C, D.contiguous(), *clean, block, chunk, documents)
