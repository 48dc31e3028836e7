"""The computation inside the chunks of a scan: outputs, and their gradients by hand.

Dimensions as in `ops.scan`. Here c counts the chunks of all sequences, r the heads of a group and t
the positions of a tile; u = dt x. A chunk is divided into tiles, for a noisy stream into its
blocks. The output of a position has two parts (Mamba-2, section 6, with tiles inside the chunks):

- intra-tile: what the positions of its tile up to itself contribute. Every pair of positions and
  every head has a weight of its own, the exponential of a segment sum of log decays.
- inter-tile: what the earlier tiles of the chunk contribute, and the state at the chunk's start
  (the inter-chunk term). These weights are products of a factor of each position, so that all heads
  of a group share one matrix of scores C B^T.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The longest chunk: the Triton kernels keep the scores of a chunk in shared memory.
MAX_CHUNK = 128
# The longest tile of one stream.
MAX_TILE = 32
# Elements of x in one work item on a CPU: intermediate results then stay in its cache.
CPU_ELEMENTS = 1 << 19


def tile_length(chunk: int) -> int:
    """The tile of one stream: the chunk, halved until it is odd or at most MAX_TILE."""
    while chunk > MAX_TILE and chunk % 2 == 0:
        chunk //= 2
    return chunk


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- layout ---


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """(b, l, ...) -> (b ceil(l/q), q, ...), padded with zeros: dt = 0 neither decays nor adds."""
    short = -tensor.shape[1] % chunk
    if short:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, short))
    return tensor.reshape(-1, chunk, *tensor.shape[2:])


def documents_in_chunks(documents: Tensor | None, chunk: int) -> Tensor | None:
    """(b, l) -> (b ceil(l/q), q), padded with the last document."""
    if documents is None:
        return None
    b, l = documents.shape
    return torch.cat([documents, documents[:, -1:].expand(b, -l % chunk)], dim=1).reshape(-1, chunk)


def document_before_chunk(documents: Tensor, batch: int) -> Tensor:
    """The document of the position before each chunk (c, 1); at a sequence's start, its first."""
    split = documents.view(batch, -1, documents.shape[1])
    return torch.cat([split[:, :1, 0], split[:, :-1, -1]], dim=1).view(-1, 1)


def in_tiles(tensor: Tensor, tile: int) -> Tensor:
    """(c, q, ...) -> (c q/t, t, ...)."""
    return tensor.unflatten(1, (-1, tile)).flatten(0, 1)


class WorkItem(NamedTuple):
    """The part of a scan that is computed at a time: some chunks, one group and its heads."""

    chunks: slice
    group: int
    heads: slice


def work_items(x: Tensor, groups: int) -> Iterator[WorkItem]:
    """All work items of x (c, q, m, p); on CUDA one for each group."""
    chunks, heads = len(x), x.shape[2] // groups
    step = chunks if x.is_cuda else max(1, CPU_ELEMENTS * groups * chunks // x.numel())
    for start in range(0, chunks, step):
        for i in range(groups):
            yield WorkItem(slice(start, start + step), i, slice(i * heads, (i + 1) * heads))


class Stream(NamedTuple):
    """What the positions of a stream write: x (c, q, m, p), dt (c, q, m), B (c, q, g, d).

    dt is in the working dtype.
    """

    x: Tensor
    dt: Tensor
    B: Tensor

    def of(self, item: WorkItem) -> "Stream":
        """One work item, in the working dtype: x (c, q, r, p), dt (c, q, r), B (c, q, d)."""
        x, B = self.x[item.chunks, :, item.heads], self.B[item.chunks, :, item.group]
        return Stream(x.to(self.dt.dtype), self.dt[item.chunks, :, item.heads], B.to(self.dt.dtype))

    def u(self) -> Tensor:
        """The product dt x (c, q, r, p)."""
        return self.x * self.dt.unsqueeze(-1)


def head_matrices(tensor: Tensor, factor: Tensor | None = None) -> Tensor:
    """(c, q, r, p), times factor (c, q, r) -> (c r, q, p), contiguous: one matrix per head."""
    out = tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3])
    if factor is None:
        out.copy_(tensor.transpose(1, 2))
    else:
        torch.mul(tensor.transpose(1, 2), factor.transpose(1, 2).unsqueeze(-1), out=out)
    return out.flatten(0, 1)


def from_head_matrices(tensor: Tensor, heads: int) -> Tensor:
    """(c r, q, p) -> (c, q, r, p), a view."""
    return tensor.unflatten(0, (-1, heads)).transpose(1, 2)


