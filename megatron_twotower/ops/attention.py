"""Attention of both towers. No position encoding.

Shapes: query (b, heads, l, e); key, value (b, kv_heads, l, e), e the head size. Head i reads kv
head i // (heads / kv_heads). documents (b, l) int32: nothing is seen across documents.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Rows of a matrix of scores on a CPU, the queries of all heads that share a kv head: enough for a
# full matrix product.
ROWS = 256
# Queries per call where documents need a mask.
QUERY_CHUNK = 256
# Queries and keys of a tile of FlexAttention's mask.
FLEX_TILE = 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """Attention of the context tower: position i sees j <= i of its document. Returns (b, heads, l, e)."""
    if documents is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    places = torch.arange(query.shape[2], device=query.device)
    outs = []
    for start in range(0, query.shape[2], QUERY_CHUNK):
        rows, past = slice(start, start + QUERY_CHUNK), slice(0, start + QUERY_CHUNK)
        mask = _same(documents, rows, past) & (places[past] <= places[rows].unsqueeze(-1))
        seen = (query[:, :, rows], key[:, :, past], value[:, :, past])
        outs.append(F.scaled_dot_product_attention(*seen, attn_mask=mask.unsqueeze(1), enable_gqa=True))
    return torch.cat(outs, dim=2)


def _same(documents: Tensor, rows: slice, columns: slice) -> Tensor:
    """(b, rows, columns) bool: of one document."""
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
) -> Tensor:
    """Attention of the denoiser, all blocks in one pass.

    A query of block b sees the clean keys of every earlier block and the noisy keys of block b, in
    both directions. No gradient flows into the clean keys and values, which saves two of the five
    products of a backward pass. On CUDA with triton this is FlexAttention; elsewhere queries go by
    chunks against exactly the keys that they may need, and a chunk's scores are made again in the
    backward pass: what is kept is linear in l.

    Returns:
        (b, heads, l, e).
    """
    assert query.shape[2] % block == 0, (query.shape, block)
    if query.is_cuda and dispatch.unavailable("triton") is None:
        return flex_block_attention(
            query, key, value, clean_key=clean_key, clean_value=clean_value, block=block, documents=documents
        )
    return _BlockAttention.apply(query, key, value, clean_key, clean_value, block, documents)


# --- by chunks of queries -----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _hidden(start: int, stop: int, low: int, high: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What queries start..stop-1 do not see: of clean keys low..high-block-1, and of noisy keys low..high-1."""
    queries = torch.arange(start, stop, device=device).unsqueeze(-1) // block
    keys = torch.arange(low, high, device=device) // block
    return keys[: high - block - low] >= queries, keys != queries


