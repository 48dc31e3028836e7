"""Pieces of the scans: what positions of a chunk give to each other and read of the state before them.

Dimensions as in `scan`: here c counts the chunks of all sequences, r the heads of a group, t the
positions of a tile. A head's u is dt x. Gradients are by hand; `scan` says what they rest on.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of x worked on at a time on a CPU: few enough that what passes between operations stays
# in its cache.
CACHED = 1 << 19
# Tokens of a chunk of one stream whose pairs are weighed head by head; a noisy stream takes its
# blocks for that.
TILE = 32


def tile_length(chunk: int) -> int:
    """The chunk halved until it is at most TILE or odd."""
    while chunk > TILE and chunk % 2 == 0:
        chunk //= 2
    return chunk


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """(b, l, ...) -> (b ceil(l/q), q, ...), with zeros behind: dt = 0 neither decays nor adds."""
    short = -tensor.shape[1] % chunk
    if short:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, short))
    return tensor.reshape(-1, chunk, *tensor.shape[2:])


def document_rows(documents: Tensor | None, chunk: int) -> Tensor | None:
    """(b, l) -> (b ceil(l/q), q), the last document going on behind."""
    if documents is None:
        return None
    b, l = documents.shape
    return torch.cat([documents, documents[:, -1:].expand(b, -l % chunk)], dim=1).reshape(-1, chunk)


def document_before(rows: Tensor, batch: int) -> Tensor:
    """The document before each chunk (c, 1); that of its first position where a sequence begins."""
    split = rows.view(batch, -1, rows.shape[1])
    return torch.cat([split[:, :1, 0], split[:, :-1, -1]], dim=1).view(-1, 1)


def pieces(x: Tensor, groups: int) -> Iterator[tuple[slice, int, slice]]:
    """The work on x (c, q, m, p) in pieces: some of the chunks, a group, its heads."""
    chunks, heads = len(x), x.shape[2] // groups
    step = chunks if x.is_cuda else max(1, CACHED * groups * chunks // x.numel())
    for start in range(0, chunks, step):
        for i in range(groups):
            yield slice(start, start + step), i, slice(i * heads, (i + 1) * heads)


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


def pair_factors(decay: Tensor, documents: Tensor | None) -> Tensor:
    """exp(decay_i - decay_j) for j at or before i and of its document, else 0: (c, t, r), (c, t) -> (c, r, t, t)."""
    length = decay.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=decay.device).tril()
    if documents is not None:
        allowed = (allowed & (documents.unsqueeze(-1) == documents.unsqueeze(-2))).unsqueeze(1)
    by_head = decay.transpose(1, 2).contiguous()
    steps = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    return steps.masked_fill_(~allowed, float("-inf")).exp_()


def add_within(y: Tensor, pairs: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> None:
    """Add to y (c, t, r, p) what the positions of a tile give to its later positions and themselves.

    pairs (c, r, t, t); x (c, t, r, p); dt (c, t, r); B, C (c, t, d).
    """
    scores = torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
    own = torch.bmm((scores * pairs).flatten(0, 1), head_matrices(x, dt))
    y += from_head_matrices(own, y.shape[2])


def within_backward(
    pairs: Tensor, grad: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_within` into u = dt x (c, t, r, p), B and C; grad as y."""
    heads, by_head, u = x.shape[2], head_matrices(grad), head_matrices(x, dt)
    scores = torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
    weights = (scores * pairs).flatten(0, 1)
    grad_u = from_head_matrices(torch.bmm(weights.transpose(1, 2), by_head), heads).contiguous()
    grad_scores = torch.bmm(by_head, u.transpose(1, 2)).view_as(pairs).mul_(pairs).sum(1)
    return grad_u, torch.bmm(grad_scores.transpose(1, 2), C), torch.bmm(grad_scores, B)