def half(tensor: Tensor, h: int, which: int) -> Tensor:
    """The halves 0 or 1 of all windows of 2 h positions: (c, q, ...) -> (c k, h, ...)."""
    return tensor.unflatten(1, (-1, 2, h))[:, :, which].flatten(0, 1)


def add_to_half(tensor: Tensor, h: int, which: int, values: Tensor, factors: Tensor) -> None:
    """Add values (c k, h, r p) times factors (c k, h, r) to the halves of tensor (c, q, r, p)."""
    into = tensor.unflatten(1, (-1, 2, h))[:, :, which]
    into.addcmul_(values.view(into.shape), factors.view(*into.shape[:-1], 1))


# --- decays ---


class Decays(NamedTuple):
    """The log decays of the positions of all chunks, and the factors of the inter-tile terms.

    A pair (j, i) of different tiles of a chunk is in the first and the second half of exactly one
    window of 2 h positions, with h = t, 2 t, ... q / 2. Its weight is the decay from j to the end
    of the first half times the decay from there to i.

    Attributes:
        running: (c, q, m) log decay from the start of a span to each position.
        span: Positions of a span: the chunk of one stream, or the block of a noisy stream.
        tile: Positions of a tile.
        documents: (c, q), or `None`.
        read: (c, q, m) factor of the state at the chunk's start, seen from i.
        halves: For each h: h, factors of the first halves (c, k, h, m) and of the second halves
            (c, k, h, m), with k windows in a chunk.
    """

    running: Tensor
    span: int
    tile: int
    documents: Tensor | None
    read: Tensor
    halves: list[tuple[int, Tensor, Tensor]]

    def read_of(self, item: WorkItem) -> Tensor:
        """The factors of the state for one work item (c, q, r, 1)."""
        return self.read[item.chunks, :, item.heads].unsqueeze(-1)

    def halves_of(self, item: WorkItem) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The halves of one work item: h, first (c k, h, r), second (c k, h, r)."""
        of_item = (item.chunks, ..., item.heads)
        for h, first, second in self.halves:
            yield h, first[of_item].flatten(0, 1), second[of_item].flatten(0, 1)

    def intra_tile(self, item: WorkItem) -> Tensor:
        """The weights of the pairs within the tiles of one work item (c q/t, r, t, t)."""
        documents = None if self.documents is None else in_tiles(self.documents[item.chunks], self.tile)
        return exp_segment_sum(in_tiles(self.running[item.chunks, :, item.heads], self.tile), documents)


def exp_segment_sum(running: Tensor, documents: Tensor | None) -> Tensor:
    """The exponential of the segment sums of log decays, 0 for j after i or of another document.

    running (c, t, r), running sums of the log decays; documents (c, t). Returns (c, r, t, t), at
    (i, j) exp(running_i - running_j).
    """
    length = running.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=running.device).tril()
    if documents is not None:
        allowed = (allowed & (documents.unsqueeze(-1) == documents.unsqueeze(-2))).unsqueeze(1)
    by_head = running.transpose(1, 2).contiguous()
    sums = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    return sums.masked_fill_(~allowed, float("-inf")).exp_()


def inter_tile_factors(
    written: Tensor, read: Tensor, documents: Tensor | None, *, batch: int, tile: int
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """The fields `read` and `halves` of `Decays`.

    written, read (c, q, m): log decay from the chunk's start to j, where u_j is written, and to i,
    where it is read. documents (c, q).
    """
    chunk, halves, h = written.shape[1], [], tile
    while h < chunk:
        first, second = half(written, h, 0), half(read, h, 1)
        border = first[:, -1:]
        first, second = (border - first).exp(), (second - border).exp()
        if documents is not None:
            last = half(documents, h, 0)[:, -1:]
            first = first * (half(documents, h, 0) == last).unsqueeze(-1)
            second = second * (half(documents, h, 1) == last).unsqueeze(-1)
        halves.append((h, first.unflatten(0, (len(read), -1)), second.unflatten(0, (len(read), -1))))
        h *= 2
    factor = read.exp()
    if documents is not None:
        factor = factor * (documents == document_before_chunk(documents, batch)).unsqueeze(-1)
    return factor, halves


# --- intra-tile and inter-tile terms ---


def add_intra_tile(y: Tensor, weights: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> None:
    """Add the intra-tile term to y (c, t, r, p).

    weights (c, r, t, t) from `exp_segment_sum`; x (c, t, r, p); dt (c, t, r); B, C (c, t, d).
    """
    scores = torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
    term = torch.bmm((scores * weights).flatten(0, 1), head_matrices(x, dt))
    y += from_head_matrices(term, y.shape[2])


def intra_tile_backward(
    weights: Tensor, grad: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_intra_tile` into u (c, t, r, p), B and C; grad (c, t, r, p) that of y."""
    heads, by_head, u = x.shape[2], head_matrices(grad), head_matrices(x, dt)
    scores = torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
    weighted = (scores * weights).flatten(0, 1)
    grad_u = from_head_matrices(torch.bmm(weighted.transpose(1, 2), by_head), heads).contiguous()
    grad_scores = torch.bmm(by_head, u.transpose(1, 2)).view_as(weights).mul_(weights).sum(1)
    return grad_u, torch.bmm(grad_scores.transpose(1, 2), C), torch.bmm(grad_scores, B)


