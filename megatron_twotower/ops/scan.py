"""State-space scan of Mamba-2, for one stream and for a noisy stream that starts from a clean one.

Dimensions: b batch, l length, m heads, p head size, g groups, d state size, q chunk, s block,
n = l / s blocks.
Shapes: x (b, l, m, p); dt (b, l, m), positive; A (m,), negative; B, C (b, l, g, d); D (m,); states
(b, l/q, m, p, d); documents (b, l) int32, growing along l: no state passes from one document to
another. Head i belongs to group i // (m / g). Everything is computed in float32, or in float64 if x
is float64.

The recurrence of one head (Mamba-2, Dao and Gu 2024, section 6; model layout of NemotronH):

    h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T,    y_i = h_i C_i + D x_i

Block b of the noisy stream starts from the h of the clean stream after position b s - 1, block 0
from zeros.

Both scans are computed group by group, so that intermediate results have the size of one group.
Their backward passes are written by hand: they keep the inputs, the outputs and one state per chunk
and recompute the rest. Let dy be the gradient of y, u = dt x and du its gradient. The gradient of
the running log decay is dy_i . (y_i - D x_i) - u_i . du_i, independent of the chunks.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch
from megatron_twotower.ops.context_parallel import ContextRanks, Steps, finish, without_pauses
from megatron_twotower.ops.scan_chunks import (
    MAX_CHUNK,
    Decays,
    StateGradients,
    Stream,
    chunk_gradients,
    chunk_outputs,
    document_before_chunk,
    documents_in_chunks,
    in_chunks,
    inter_tile_factors,
    tile_length,
    work_items,
    working_dtype,
)


def chunk_length(block: int, *, preferred: int) -> int:
    """Tokens of a chunk: the block, doubled while that is at most `preferred` and MAX_CHUNK.

    If the block is longer than that, the chunk is its largest divisor up to `preferred`, or the
    block itself if that divisor is small.
    """
    preferred = min(preferred, MAX_CHUNK)
    if block <= preferred:
        return block << ((preferred // block).bit_length() - 1)
    divisor = max(q for q in range(1, preferred + 1) if block % q == 0)
    return divisor if 4 * divisor >= preferred else block


def _like_inputs(gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients in the layout of chunks -> in the shapes and dtypes of the inputs."""
    b, l = inputs[0].shape[:2]
    shaped = (t if t.dim() == 1 else t.reshape(b, -1, *t.shape[2:])[:, :l] for t in gradients)
    return tuple(t.to(like.dtype) for t, like in zip(shaped, inputs, strict=True))


# --- one stream ---


class _StateFactors(NamedTuple):
    """Factors of the states of one stream.

    Attributes:
        write: (c, q, m) factor of u_j in the state at the chunk's end.
        keep: (b, l/q, m) factor of the state before a chunk in the state after it.
    """

    write: Tensor
    keep: Tensor


def _stream_decays(dt: Tensor, A: Tensor, documents: Tensor | None, batch: int) -> tuple[Decays, _StateFactors]:
    """The decays of one stream. dt (c, q, m), A (m,) in the working dtype; documents (b, l)."""
    chunk = dt.shape[1]
    tile = tile_length(chunk)
    running, rows = (dt * A).cumsum(1), documents_in_chunks(documents, chunk)
    total = running[:, -1:]
    write, keep = (total - running).exp(), total.exp().view(batch, -1, len(A))
    if rows is not None:
        write = write * (rows == rows[:, -1:]).unsqueeze(-1)
        keep = keep * (rows[:, -1:] == document_before_chunk(rows, batch)).view(batch, -1, 1)
    factors = inter_tile_factors(running, running, rows, batch=batch, tile=tile)
    return Decays(running, chunk, tile, rows, *factors), _StateFactors(write, keep)


def _sum_over_chunks(parts: Tensor, keep: Tensor, order: Iterable[int]) -> Tensor:
    """Pass a state (b, m, p, d) through all chunks, from zeros: parts (b, c, m, p, d) are added."""
    state = torch.zeros_like(parts[:, 0])
    for c in order:
        state = torch.addcmul(parts[:, c], keep[:, c, :, None, None], state)
    return state


def _start_state(states: Tensor, keep: Tensor, context: ContextRanks) -> Steps[Tensor]:
    """The state (b, m, p, d) that each row starts from, after the row before it on any rank."""
    return context.states_before(_sum_over_chunks(states, keep, range(states.shape[1])), keep.prod(1))