def grad_into_x(
    x: Tensor, dt: Tensor, D: Tensor, y: Tensor, grad: Tensor, grad_u: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of y and u to that of x, written to `out`; x, y, grad, grad_u, out (c, q, r, p).

    Returns (c, q, r) each: gradient of the running log decay, without what states take of its end;
    of dt through u; and of D by position.
    """
    by_u, by_skip = torch.linalg.vecdot(grad_u, x), torch.linalg.vecdot(grad, x)
    decay = torch.linalg.vecdot(grad, y).sub_(D * by_skip).sub_(dt * by_u)
    out.copy_(grad_u.mul_(dt.unsqueeze(-1)).addcmul_(grad, D.unsqueeze(-1)))
    return decay, by_u, by_skip


def grad_into_dt(decay: Tensor, by_u: Tensor, dt: Tensor, A: Tensor, *, span: int) -> tuple[Tensor, Tensor]:
    """Gradients of dt (c, q, m) and A (m,), log decays running over spans of `span` positions."""
    running = decay.unflatten(1, (-1, span)).flip(2).cumsum(2).flip(2).flatten(1, 2)
    return torch.addcmul(by_u, running, A), (running * dt).sum((0, 1))


class Reach(NamedTuple):
    """How far back the positions of a chunk look, by head: factors of what is written at j and read at i.

    read (c, q, m): of the state at the chunk's start, seen from i. halves: for a span of 2 h
    positions, h = tile, 2 tile, ... q / 2: (h, first (c, k, h, m), second (c, k, h, m)), k spans in
    a chunk; what j in the first half gives to i in the second is weighed by first_j second_i, so
    that all heads of a group share one matrix of scores.
    """

    read: Tensor
    halves: list[tuple[int, Tensor, Tensor]]

    def of(self, part: slice, heads: slice) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The halves of some chunks and heads: (h, first, second (c k, h, r))."""
        for h, first, second in self.halves:
            yield h, first[part, ..., heads].flatten(0, 1), second[part, ..., heads].flatten(0, 1)


def reach_of(written: Tensor, read: Tensor, rows: Tensor | None, batch: int, tile: int) -> Reach:
    """written, read (c, q, m): log decay from the chunk's start to j where it is written, and to i where it is read."""
    chunk, halves = written.shape[1], []
    for h in doublings(tile, chunk):
        first, second = half(written, h, 0), half(read, h, 1)
        border = first[:, -1:]
        first, second = (border - first).exp(), (second - border).exp()
        if rows is not None:
            last = half(rows, h, 0)[:, -1:]
            first = first * (half(rows, h, 0) == last).unsqueeze(-1)
            second = second * (half(rows, h, 1) == last).unsqueeze(-1)
        halves.append((h, first.unflatten(0, (len(read), -1)), second.unflatten(0, (len(read), -1))))
    factor = read.exp()
    return Reach(factor if rows is None else factor * (rows == document_before(rows, batch)).unsqueeze(-1), halves)


def doublings(tile: int, chunk: int) -> Iterator[int]:
    while tile < chunk:
        yield tile
        tile *= 2


def half(tensor: Tensor, h: int, which: int) -> Tensor:
    """The first or second half of every span of 2 h positions: (c, q, ...) -> (c k, h, ...)."""
    return tensor.unflatten(1, (-1, 2, h))[:, :, which].flatten(0, 1)


def add_to_half(tensor: Tensor, h: int, which: int, values: Tensor, factors: Tensor) -> None:
    """tensor (c, q, r, p) += values (c k, h, r p) * factors (c k, h, r), in place on the halves."""
    into = tensor.unflatten(1, (-1, 2, h))[:, :, which]
    into.addcmul_(values.view(into.shape), factors.view(*into.shape[:-1], 1))


def read_from(
    y: Tensor, u: Tensor, B: Tensor, C: Tensor, before: Tensor, reach: Reach, part: slice, heads: slice
) -> None:
    """Write into y (c, q, r, p) what C (c, q, d) reads of the chunk's first state before (c, r p, d) and of u
    (c, q, r, p), written through B (c, q, d), in the first halves of the spans that i is in the second half of."""
    read = reach.read[part, :, heads].unsqueeze(-1)
    torch.mul(torch.bmm(C, before.transpose(1, 2)).view(y.shape), read, out=y)
    for h, first, second in reach.of(part, heads):
        scores = torch.bmm(half(C, h, 1), half(B, h, 0).transpose(1, 2))
        given = half(u, h, 0) * first.unsqueeze(-1)
        add_to_half(y, h, 1, torch.bmm(scores, given.flatten(2)), second)


def read_from_backward(
    grad: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    before: Tensor,
    reach: Reach,
    part: slice,
    heads: slice,
    grad_C: Tensor,
    grad_u: Tensor | None = None,
    grad_B: Tensor | None = None,
) -> None:
    """Add the gradients of `read_from` into those of C and, where wanted, of u and B; grad (c, q, r, p)."""
    grad_C.baddbmm_((grad * reach.read[part, :, heads].unsqueeze(-1)).flatten(2), before)
    for h, first, second in reach.of(part, heads):
        given = (half(u, h, 0) * first.unsqueeze(-1)).flatten(2)
        taken = (half(grad, h, 1) * second.unsqueeze(-1)).flatten(2)
        grad_scores = torch.bmm(taken, given.transpose(1, 2))
        into = grad_C.unflatten(1, (-1, 2, h))[:, :, 1]
        into += torch.bmm(grad_scores, half(B, h, 0)).view(into.shape)
        if grad_u is None or grad_B is None:
            continue
        into = grad_B.unflatten(1, (-1, 2, h))[:, :, 0]
        into += torch.bmm(grad_scores.transpose(1, 2), half(C, h, 1)).view(into.shape)
        scores = torch.bmm(half(C, h, 1), half(B, h, 0).transpose(1, 2))
        add_to_half(grad_u, h, 0, torch.bmm(scores.transpose(1, 2), taken), first)


def in_tiles(tensor: Tensor, tile: int) -> Tensor:
    """(c, q, ...) -> (c q/t, t, ...)."""
    return tensor.unflatten(1, (-1, tile)).flatten(0, 1)


def tile_factors(running: Tensor, rows: Tensor | None, part: slice, tile: int) -> Tensor:
    """`pair_factors` within the tiles of some chunks: running (c, q, r), rows of all chunks."""
    return pair_factors(in_tiles(running, tile), None if rows is None else in_tiles(rows[part], tile))
