"""Attention of both towers, without position encoding.

Shapes: query (b, heads, l, e); key, value (b, kv_heads, l, e), with head size e. Head i reads kv
head i // (heads / kv_heads). documents (b, l) int32: no position attends to another document.

The l queries may be the end of a longer stream: then the keys of the clean stream, and documents,
have f + l positions, of which the first f are before the queries. f is a multiple of the block.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Rows of a matrix of scores of block attention in torch: the queries of all heads that share a kv
# head. Enough for an efficient matrix product.
SCORE_ROWS = 256
# Queries per call of causal attention with documents, which needs a mask.
QUERY_CHUNK = 256
# Queries and keys of a tile of the FlexAttention mask.
FLEX_TILE = 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """Causal attention of the context tower: (b, heads, l, e).

    Position i attends to the positions j <= i of its document. There may be more keys than queries:
    the queries are the last positions.
    """
    length, total = query.shape[2], key.shape[2]
    if documents is None and length == total:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    if documents is None and query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler, for seconds

        last_positions = causal_lower_right(length, total)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=last_positions, enable_gqa=True)
    positions = torch.arange(total, device=query.device)
    outs = []
    for start in range(total - length, total, QUERY_CHUNK):
        rows, past = slice(start, start + QUERY_CHUNK), slice(0, start + QUERY_CHUNK)
        mask = (positions[past] <= positions[rows].unsqueeze(-1)).unsqueeze(0)
        if documents is not None:
            mask = mask & _same_document(documents, rows, past)
        own = query[:, :, start - (total - length) :][:, :, :QUERY_CHUNK]
        inputs = (own, key[:, :, past], value[:, :, past])
        outs.append(F.scaled_dot_product_attention(*inputs, attn_mask=mask.unsqueeze(1), enable_gqa=True))
    return torch.cat(outs, dim=2)


def _same_document(documents: Tensor, rows: slice, columns: slice) -> Tensor:
    """Whether positions are of one document: (b, rows, columns) bool."""
    return documents[:, rows].unsqueeze(-1) == documents[:, columns].unsqueeze(-2)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clean_key: Tensor,
    clean_value: Tensor,
    block: int,
    documents: Tensor | None = None,
    mask: Any = None,
) -> Tensor:
    """Attention of the denoiser, all blocks at once.

    A query of block b attends to the clean keys of all earlier blocks and to the noisy keys of
    block b, before and after it. On CUDA with triton this is FlexAttention. Elsewhere each chunk of
    queries is multiplied with exactly the keys that it may need, and the backward pass recomputes
    its scores, so the memory between the passes is linear in l. No gradient flows into the clean
    keys and values, which saves two of the five products of a backward pass in torch, and four of
    seven in FlexAttention.

    Args:
        query: Of the noisy stream, like key and value.
        clean_key: Key of the clean stream (b, kv_heads, f + l, e), like clean_value.
        block: Block size s, a divisor of l.
        documents: (b, f + l), or `None` for one document.
        mask: From `block_mask`. FlexAttention builds it itself if it is `None`.

    Returns:
        (b, heads, l, e).
    """
    assert query.shape[2] % block == 0, (query.shape, block)
    if _uses_flex(query):
        return flex_block_attention(
            query, key, value, clean_key=clean_key, clean_value=clean_value, block=block, documents=documents, mask=mask
        )
    return _BlockAttention.apply(query, key, value, clean_key, clean_value, block, documents)


# --- in torch, by chunks of queries ---


@lru_cache(maxsize=256)
def _masked_pairs(
    start: int, stop: int, low: int, high: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The masked pairs of queries start..stop-1, as two (queries, keys) bool.

    The first is with the clean keys low..high-block-1, the second with the noisy keys low..high-1.
    """
    queries = torch.arange(start, stop, device=device).unsqueeze(-1) // block
    keys = torch.arange(low, high, device=device) // block
    return keys[: high - block - low] >= queries, keys != queries


