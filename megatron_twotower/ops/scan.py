"""State-space scan of Mamba-2, for one stream and for a noisy stream seeded by a clean one.

Dimensions: b batch, l length, m heads, p head size, g groups, d state size, q chunk, s block, n = l
/ s blocks.
Shapes: x (b, l, m, p); dt (b, l, m), positive; A (m,), negative; B, C (b, l, g, d); D (m,); states
(b, l/q, m, p, d); documents (b, l) int32, growing along l: no state passes from one document to
another. Head i belongs to group i // (m / g). Everything is computed in float32, or in float64 when
x is float64.

The recurrence of one head (Mamba-2, Dao and Gu 2024, section 6; model layout of NemotronH):

    h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T,    y_i = h_i C_i + D x_i

Block b of the noisy stream starts from the clean stream's h after position b s - 1, block 0 from
zeros.

Both scans go group by group, so that what lives beside inputs and outputs is of the size of one
group, and have a backward pass by hand, which keeps inputs, outputs and one state per chunk and
computes the rest again. With g the gradient of y and u = dt x, that of the running log decay is g_i
. (y_i - D x_i) - u_i . du_i, whatever the chunks.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch
from megatron_twotower.ops.scan_chunks import (
    Reach,
    add_within,
    document_before,
    document_rows,
    grad_into_dt,
    grad_into_x,
    in_chunks,
    in_tiles,
    pieces,
    reach_of,
    read_from,
    read_from_backward,
    tile_factors,
    tile_length,
    within_backward,
    working_dtype,
)

# What the Triton kernels take: they hold the scores of a chunk in shared memory.
LONGEST_CHUNK = 128


def chunk_length(block: int, *, preferred: int) -> int:
    """Tokens per chunk: the block doubled while that stays within `preferred` and LONGEST_CHUNK.

    A block longer than that: its largest divisor up to `preferred`, or, if all of these are small,
    the block itself.
    """
    preferred = min(preferred, LONGEST_CHUNK)
    if block <= preferred:
        return block << ((preferred // block).bit_length() - 1)
    divisor = max(q for q in range(1, preferred + 1) if block % q == 0)
    return divisor if 4 * divisor >= preferred else block


# --- one stream ---------------------------------------------------------------------------------------------------


class _Stream(NamedTuple):
    """One stream in chunks. running (c, q, m): log decay from the chunk's start. reach: of its positions. write
    (c, q, m): factor of u_j in the state at the chunk's end. keep (b, l/q, m): of the state from
    end to end. rows (c, q): documents."""

    running: Tensor
    reach: Reach
    write: Tensor
    keep: Tensor
    rows: Tensor | None


def _stream(dt: Tensor, A: Tensor, documents: Tensor | None, batch: int) -> _Stream:
    """dt (c, q, m) in the working dtype; documents (b, l)."""
    chunk = dt.shape[1]
    running, rows = (dt * A).cumsum(1), document_rows(documents, chunk)
    total = running[:, -1:]
    write, keep = (total - running).exp(), total.exp().view(batch, -1, len(A))
    if rows is not None:
        write = write * (rows == rows[:, -1:]).unsqueeze(-1)
        keep = keep * (rows[:, -1:] == document_before(rows, batch)).view(batch, -1, 1)
    return _Stream(running, reach_of(running, running, rows, batch, tile_length(chunk)), write, keep, rows)


def _pass_on(states: Tensor, keep: Tensor, initial: Tensor | None) -> Tensor:
    """Run the recurrence over chunks in place: from what each chunk adds (b, c, m, p, d) to the state before each.

    Returns the state after the last (b, m, p, d).
    """
    state = torch.zeros_like(states[:, 0]) if initial is None else initial.to(states.dtype)
    for c in range(states.shape[1]):
        after = torch.addcmul(states[:, c], keep[:, c, :, None, None], state)
        states[:, c] = state
        state = after
    return state


def _pass_back(grads: Tensor, states: Tensor, final: Tensor, keep: Tensor) -> Tensor:
    """The gradient of `_pass_on`, in place: from that of each chunk's reads to that of what each chunk adds.

    Returns the gradient of each chunk's total log decay (b, c, m).
    """
    gradient, after = torch.zeros_like(final), final
    totals = torch.empty_like(keep)
    for c in reversed(range(grads.shape[1])):
        totals[:, c] = torch.linalg.vecdot(gradient.flatten(2), after.flatten(2))
        before = torch.addcmul(grads[:, c], keep[:, c, :, None, None], gradient)
        grads[:, c] = gradient
        gradient, after = before, states[:, c]
    return totals


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        chunk: int,
        initial: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, (b, l, m, p), (g, d) = working_dtype(x), x.shape, B.shape[2:]
        xs, dts, Bs, Cs = (in_chunks(t, chunk) for t in (x, dt.to(dtype), B, C))
        stream, tile, skip = _stream(dts, A.to(dtype), documents, b), tile_length(chunk), D.to(dtype).unsqueeze(-1)
        states = torch.empty(len(xs), m, p, d, dtype=dtype, device=x.device)
        factors = dts * stream.write
        for part, i, heads in pieces(xs, g):
            written = (xs[part, :, heads].to(dtype) * factors[part, :, heads].unsqueeze(-1)).flatten(2)
            added = torch.bmm(written.transpose(1, 2), Bs[part, :, i].to(dtype))
            states[part, heads] = added.unflatten(1, (-1, p))
        final = _pass_on(states.unflatten(0, (b, -1)), stream.keep, initial)

        y = torch.empty(len(xs), chunk, m, p, dtype=dtype, device=x.device)
        for part, i, heads in pieces(xs, g):
            x_i, dt_i, out = xs[part, :, heads].to(dtype), dts[part, :, heads], y[part, :, heads]
            B_i, C_i, before = Bs[part, :, i].to(dtype), Cs[part, :, i].to(dtype), states[part, heads].flatten(1, 2)
            read_from(out, x_i * dt_i.unsqueeze(-1), B_i, C_i, before, stream.reach, part, heads)
            own = [in_tiles(t, tile) for t in (x_i, dt_i, B_i, C_i)]
            add_within(in_tiles(out, tile), tile_factors(stream.running[part, :, heads], stream.rows, part, tile), *own)
            out.addcmul_(x_i, skip[heads])
        y, states = y.view(b, -1, m, p)[:, :l], states.unflatten(0, (b, -1))
        ctx.save_for_backward(x, dt, A, B, C, D, y, states, final, documents)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(states, final)
        return y.to(x.dtype), states, final

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, y, states, final, documents = ctx.saved_tensors
        chunk, dtype, (b, l), g = ctx.chunk, y.dtype, x.shape[:2], B.shape[2]
        xs, dts, Bs, Cs, ys, gs = (in_chunks(t, chunk) for t in (x, dt.to(dtype), B, C, y, grad))
        stream, tile, skip = _stream(dts, A.to(dtype), documents, b), tile_length(chunk), D.to(dtype)
        grads, before = torch.empty_like(states), states.flatten(0, 1)
        added = grads.flatten(0, 1)
        for part, i, heads in pieces(xs, g):
            read = (gs[part, :, heads].to(dtype) * stream.reach.read[part, :, heads].unsqueeze(-1)).flatten(2)
            added[part, heads] = torch.bmm(read.transpose(1, 2), Cs[part, :, i].to(dtype)).view_as(added[part, heads])
        totals = _pass_back(grads, states, final, stream.keep).flatten(0, 1)

        grad_x, grad_B, grad_C = torch.empty_like(xs), torch.empty_like(Bs), torch.empty_like(Cs)
        decay, by_u, by_skip = (torch.empty_like(dts) for _ in range(3))
        for part, i, heads in pieces(xs, g):
            x_i, dt_i, g_i = xs[part, :, heads].to(dtype), dts[part, :, heads], gs[part, :, heads].to(dtype)
            B_i, C_i = Bs[part, :, i].to(dtype), Cs[part, :, i].to(dtype)
            own = [in_tiles(t, tile) for t in (g_i, x_i, dt_i, B_i, C_i)]
            pairs = tile_factors(stream.running[part, :, heads], stream.rows, part, tile)
            u_, B_, C_ = (t.view(len(x_i), chunk, *t.shape[2:]) for t in within_backward(pairs, *own))
            u, into = x_i * dt_i.unsqueeze(-1), added[part, heads].flatten(1, 2)
            write = stream.write[part, :, heads].unsqueeze(-1)
            u_.addcmul_(torch.bmm(B_i, into.transpose(1, 2)).view_as(u_), write)
            B_.baddbmm_((u * write).flatten(2), into)
            read_from_backward(
                g_i, u, B_i, C_i, before[part, heads].flatten(1, 2), stream.reach, part, heads, C_, u_, B_
            )
            grad_B[part, :, i], grad_C[part, :, i] = B_, C_
            decay[part, :, heads], by_u[part, :, heads], by_skip[part, :, heads] = grad_into_x(
                x_i, dt_i, skip[heads], ys[part, :, heads], g_i, u_, out=grad_x[part, :, heads]
            )
        decay[:, -1] += totals
        grad_dt, grad_A = grad_into_dt(decay, by_u, dts, A.to(dtype), span=chunk)
        grad_x, grad_dt, grad_B, grad_C = (
            t.reshape(b, -1, *t.shape[2:])[:, :l] for t in (grad_x, grad_dt.to(dt.dtype), grad_B, grad_C)
        )
        grad_D = by_skip.sum((0, 1)).to(D.dtype)
        return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D, None, None, None


def _mamba_ssm_serves(x: Tensor) -> bool:
    # In float32 its products are TF32's (no input_precision in mamba-ssm 2.2.4 and 2.3.2,
    # ops/triton/ssd_*.py), which leaves a thousandth of error where this module computes in
    # float32.
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dispatch.unavailable("mamba-ssm") is None


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk: int,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan of one stream, chunk by chunk; on CUDA in half precision, where no gradient is wanted, by mamba-ssm.

    Args: initial: the state before position 0 (b, m, p, d), of its document; zeros when left out.
        No gradient flows into it.

    Returns: y (b, l, m, p) in x's dtype; the state at the start of every chunk (b, ceil(l/q), m, p,
        d); and the final state (b, m, p, d). States are in the working dtype, without gradients.
    """
    assert initial is None or not initial.requires_grad
    # Its states come from the forward pass alone.
    if initial is None and not torch.is_grad_enabled() and _mamba_ssm_serves(x):
        return dispatch.chunk_scan_kernel(x, dt, A, B, C, D, chunk=chunk, documents=documents)
    return _ChunkScan.apply(x, dt, A, B, C, D, chunk, initial, documents)