def _end_gradient(grads: Tensor, keep: Tensor, context: ContextRanks | None) -> Tensor | None:
    """The gradient (b, m, p, d) of the state after each row, from the rows that follow it."""
    if context is None:
        return None
    own = _sum_over_chunks(grads, keep, reversed(range(grads.shape[1])))
    return finish(context.gradients_after(own, keep.prod(1)))


def _pass_states(states: Tensor, keep: Tensor, initial: Tensor | None) -> Tensor:
    """The inter-chunk recurrence, in place: what each chunk adds -> the state before each chunk.

    states (b, c, m, p, d). Returns the state after the last chunk (b, m, p, d).
    """
    state = torch.zeros_like(states[:, 0]) if initial is None else initial.to(states.dtype)
    for c in range(states.shape[1]):
        after = torch.addcmul(states[:, c], keep[:, c, :, None, None], state)
        states[:, c] = state
        state = after
    return state


def _pass_states_backward(
    grads: Tensor, states: Tensor, final: Tensor, keep: Tensor, gradient: Tensor | None
) -> Tensor:
    """The gradient of `_pass_states`, in place on grads (b, c, m, p, d).

    grads: the gradient of the state before each chunk -> the gradient of what each chunk adds.
    states, final: what `_pass_states` computed. gradient: that of `final`, or `None`. Returns the
    gradient of the log decay over each chunk (b, c, m).
    """
    after = final
    gradient = torch.zeros_like(final) if gradient is None else gradient
    totals = torch.empty_like(keep)
    for c in reversed(range(grads.shape[1])):
        totals[:, c] = torch.linalg.vecdot(gradient.flatten(2), after.flatten(2))
        before = torch.addcmul(grads[:, c], keep[:, c, :, None, None], gradient)
        grads[:, c] = gradient
        gradient, after = before, states[:, c]
    return totals


def _chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk: int,
    initial: Tensor | None,
    documents: Tensor | None,
    context: ContextRanks | None,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """The results of `chunk_scan`, y in the working dtype."""
    dtype, (b, l, m, p), (g, d) = working_dtype(x), x.shape, B.shape[2:]
    stream, Cs = Stream(*(in_chunks(t, chunk) for t in (x, dt.to(dtype), B))), in_chunks(C, chunk)
    decays, factors = _stream_decays(stream.dt, A.to(dtype), documents, b)
    states = torch.empty(len(Cs), m, p, d, dtype=dtype, device=x.device)
    write = stream.dt * factors.write
    for item in work_items(stream.x, g):
        own = stream.of(item)
        written = (own.x * write[item.chunks, :, item.heads].unsqueeze(-1)).flatten(2)
        states[item.chunks, item.heads] = torch.bmm(written.transpose(1, 2), own.B).unflatten(1, (-1, p))
    by_sequence = states.unflatten(0, (b, -1))
    if context is not None:
        initial = yield from _start_state(by_sequence, factors.keep, context)
    final = _pass_states(by_sequence, factors.keep, initial)
    y = chunk_outputs(stream, Cs, D.to(dtype), read=None, states=states, decays=decays)
    return y.view(b, -1, m, p)[:, :l], by_sequence, final


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, chunk, _, documents, context = inputs
        y, by_sequence, final = finish(_chunk_scan(*inputs))
        ctx.save_for_backward(*tensors, y, by_sequence, final, documents)
        ctx.chunk, ctx.context = chunk, context
        ctx.mark_non_differentiable(by_sequence, final)
        return y.to(tensors[0].dtype), by_sequence, final

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *inputs, y, states, final, documents = ctx.saved_tensors
        x, dt, A, B, C, D = inputs
        chunk, dtype = ctx.chunk, y.dtype
        stream = Stream(*(in_chunks(t, chunk) for t in (x, dt.to(dtype), B)))
        Cs, ys, gs = (in_chunks(t, chunk) for t in (C, y, grad))
        decays, factors = _stream_decays(stream.dt, A.to(dtype), documents, len(x))
        grads = torch.empty_like(states)
        added = grads.flatten(0, 1)
        for item in work_items(stream.x, B.shape[2]):
            g_i = gs[item.chunks, :, item.heads].to(dtype)
            read = (g_i * decays.read_of(item)).flatten(2)
            into = torch.bmm(read.transpose(1, 2), Cs[item.chunks, :, item.group].to(dtype))
            added[item.chunks, item.heads] = into.view_as(added[item.chunks, item.heads])
        after = _end_gradient(grads, factors.keep, ctx.context)
        total = _pass_states_backward(grads, states, final, factors.keep, after).flatten(0, 1)
        gradients = chunk_gradients(
            gs,
            ys,
            stream,
            A.to(dtype),
            Cs,
            D.to(dtype),
            read=None,
            states=states.flatten(0, 1),
            decays=decays,
            state_gradients=StateGradients(factors.write, added, total),
        )
        return *_like_inputs(gradients, inputs), None, None, None, None