def write_inter_tile(
    y: Tensor, u: Tensor, B: Tensor, C: Tensor, states: Tensor, decays: Decays, item: WorkItem
) -> None:
    """Write the inter-tile term into y (c, q, r, p).

    u (c, q, r, p) and B (c, q, d) of the stream that is read; C (c, q, d) of the one that reads;
    states (c, r p, d) at the chunks' starts.
    """
    torch.mul(torch.bmm(C, states.transpose(1, 2)).view(y.shape), decays.read_of(item), out=y)
    for h, first, second in decays.halves_of(item):
        scores = torch.bmm(half(C, h, 1), half(B, h, 0).transpose(1, 2))
        decayed = half(u, h, 0) * first.unsqueeze(-1)
        add_to_half(y, h, 1, torch.bmm(scores, decayed.flatten(2)), second)


def inter_tile_backward(
    grad: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    decays: Decays,
    item: WorkItem,
    *,
    grad_C: Tensor,
    grad_u: Tensor | None,
    grad_B: Tensor | None,
) -> None:
    """Add the gradients of `write_inter_tile` to grad_C and, unless `None`, to grad_u and grad_B.

    grad (c, q, r, p) is the gradient of y.
    """
    grad_C.baddbmm_((grad * decays.read_of(item)).flatten(2), states)
    for h, first, second in decays.halves_of(item):
        decayed_u = (half(u, h, 0) * first.unsqueeze(-1)).flatten(2)
        decayed_grad = (half(grad, h, 1) * second.unsqueeze(-1)).flatten(2)
        grad_scores = torch.bmm(decayed_grad, decayed_u.transpose(1, 2))
        into = grad_C.unflatten(1, (-1, 2, h))[:, :, 1]
        into += torch.bmm(grad_scores, half(B, h, 0)).view(into.shape)
        if grad_u is None or grad_B is None:
            continue
        into = grad_B.unflatten(1, (-1, 2, h))[:, :, 0]
        into += torch.bmm(grad_scores.transpose(1, 2), half(C, h, 1)).view(into.shape)
        scores = torch.bmm(half(C, h, 1), half(B, h, 0).transpose(1, 2))
        add_to_half(grad_u, h, 0, torch.bmm(scores.transpose(1, 2), decayed_grad), first)


# --- all chunks of a scan ---


def chunk_outputs(
    stream: Stream, C: Tensor, D: Tensor, *, read: Stream | None, states: Tensor, decays: Decays
) -> Tensor:
    """The y (c, q, m, p) of all chunks, in the working dtype.

    Args:
        stream: The stream of the positions.
        C: (c, q, g, d).
        D: (m,) in the working dtype.
        read: The stream that the inter-tile terms read; `None` if it is `stream` itself.
        states: (c, m, p, d), the state of that stream at the start of each chunk.
        decays: Of the positions.
    """
    dtype, tile, skip = stream.dt.dtype, decays.tile, D.unsqueeze(-1)
    y = torch.empty(stream.x.shape, dtype=dtype, device=stream.x.device)
    for item in work_items(stream.x, stream.B.shape[2]):
        own, out = stream.of(item), y[item.chunks, :, item.heads]
        source = own if read is None else read.of(item)
        C_i, states_i = C[item.chunks, :, item.group].to(dtype), states[item.chunks, item.heads].to(dtype)
        write_inter_tile(out, source.u(), source.B, C_i, states_i.flatten(1, 2), decays, item)
        tiles = [in_tiles(t, tile) for t in (*own, C_i)]
        add_intra_tile(in_tiles(out, tile), decays.intra_tile(item), *tiles)
        out.addcmul_(own.x, skip[item.heads])
    return y