def stream_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, documents: Tensor | None = None
) -> Tensor:
    """y of `chunk_scan` alone, with gradients, for next-token training; on CUDA in half precision by mamba-ssm."""
    if _mamba_ssm_serves(x):
        return dispatch.scan_kernel(x, dt, A, B, C, D, chunk=chunk, documents=documents)
    return chunk_scan(x, dt, A, B, C, D, chunk=chunk, documents=documents)[0]


# --- a noisy stream beside a clean one ----------------------------------------------------------------------------


def _seeded(
    dt: Tensor, A: Tensor, clean_dt: Tensor, clean_A: Tensor, block: int, rows: Tensor | None, batch: int
) -> tuple[Tensor, Reach]:
    """dt, clean_dt (c, q, m) in the working dtype. Returns the log decay of the noisy stream from each block's start
    (c, q, m), and the reach of its positions into the clean stream."""
    running = (dt * A).unflatten(1, (-1, block)).cumsum(2).flatten(1, 2)
    clean = (clean_dt * clean_A).cumsum(1)
    starts = F.pad(clean, (0, 0, 1, 0))[:, :-1:block]
    return running, reach_of(clean, running + starts.repeat_interleave(block, 1), rows, batch, block)


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
        dtype, (b, l, m, p) = working_dtype(x), x.shape
        xs, dts, Bs, Cs, clean_xs, clean_dts, clean_Bs = (
            in_chunks(t, chunk) for t in (x, dt.to(dtype), B, C, clean_x, clean_dt.to(dtype), clean_B)
        )
        rows, before, skip = document_rows(documents, chunk), states.flatten(0, 1), D.to(dtype).unsqueeze(-1)
        running, reach = _seeded(dts, A.to(dtype), clean_dts, clean_A.to(dtype), block, rows, b)
        y = torch.empty(len(xs), chunk, m, p, dtype=dtype, device=x.device)
        for part, i, heads in pieces(xs, B.shape[2]):
            x_i, B_i, C_i = (t.to(dtype) for t in (xs[part, :, heads], Bs[part, :, i], Cs[part, :, i]))
            dt_i, out = dts[part, :, heads], y[part, :, heads]
            u = clean_xs[part, :, heads].to(dtype) * clean_dts[part, :, heads].unsqueeze(-1)
            states_i = before[part, heads].to(dtype).flatten(1, 2)
            read_from(out, u, clean_Bs[part, :, i].to(dtype), C_i, states_i, reach, part, heads)
            own = [in_tiles(t, block) for t in (x_i, dt_i, B_i, C_i)]
            add_within(in_tiles(out, block), tile_factors(running[part, :, heads], rows, part, block), *own)
            out.addcmul_(x_i, skip[heads])
        y = y.view(b, -1, m, p)[:, :l]
        ctx.save_for_backward(x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, y, documents)
        ctx.block, ctx.chunk = block, chunk
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, y, documents = ctx.saved_tensors
        block, chunk, dtype, (b, l), g = ctx.block, ctx.chunk, y.dtype, x.shape[:2], B.shape[2]
        xs, dts, Bs, Cs, clean_xs, clean_dts, clean_Bs, ys, gs = (
            in_chunks(t, chunk) for t in (x, dt.to(dtype), B, C, clean_x, clean_dt.to(dtype), clean_B, y, grad)
        )
        rows, before, skip = document_rows(documents, chunk), states.flatten(0, 1), D.to(dtype)
        running, reach = _seeded(dts, A.to(dtype), clean_dts, clean_A.to(dtype), block, rows, b)
        grad_x, grad_B, grad_C = torch.empty_like(xs), torch.empty_like(Bs), torch.empty_like(Cs)
        decay, by_u, by_skip = (torch.empty_like(dts) for _ in range(3))
        for part, i, heads in pieces(xs, g):
            x_i, dt_i, g_i = xs[part, :, heads].to(dtype), dts[part, :, heads], gs[part, :, heads].to(dtype)
            B_i, C_i = Bs[part, :, i].to(dtype), Cs[part, :, i].to(dtype)
            own = [in_tiles(t, block) for t in (g_i, x_i, dt_i, B_i, C_i)]
            pairs = tile_factors(running[part, :, heads], rows, part, block)
            u_, B_, C_ = (t.view(len(x_i), chunk, *t.shape[2:]) for t in within_backward(pairs, *own))
            u = clean_xs[part, :, heads].to(dtype) * clean_dts[part, :, heads].unsqueeze(-1)
            states_i = before[part, heads].to(dtype).flatten(1, 2)
            read_from_backward(g_i, u, clean_Bs[part, :, i].to(dtype), C_i, states_i, reach, part, heads, C_)
            grad_B[part, :, i], grad_C[part, :, i] = B_, C_
            decay[part, :, heads], by_u[part, :, heads], by_skip[part, :, heads] = grad_into_x(
                x_i, dt_i, skip[heads], ys[part, :, heads], g_i, u_, out=grad_x[part, :, heads]
            )
        grad_dt, grad_A = grad_into_dt(decay, by_u, dts, A.to(dtype), span=block)
        grad_x, grad_dt, grad_B, grad_C = (
            t.reshape(b, -1, *t.shape[2:])[:, :l] for t in (grad_x, grad_dt.to(dt.dtype), grad_B, grad_C)
        )
        grad_D = by_skip.sum((0, 1)).to(D.dtype)
        return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D, *[None] * 8