def _uses_mamba_ssm(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *, chunk: int) -> bool:
    # Not in float32, where mamba-ssm multiplies in TF32 (no input_precision in mamba-ssm 2.2.4 and
    # 2.3.2, ops/triton/ssd_*.py). That leaves an error of a thousandth, and this module computes in
    # float32.
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return (
        narrow
        and dispatch.unavailable("mamba-ssm") is None
        and dispatch.mamba_ssm_unsupported(x, dt, B, C, chunk=chunk) is None
    )


def chunk_scan_steps(
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
    context: ContextRanks | None = None,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """The scan of one stream, with the state at the start of every chunk.

    On CUDA in half precision, if no gradient is needed, by mamba-ssm, unless its offsets overflow.

    Args:
        x: (b, l, m, p); the other shapes are in the module's docstring.
        chunk: q.
        initial: (b, m, p, d), the state before position 0, of its document; zeros if `None`. No
            gradient flows into it.
        documents: (b, l), or `None` for one document.
        context: The ranks that have the other stretches of the sequences. Each row then starts
            from the state after the stretch before it, with gradients. If there are none to
            compute, it pauses while the states travel.

    Returns:
        y (b, l, m, p) in x's dtype; the state at the start of every chunk (b, ceil(l/q), m, p, d);
        the final state (b, m, p, d). The states are in the working dtype, without gradients.
    """
    assert initial is None or (context is None and not initial.requires_grad)
    if torch.is_grad_enabled():
        return _ChunkScan.apply(x, dt, A, B, C, D, chunk, initial, documents, context)
    # mamba-ssm gives the states in its forward pass only.
    if initial is None and _uses_mamba_ssm(x, dt, B, C, chunk=chunk):
        package = dispatch.mamba_ssm_chunk_scan
        return (yield from package(x, dt, A, B, C, D, chunk=chunk, documents=documents, context=context))
    y, states, final = yield from _chunk_scan(x, dt, A, B, C, D, chunk, initial, documents, context)
    return y.to(x.dtype), states, final


# `chunk_scan_steps` without a pause.
chunk_scan = without_pauses(chunk_scan_steps)


def stream_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk: int,
    documents: Tensor | None = None,
    context: ContextRanks | None = None,
) -> Tensor:
    """The y of `chunk_scan`, with gradients, for next-token training.

    On CUDA in half precision by mamba-ssm, unless other ranks have stretches of the sequences: its
    backward pass cannot wait for their gradient of the state.
    """
    if _uses_mamba_ssm(x, dt, B, C, chunk=chunk) and context is None:
        return dispatch.mamba_ssm_scan(x, dt, A, B, C, D, chunk=chunk, documents=documents)
    return chunk_scan(x, dt, A, B, C, D, chunk=chunk, documents=documents, context=context)[0]


# --- a noisy stream that starts from a clean one ---