class _QueryChunk:
    """Some queries of one sequence and one kv head, and the keys and values that they may need.

    query (rows, e), scaled, head after head. Keys and values are those of the clean positions
    0 .. clean - 1 and of the noisy positions `noisy`. Noisy positions count from that of the first
    query, clean ones from the start of the sequence, `first` earlier.
    """

    def __init__(self, tensors: tuple[Tensor, ...], documents: Tensor | None, block: int, start: int, stop: int):
        query, key, value, clean_key, clean_value = tensors
        low, high = start // block * block, -(-stop // block) * block
        self.first = len(clean_key) - len(key)
        self.clean, self.noisy, self.block = self.first + high - block, slice(low, high), block
        self.rows, self.documents = slice(start, stop), documents
        self.heads = query.shape[0]
        self.query = (query[:, start:stop] * query.shape[-1] ** -0.5).flatten(0, 1)
        self.key, self.value = key[low:high], value[low:high]
        self.clean_key, self.clean_value = clean_key[: self.clean], clean_value[: self.clean]

    def scores(self, buffer: Tensor) -> Tensor:
        """Scores (rows, clean + noisy) in the memory of `buffer`, minus infinity if masked."""
        return self._masked(self.products(self.query, self.clean_key, self.key, buffer))

    def products(self, rows: Tensor, clean: Tensor, noisy: Tensor, buffer: Tensor) -> Tensor:
        """Products of rows (rows, e) and all clean and noisy vectors, in the memory of `buffer`."""
        out = buffer[: rows.shape[0] * (len(clean) + len(noisy))].view(rows.shape[0], -1)
        torch.mm(rows, clean.t(), out=out[:, : len(clean)])
        torch.mm(rows, noisy.t(), out=out[:, len(clean) :])
        return out

    def _masked(self, scores: Tensor) -> Tensor:
        view, low, high = scores.view(self.heads, -1, scores.shape[1]), self.noisy.start, self.noisy.stop
        clean, noisy = _masked_pairs(self.rows.start, self.rows.stop, low, high, self.block, scores.device)
        view[:, :, self.first + low : self.clean].masked_fill_(clean, float("-inf"))
        view[:, :, self.clean :].masked_fill_(noisy, float("-inf"))
        if self.documents is not None:
            own = self.documents[self.first :]
            columns = torch.cat([self.documents[: self.clean], own[self.noisy]])
            view.masked_fill_(columns != own[self.rows].unsqueeze(-1), float("-inf"))
        return scores

    def weighted_sum(self, weights: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
        """Sums of the vectors, weighted by weights (rows, clean + noisy): (heads, queries, e)."""
        out = torch.mm(weights[:, self.clean :], noisy)
        out.addmm_(weights[:, : self.clean], clean)
        return out.view(self.heads, -1, out.shape[-1])


def _query_chunks(
    tensors: tuple[Tensor, ...], documents: Tensor | None, block: int
) -> Iterator[tuple[int, slice, int, _QueryChunk]]:
    """All chunks, each as (sequence, the heads that share its kv head, kv head, chunk)."""
    query, key = tensors[:2]
    heads = query.shape[1] // key.shape[1]
    step = max(1, SCORE_ROWS // heads)
    for b in range(query.shape[0]):
        b_documents = None if documents is None else documents[b]
        for kv in range(key.shape[1]):
            group = slice(kv * heads, (kv + 1) * heads)
            tensors_of_head = (query[b, group], *(t[b, kv] for t in tensors[1:]))
            for start in range(0, query.shape[2], step):
                stop = min(start + step, query.shape[2])
                yield b, group, kv, _QueryChunk(tensors_of_head, b_documents, block, start, stop)


def _buffer(query: Tensor, key: Tensor, clean_key: Tensor) -> Tensor:
    """Memory for the largest matrix of scores (elements,)."""
    heads, length = query.shape[1] // key.shape[1], query.shape[2]
    rows = heads * min(length, max(1, SCORE_ROWS // heads))
    return torch.empty(rows * (clean_key.shape[2] + length), dtype=query.dtype, device=query.device)


def _widen(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(dtype) for t in tensors)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        clean_key: Tensor,
        clean_value: Tensor,
        block: int,
        documents: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, clean_key, clean_value, documents)
        ctx.block = block
        tensors, out = _widen((query, key, value, clean_key, clean_value)), torch.empty_like(query)
        scores_buffer, weights_buffer = (_buffer(tensors[0], key, clean_key) for _ in range(2))
        for b, heads, _, chunk in _query_chunks(tensors, documents, block):
            scores = chunk.scores(scores_buffer)
            weights = torch.softmax(scores, dim=-1, out=weights_buffer[: scores.numel()].view_as(scores))
            out[b, heads, chunk.rows] = chunk.weighted_sum(weights, chunk.clean_value, chunk.value).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, documents = ctx.saved_tensors
        tensors, dtype = _widen(tuple(saved)), saved[0].dtype
        grad_query = torch.empty_like(tensors[0])
        grad_key, grad_value = torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])
        scores_buffer, weights_buffer = (_buffer(tensors[0], grad_key, tensors[3]) for _ in range(2))
        scale = grad.shape[-1] ** -0.5
        for b, heads, kv, chunk in _query_chunks(tensors, documents, ctx.block):
            scores = chunk.scores(scores_buffer)
            weights = torch.softmax(scores, dim=-1, out=weights_buffer[: scores.numel()].view_as(scores))
            upstream = grad[b, heads, chunk.rows].to(grad_query.dtype).flatten(0, 1)
            grad_value[b, kv, chunk.noisy].addmm_(weights[:, chunk.clean :].t(), upstream)
            grad_weights = chunk.products(upstream, chunk.clean_value, chunk.value, scores_buffer)
            torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, weights.dtype, grad_input=weights)
            grad_query[b, heads, chunk.rows] = chunk.weighted_sum(weights, chunk.clean_key, chunk.key) * scale
            grad_key[b, kv, chunk.noisy].addmm_(weights[:, chunk.clean :].t(), chunk.query)
        return *(t.to(dtype) for t in (grad_query, grad_key, grad_value)), None, None, None, None