def two_stream_scan(
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
    """The scan of every block of the noisy stream, each started from the clean stream, in one pass.

    Three sums per position: the clean state at the chunk's start, the clean positions between it
    and the block, and the noisy positions of the block. Only one state per chunk is ever held,
    whatever the block size. No gradient flows into the clean stream. On CUDA, with triton, by the
    kernels of `scan_triton` if they take such shapes.

    Args: states: the clean stream's state at the start of each chunk, from `chunk_scan` with the
        same `chunk`. block: block size s, a divisor of l. `chunk` is a multiple of it, or, for long
        blocks, a divisor.

    Returns:
        y (b, l, m, p) in x's dtype.
    """
    scan = two_stream_scan_torch
    if triton_scans(x, B, block=block, chunk=chunk):
        from megatron_twotower.ops.triton.scan import two_stream_scan_triton as scan
    return scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        clean_x=clean_x,
        clean_dt=clean_dt,
        clean_A=clean_A,
        clean_B=clean_B,
        states=states,
        block=block,
        chunk=chunk,
        documents=documents,
    )


def triton_scans(x: Tensor, B: Tensor, *, block: int, chunk: int) -> bool:
    """True where `two_stream_scan` is the Triton one: on CUDA, with triton, for shapes that its kernels take."""
    if not dispatch.triton_serves(x, "scan"):
        return False
    from megatron_twotower.ops.triton.scan import supported

    return supported(x, B, block=block, chunk=chunk) is None