def _two_stream_decays(
    dt: Tensor, A: Tensor, clean_dt: Tensor, clean_A: Tensor, documents: Tensor | None, *, batch: int, block: int
) -> Decays:
    """The decays of the noisy stream.

    dt, clean_dt (c, q, m), A and clean_A (m,) in the working dtype; documents (b, l).
    """
    rows = documents_in_chunks(documents, dt.shape[1])
    running = (dt * A).unflatten(1, (-1, block)).cumsum(2).flatten(1, 2)
    clean = (clean_dt * clean_A).cumsum(1)
    block_starts = F.pad(clean, (0, 0, 1, 0))[:, :-1:block].repeat_interleave(block, 1)
    factors = inter_tile_factors(clean, running + block_starts, rows, batch=batch, tile=block)
    return Decays(running, block, block, rows, *factors)


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
        stream = Stream(*(in_chunks(t, chunk) for t in (x, dt.to(dtype), B)))
        clean = Stream(*(in_chunks(t, chunk) for t in (clean_x, clean_dt.to(dtype), clean_B)))
        decays = _two_stream_decays(
            stream.dt, A.to(dtype), clean.dt, clean_A.to(dtype), documents, batch=b, block=block
        )
        y = chunk_outputs(
            stream, in_chunks(C, chunk), D.to(dtype), read=clean, states=states.flatten(0, 1), decays=decays
        )
        y = y.view(b, -1, m, p)[:, :l]
        ctx.save_for_backward(x, dt, A, B, C, D, clean_x, clean_dt, clean_A, clean_B, states, y, documents)
        ctx.block, ctx.chunk = block, chunk
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, clean_x, clean_dt, clean_A, clean_B, states, y, documents = ctx.saved_tensors
        x, dt, A, B, C, D = inputs
        chunk, dtype = ctx.chunk, y.dtype
        stream = Stream(*(in_chunks(t, chunk) for t in (x, dt.to(dtype), B)))
        clean = Stream(*(in_chunks(t, chunk) for t in (clean_x, clean_dt.to(dtype), clean_B)))
        decays = _two_stream_decays(
            stream.dt, A.to(dtype), clean.dt, clean_A.to(dtype), documents, batch=len(x), block=ctx.block
        )
        Cs, ys, gs = (in_chunks(t, chunk) for t in (C, y, grad))
        gradients = chunk_gradients(
            gs,
            ys,
            stream,
            A.to(dtype),
            Cs,
            D.to(dtype),
            read=clean,
            states=states.flatten(0, 1),
            decays=decays,
            state_gradients=None,
        )
        return *_like_inputs(gradients, inputs), *[None] * 8


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
    """The scan of all blocks of the noisy stream, each of which starts from the clean stream.

    The output of a position has three terms: from the clean state at the chunk's start, from the
    clean positions between that and the block, and from the noisy positions of the block. Only one
    state per chunk is kept, whatever the block size. On CUDA with triton, the kernels of
    `ops.triton.scan` compute it if they take the shapes.

    Args:
        x: (b, l, m, p); the other shapes are in the module's docstring.
        clean_x: x of the clean stream, as clean_dt, clean_A and clean_B. No gradient flows into it.
        states: The state of the clean stream at the start of each chunk, from `chunk_scan` with the
            same `chunk`.
        block: s, a divisor of l.
        chunk: q, a multiple of `block` or, if the block is long, a divisor.
        documents: (b, l), or `None` for one document.

    Returns:
        y (b, l, m, p) in x's dtype.
    """
    scan = two_stream_scan_torch
    if uses_triton_scan(x, B, block=block, chunk=chunk):
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


def uses_triton_scan(x: Tensor, B: Tensor, *, block: int, chunk: int) -> bool:
    """Whether `two_stream_scan` uses the Triton kernels: on CUDA, if they take the shapes."""
    if not dispatch.uses_triton(x, "scan"):
        return False
    from megatron_twotower.ops.triton.scan import unsupported

    return unsupported(x, B, block=block, chunk=chunk) is None


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
    # Long blocks are sequences of their own. Each starts from the clean state at its start.
    initial = states[:, :: block // chunk]
    if documents is not None:
        firsts = documents[:, ::block]
        same = firsts == torch.cat([firsts[:, :1], documents[:, block - 1 : -1 : block]], dim=1)
        initial, documents = initial * same.view(*same.shape, 1, 1, 1), documents.reshape(-1, block)
    xs, dts, Bs, Cs = (in_chunks(t, block) for t in (x, dt, B, C))
    y, _, _ = chunk_scan(
        xs, dts, A, Bs, Cs, D, chunk=chunk, initial=initial.detach().flatten(0, 1), documents=documents
    )
    return y.view_as(x)


# --- reference implementations ---


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
    """The recurrence position by position: y (b, l, m, p) and the final state (b, m, p, d)."""
    b, l, m, p = x.shape
    B, C = (t.repeat_interleave(m // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, m, p, B.shape[-1]) if initial is None else initial
    ys = []
    for i in range(l):
        if documents is not None and i > 0:
            state = state * (documents[:, i] == documents[:, i - 1]).view(-1, 1, 1, 1)
        decayed = (dt[:, i] * A).exp()[..., None, None] * state
        state = decayed + (dt[:, i].unsqueeze(-1) * x[:, i]).unsqueeze(-1) * B[:, i].unsqueeze(-2)
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
    """Each block by itself: the clean recurrence up to the block, then the noisy one through it."""
    ys = []
    for start in range(0, x.shape[1], block):
        own, past = slice(start, start + block), slice(0, start)
        state = None
        own_documents, past_documents = (None, None) if documents is None else (documents[:, own], documents[:, past])
        if start:
            clean = (clean_x[:, past], clean_dt[:, past], clean_A, clean_B[:, past])
            _, state = scan_ref(*clean, clean_B[:, past], torch.zeros_like(D), documents=past_documents)
            if documents is not None:
                state = state * (documents[:, start] == documents[:, start - 1]).view(-1, 1, 1, 1)
        noisy = (x[:, own], dt[:, own], A, B[:, own], C[:, own], D)
        ys.append(scan_ref(*noisy, initial=state, documents=own_documents)[0])
    return torch.cat(ys, dim=1)