# --- FlexAttention ---


class _Ranges(NamedTuple):
    """Ranges of positions, one for each row or column of tiles.

    Attributes:
        nonempty: (tiles,) bool.
        blocks: Indices of the blocks of the first and the last position, (tiles,) each.
        documents: Their documents, (b, tiles) each, or `None` for one document.
    """

    nonempty: Tensor
    blocks: tuple[Tensor, Tensor]
    documents: tuple[Tensor, Tensor] | None


def _ranges(first: Tensor, last: Tensor, block: int, documents: Tensor | None) -> _Ranges:
    """The ranges first..last of positions, both (tiles,); empty if last < first."""
    ends, nonempty = (first, last), last >= first
    if documents is None:
        return _Ranges(nonempty, (first // block, last // block), None)
    low, high = (documents[:, end.clamp(0, documents.shape[1] - 1)] for end in ends)
    return _Ranges(nonempty, (first // block, last // block), (low, high))


def _allowed_tiles(queries: _Ranges, keys: _Ranges, *, clean: bool) -> tuple[Tensor, Tensor]:
    """Two masks of tiles (b, queries, keys): some pair is allowed, and all pairs are.

    The indices of blocks and documents grow along the sequence, so those of the first and the last
    position decide. With documents, the first mask may contain a tile without an allowed pair: the
    tile is then computed without need.
    """
    (q_low, q_high), (k_low, k_high) = ((t.unsqueeze(-1) for t in queries.blocks), keys.blocks)
    if clean:
        some, every = k_low < q_high, k_high < q_low
    else:
        some, every = (k_low <= q_high) & (q_low <= k_high), (k_low == q_high) & (q_low == k_high)
    if queries.documents is not None and keys.documents is not None:
        (q_low, q_high), (k_low, k_high) = (
            (t.unsqueeze(-1) for t in queries.documents),
            (t.unsqueeze(-2) for t in keys.documents),
        )
        some = some & (k_low <= q_high) & (q_low <= k_high)
        every = every & (k_low == q_high) & (q_low == k_high)
    return some & keys.nonempty, every | ~keys.nonempty


def _build_mask(
    length: int, block: int, device: torch.device, documents: Tensor | None = None, *, first: int = 0
) -> Any:
    """The block-sparse mask of l queries with f + l clean and l noisy keys; `first` is f.

    It is built from the first and last positions of the tiles, without a tensor of all pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = first + length

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        clean, own = k < total, first + q
        position = torch.where(clean, k, k - length)
        in_blocks = torch.where(clean, position // block < own // block, position // block == own // block)
        return in_blocks if documents is None else in_blocks & (documents[b, own] == documents[b, position])

    rows = torch.arange(0, length, FLEX_TILE, device=device)
    queries = _ranges(first + rows, first + (rows + FLEX_TILE).clamp(max=length) - 1, block, documents)
    firsts = torch.arange(0, total + length, FLEX_TILE, device=device)
    lasts = (firsts + FLEX_TILE).clamp(max=total + length) - 1
    # A column of tiles may contain the last clean and the first noisy keys.
    clean = _ranges(firsts, lasts.clamp(max=total - 1), block, documents)
    noisy = _ranges((firsts - length).clamp(min=first), lasts - length, block, documents)
    by_clean, by_noisy = _allowed_tiles(queries, clean, clean=True), _allowed_tiles(queries, noisy, clean=False)
    full = (rows + FLEX_TILE <= length).unsqueeze(-1) & (firsts + FLEX_TILE <= total + length)
    every = by_clean[1] & by_noisy[1] & full
    some = (by_clean[0] | by_noisy[0]) & ~every
    tables = (*_tile_lists(some), *_tile_lists(every))
    lengths = (length, total + length)
    mask = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=FLEX_TILE, mask_mod=allowed, seq_lengths=lengths)
    _skip_gradients(mask, columns=total // FLEX_TILE)
    return mask


def _skip_gradients(mask: Any, *, columns: int) -> None:
    """Let the backward pass of FlexAttention compute no gradient of the first columns of tiles.

    Its kernel has a part for the gradient of queries, which reads the lists of key tiles of each
    row, and a part for keys and values, which reads the lists of query tiles of each column (torch
    2.13, _inductor/kernel/flex/templates/flex_backwards.py.jinja). With empty lists the second part
    writes zeros.
    """
    for counts in (mask.q_num_blocks, mask.full_q_num_blocks):
        counts[..., :columns] = 0


def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of tiles in the form of FlexAttention, for b or 1 sequences and one head.

    tiles (b, rows, columns) or (rows, columns) bool. Returns the number of tiles in each row, and
    the columns of each row, those of its tiles first.
    """
    tiles = tiles.view(-1, 1, *tiles.shape[-2:]).int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


@lru_cache(maxsize=16)
def _mask_of_shape(length: int, block: int, device: torch.device, first: int) -> Any:
    """The mask without documents, built once for each shape."""
    return _build_mask(length, block, device, first=first)


def _uses_flex(x: Tensor) -> bool:
    return x.is_cuda and dispatch.unavailable("triton") is None


def block_mask(tokens: Tensor, *, block: int, documents: Tensor | None = None, first: int = 0) -> Any:
    """The `mask` of `block_attention` for one micro-batch, to build once for all layers.

    Args:
        tokens: (b, l) on the device of the attention.
        block: Block size s.
        documents: (b, f + l), or `None` for one document.
        first: f, the clean positions before the queries.

    Returns:
        A FlexAttention `BlockMask`, or `None` if `block_attention` does not use FlexAttention.
    """
    return _flex_mask(tokens.shape[1], block, tokens.device, documents, first) if _uses_flex(tokens) else None


def _flex_mask(length: int, block: int, device: torch.device, documents: Tensor | None, first: int) -> Any:
    if documents is None:
        return _mask_of_shape(length, block, device, first)
    return _build_mask(length, block, device, documents, first=first)


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clean_key: Tensor,
    clean_value: Tensor,
    block: int,
    documents: Tensor | None = None,
    mask: Any = None,
) -> Tensor:
    """`block_attention` by FlexAttention, compiled on CUDA, not compiled elsewhere for tests.

    No gradients flow into the clean keys and values.
    """
    if mask is None:
        first = clean_key.shape[2] - query.shape[2]
        mask = _flex_mask(query.shape[2], block, query.device, documents, first)
    # Detached: with this mask their gradients would be zeros.
    keys, values = torch.cat([clean_key.detach(), key], dim=2), torch.cat([clean_value.detach(), value], dim=2)
    return _flex(query.is_cuda)(query, keys, values, block_mask=mask, enable_gqa=True)


# --- reference implementation ---


def block_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    clean_key: Tensor,
    clean_value: Tensor,
    block: int,
    documents: Tensor | None = None,
) -> Tensor:
    """Reference of `block_attention`: a dense mask of all pairs and an explicit softmax."""
    heads, length, size = query.shape[1:]
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    of_block = torch.arange(clean_key.shape[2], device=query.device) // block
    own = of_block[-length:].unsqueeze(-1)
    mask = torch.cat([of_block < own, of_block[-length:] == own], dim=-1)
    if documents is not None:
        same = documents[:, -length:].unsqueeze(-1) == documents.unsqueeze(-2)
        mask = (mask & torch.cat([same, same[..., -length:]], dim=-1)).unsqueeze(1)
    scores = (query @ keys.transpose(-1, -2)) * size**-0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