def two_stream_scan_torch(
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
    """`two_stream_scan` in torch, on any device."""
    l = x.shape[1]
    assert l % block == 0, (l, block)
    if chunk % block == 0:
        clean = (clean_x, clean_dt, clean_A, clean_B, states)
        return _TwoStreamScan.apply(x, dt, A, B, C, D, *clean, block, chunk, documents)
    assert block % chunk == 0, (block, chunk)
    # Long blocks are streams of their own, each with the state that the clean stream has at its
    # start.
    initial = states[:, :: block // chunk]
    if documents is not None:
        firsts = documents[:, ::block]
        same = firsts == torch.cat([firsts[:, :1], documents[:, block - 1 : -1 : block]], dim=1)
        initial, documents = initial * same.view(*same.shape, 1, 1, 1), documents.reshape(-1, block)
    own = (in_chunks(t, block) for t in (x, dt, B, C))
    xs, dts, Bs, Cs = own
    y, _, _ = chunk_scan(
        xs, dts, A, Bs, Cs, D, chunk=chunk, initial=initial.detach().flatten(0, 1), documents=documents
    )
    return y.view_as(x)


# --- the slow twins -----------------------------------------------------------------------------------------------


def scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position at a time: y (b, l, m, p) and the final state (b, m, p, d)."""
    b, l, m, p = x.shape
    B, C = (t.repeat_interleave(m // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, m, p, B.shape[-1]) if initial is None else initial
    ys = []
    for i in range(l):
        if documents is not None and i > 0:
            state = state * (documents[:, i] == documents[:, i - 1]).view(-1, 1, 1, 1)
        kept = (dt[:, i] * A).exp()[..., None, None] * state
        state = kept + (dt[:, i].unsqueeze(-1) * x[:, i]).unsqueeze(-1) * B[:, i].unsqueeze(-2)
        ys.append((state * C[:, i].unsqueeze(-2)).sum(-1) + D.unsqueeze(-1) * x[:, i])
    return torch.stack(ys, dim=1), state


def two_stream_scan_ref(
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
    block: int,
    documents: Tensor | None = None,
) -> Tensor:
    """Every block by itself: the clean recurrence up to the block, then the noisy one through it."""
    ys = []
    for start in range(0, x.shape[1], block):
        own, past = slice(start, start + block), slice(0, start)
        state = None
        of_own, of_past = (None, None) if documents is None else (documents[:, own], documents[:, past])
        if start:
            clean = (clean_x[:, past], clean_dt[:, past], clean_A, clean_B[:, past])
            _, state = scan_ref(*clean, clean_B[:, past], torch.zeros_like(D), documents=of_past)
            if documents is not None:
                state = state * (documents[:, start] == documents[:, start - 1]).view(-1, 1, 1, 1)
        noisy = (x[:, own], dt[:, own], A, B[:, own], C[:, own], D)
        ys.append(scan_ref(*noisy, initial=state, documents=of_own)[0])
    return torch.cat(ys, dim=1)