class _Chunk:
    """Some queries of one sequence and one kv head, and all that they see.

    query (rows, e), scaled, head by head; keys and values: of clean positions 0 .. clean - 1, and
    of the noisy positions `noisy`.
    """

    def __init__(self, tensors: tuple[Tensor, ...], documents: Tensor | None, block: int, start: int, stop: int):
        query, key, value, clean_key, clean_value = tensors
        low, high = start // block * block, -(-stop // block) * block
        self.clean, self.noisy, self.block = high - block, slice(low, high), block
        self.rows, self.documents = slice(start, stop), documents
        self.heads = query.shape[0]
        self.query = (query[:, start:stop] * query.shape[-1] ** -0.5).flatten(0, 1)
        self.key, self.value = key[low:high], value[low:high]
        self.clean_key, self.clean_value = clean_key[: self.clean], clean_value[: self.clean]

    def scores(self, buffer: Tensor) -> Tensor:
        """(rows, clean + noisy) in the memory of `buffer`: minus infinity where nothing is seen."""
        return self._mask(self.product(self.query, self.clean_key, self.key, buffer))

    def product(self, rows: Tensor, clean: Tensor, noisy: Tensor, buffer: Tensor) -> Tensor:
        """rows (rows, e) times every clean and noisy vector: (rows, clean + noisy) in the memory of `buffer`."""
        out = buffer[: rows.shape[0] * (len(clean) + len(noisy))].view(rows.shape[0], -1)
        torch.mm(rows, clean.t(), out=out[:, : len(clean)])
        torch.mm(rows, noisy.t(), out=out[:, len(clean) :])
        return out

    def _mask(self, scores: Tensor) -> Tensor:
        view, low, high = scores.view(self.heads, -1, scores.shape[1]), self.noisy.start, self.noisy.stop
        clean, noisy = _hidden(self.rows.start, self.rows.stop, low, high, self.block, scores.device)
        view[:, :, low : self.clean].masked_fill_(clean, float("-inf"))
        view[:, :, self.clean :].masked_fill_(noisy, float("-inf"))
        if self.documents is not None:
            columns = torch.cat([self.documents[: self.clean], self.documents[self.noisy]])
            view.masked_fill_(columns != self.documents[self.rows].unsqueeze(-1), float("-inf"))
        return scores

    def mix(self, weights: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
        """weights (rows, clean + noisy) times the vectors: (heads, queries, e)."""
        out = torch.mm(weights[:, self.clean :], noisy)
        out.addmm_(weights[:, : self.clean], clean)
        return out.view(self.heads, -1, out.shape[-1])


def _chunks_of(
    tensors: tuple[Tensor, ...], documents: Tensor | None, block: int
) -> Iterator[tuple[int, slice, int, _Chunk]]:
    """Every (sequence, its heads, kv head, chunk)."""
    query, key = tensors[:2]
    heads = query.shape[1] // key.shape[1]
    step = max(1, ROWS // heads)
    for b in range(query.shape[0]):
        of_b = None if documents is None else documents[b]
        for kv in range(key.shape[1]):
            sharing = slice(kv * heads, (kv + 1) * heads)
            shared = (query[b, sharing], *(t[b, kv] for t in tensors[1:]))
            for start in range(0, query.shape[2], step):
                yield b, sharing, kv, _Chunk(shared, of_b, block, start, min(start + step, query.shape[2]))


def _buffer(query: Tensor, key: Tensor) -> Tensor:
    """Memory for the largest matrix of scores."""
    heads, length = query.shape[1] // key.shape[1], query.shape[2]
    rows = heads * min(length, max(1, ROWS // heads))
    return torch.empty(rows * 2 * length, dtype=query.dtype, device=query.device)


def _wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
        tensors, out = _wide((query, key, value, clean_key, clean_value)), torch.empty_like(query)
        scores, weights = (_buffer(tensors[0], key) for _ in range(2))
        for b, heads, _, chunk in _chunks_of(tensors, documents, block):
            made = chunk.scores(scores)
            seen = torch.softmax(made, dim=-1, out=weights[: made.numel()].view_as(made))
            out[b, heads, chunk.rows] = chunk.mix(seen, chunk.clean_value, chunk.value).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, documents = ctx.saved_tensors
        tensors, dtype = _wide(tuple(saved)), saved[0].dtype
        grad_query = torch.empty_like(tensors[0])
        grad_key, grad_value = torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])
        scores, weights = (_buffer(tensors[0], grad_key) for _ in range(2))
        scale = grad.shape[-1] ** -0.5
        for b, heads, kv, chunk in _chunks_of(tensors, documents, ctx.block):
            made = chunk.scores(scores)
            seen = torch.softmax(made, dim=-1, out=weights[: made.numel()].view_as(made))
            upstream = grad[b, heads, chunk.rows].to(grad_query.dtype).flatten(0, 1)
            grad_value[b, kv, chunk.noisy].addmm_(seen[:, chunk.clean :].t(), upstream)
            given = chunk.product(upstream, chunk.clean_value, chunk.value, scores)
            torch.ops.aten._softmax_backward_data.out(given, seen, -1, seen.dtype, grad_input=seen)
            grad_query[b, heads, chunk.rows] = chunk.mix(seen, chunk.clean_key, chunk.key) * scale
            grad_key[b, kv, chunk.noisy].addmm_(seen[:, chunk.clean :].t(), chunk.query)
        return *(t.to(dtype) for t in (grad_query, grad_key, grad_value)), None, None, None, None


# --- FlexAttention ------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Stretches of neighbouring positions, one to a row or column of tiles: whether there is anything in it, and the
    numbers of blocks, and of documents (b, ...) if they count, of its first and last position."""

    some: Tensor
    blocks: tuple[Tensor, Tensor]
    documents: tuple[Tensor, Tensor] | None


def _span(first: Tensor, last: Tensor, block: int, documents: Tensor | None) -> _Span:
    """Positions first..last, both (tiles,); none where last < first."""
    ends, some = (first, last), last >= first
    if documents is None:
        return _Span(some, (first // block, last // block), None)
    low, high = (documents[:, end.clamp(0, documents.shape[1] - 1)] for end in ends)
    return _Span(some, (first // block, last // block), (low, high))


def _tiles(queries: _Span, keys: _Span, *, clean: bool) -> tuple[Tensor, Tensor]:
    """Which tiles (b, query spans, key spans) hold a pair that counts, and in which all pairs do.

    Numbers of blocks and documents grow along the sequence, so the ends of a span say it. Of
    documents, two spans may share a number and yet no pair that counts: then the tile is looked at
    in vain.
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
    return some & keys.some, every | ~keys.some


def _flex_mask(length: int, block: int, device: torch.device, documents: Tensor | None = None) -> Any:
    """The block-sparse mask of l queries against l clean and l noisy keys, from the ends of its tiles alone: never
    l x 2l anywhere."""
    from torch.nn.attention.flex_attention import BlockMask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        clean = k < length
        place = torch.where(clean, k, k - length)
        allowed = torch.where(clean, place // block < q // block, place // block == q // block)
        return allowed if documents is None else allowed & (documents[b, q] == documents[b, place])

    firsts = torch.arange(0, 2 * length, FLEX_TILE, device=device)
    lasts = (firsts + FLEX_TILE).clamp(max=2 * length) - 1
    rows = -(-length // FLEX_TILE)
    queries = _span(firsts[:rows], lasts[:rows].clamp(max=length - 1), block, documents)
    # A column of tiles may hold the last clean and the first noisy keys.
    clean = _span(firsts, lasts.clamp(max=length - 1), block, documents)
    noisy = _span((firsts - length).clamp(min=0), lasts - length, block, documents)
    by_clean, by_noisy = _tiles(queries, clean, clean=True), _tiles(queries, noisy, clean=False)
    whole = (firsts[:rows] + FLEX_TILE <= length).unsqueeze(-1) & (firsts + FLEX_TILE <= 2 * length)
    every = by_clean[1] & by_noisy[1] & whole
    some = (by_clean[0] | by_noisy[0]) & ~every
    tables = (*_by_row(some), *_by_row(every))
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=FLEX_TILE, mask_mod=seen, seq_lengths=(length, 2 * length))


def _by_row(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles (b, rows, columns) or (rows, columns) bool as FlexAttention lists them, for b or 1 sequences and one head:
    how many a row has, and their columns, before those of the others."""
    tiles = tiles.view(-1, 1, *tiles.shape[-2:]).int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


@lru_cache(maxsize=16)
def _shape_mask(length: int, block: int, device: torch.device) -> Any:
    """The mask without documents, built once per shape."""
    return _flex_mask(length, block, device)


@lru_cache(maxsize=1)
def _last_document_mask() -> dict[str, Any]:
    return {}


def _mask_of(documents: Tensor | None, length: int, block: int, device: torch.device) -> Any:
    if documents is None:
        return _shape_mask(length, block, device)
    last = _last_document_mask()
    if last.get("documents") is not documents or last.get("block") != block:
        last.update(documents=documents, block=block, mask=_flex_mask(length, block, device, documents))
    return last["mask"]


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
) -> Tensor:
    """`block_attention` through FlexAttention: compiled on CUDA, and in its plain form, for tests, elsewhere."""
    mask = _mask_of(documents, query.shape[2], block, query.device)
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    return _flex(query.is_cuda)(query, keys, values, block_mask=mask, enable_gqa=True)


# --- the slow twin ------------------------------------------------------------------------------------------------


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
    """The same with one dense l x 2l mask and an explicit softmax."""
    heads, length, size = query.shape[1:]
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    of_block = torch.arange(length, device=query.device) // block
    clean, noisy = of_block < of_block.unsqueeze(-1), of_block == of_block.unsqueeze(-1)
    mask = torch.cat([clean, noisy], dim=-1)
    if documents is not None:
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        mask = (mask & torch.cat([same, same], dim=-1)).unsqueeze(1)
    scores = (query @ keys.transpose(-1, -2)) * size**-0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