class StateGradients(NamedTuple):
    """The gradients that the states of a stream send back to its positions.

    Attributes:
        write: (c, q, m) factor of u_j in the state at the chunk's end.
        added: (c, m, p, d) gradient of what each chunk adds to the state.
        total: (c, m) gradient of the log decay over each chunk.
    """

    write: Tensor
    added: Tensor
    total: Tensor


def chunk_gradients(
    grad: Tensor,
    y: Tensor,
    stream: Stream,
    A: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    read: Stream | None,
    states: Tensor,
    decays: Decays,
    state_gradients: StateGradients | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `chunk_outputs` into x, dt, A, B, C and D of the stream, in its layout.

    Args:
        grad: (c, q, m, p), the gradient of y.
        y: (c, q, m, p), what `chunk_outputs` returned.
        stream: As in `chunk_outputs`, like C, D, states and decays.
        A: (m,) in the working dtype.
        read: As in `chunk_outputs`. No gradient flows into it.
        state_gradients: `None` if the positions write into no state.
    """
    dtype, tile = stream.dt.dtype, decays.tile
    grad_x, grad_B, grad_C = torch.empty_like(stream.x), torch.empty_like(stream.B), torch.empty_like(C)
    grad_decay, direct, by_skip = (torch.empty_like(stream.dt) for _ in range(3))
    for item in work_items(stream.x, stream.B.shape[2]):
        of_heads, of_group = (item.chunks, slice(None), item.heads), (item.chunks, slice(None), item.group)
        own, g_i, C_i = stream.of(item), grad[of_heads].to(dtype), C[of_group].to(dtype)
        source = own if read is None else read.of(item)
        tiles = [in_tiles(t, tile) for t in (g_i, *own, C_i)]
        grads = intra_tile_backward(decays.intra_tile(item), *tiles)
        grad_u_i, grad_B_i, grad_C_i = (t.view(len(g_i), -1, *t.shape[2:]) for t in grads)
        u = source.u()
        if state_gradients is not None:
            added = state_gradients.added[item.chunks, item.heads].flatten(1, 2)
            write = state_gradients.write[of_heads].unsqueeze(-1)
            grad_u_i.addcmul_(torch.bmm(own.B, added.transpose(1, 2)).view_as(grad_u_i), write)
            grad_B_i.baddbmm_((u * write).flatten(2), added)
        inter_tile_backward(
            g_i,
            u,
            source.B,
            C_i,
            states[item.chunks, item.heads].to(dtype).flatten(1, 2),
            decays,
            item,
            grad_C=grad_C_i,
            grad_u=grad_u_i if read is None else None,
            grad_B=grad_B_i if read is None else None,
        )
        grad_B[of_group], grad_C[of_group] = grad_B_i, grad_C_i
        grad_decay[of_heads], direct[of_heads], by_skip[of_heads] = x_gradients(
            own, D[item.heads], y[of_heads], g_i, grad_u_i, out=grad_x[of_heads]
        )
    if state_gradients is not None:
        grad_decay[:, -1] += state_gradients.total
    summed = grad_decay.unflatten(1, (-1, decays.span)).flip(2).cumsum(2).flip(2).flatten(1, 2)
    grad_dt, grad_A = torch.addcmul(direct, summed, A), (summed * stream.dt).sum((0, 1))
    return grad_x, grad_dt, grad_A, grad_B, grad_C, by_skip.sum((0, 1))


def x_gradients(
    own: Stream, D: Tensor, y: Tensor, grad: Tensor, grad_u: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, written to `out`, and three other gradients, each (c, q, r).

    y, grad, grad_u and out (c, q, r, p); grad is the gradient of y. Overwrites grad_u.

    Returns:
        The gradient of the running log decay, without that of the chunk's total; of dt as a factor
        of u; of D, for each position.
    """
    direct, by_skip = torch.linalg.vecdot(grad_u, own.x), torch.linalg.vecdot(grad, own.x)
    grad_decay = torch.linalg.vecdot(grad, y).sub_(D * by_skip).sub_(own.dt * direct)
    out.copy_(grad_u.mul_(own.dt.unsqueeze(-1)).addcmul_(grad, D.unsqueeze(-1)))
    return grad_decay, direct, by_skip
