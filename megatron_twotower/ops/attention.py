"""Attention of both towers. No position encoding.

Shapes: query (b, heads, l, e); key, value (b, kv_heads, l, e), e the head size. Head i reads kv head
i // (heads / kv_heads).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries per call: long enough for full matrix products, short enough that a mask stays small.
QUERY_CHUNK = 256


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the context tower: position i sees j <= i. Returns (b, heads, l, e)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@lru_cache(maxsize=256)
def _chunk_mask(start: int, stop: int, block: int, device: torch.device) -> Tensor:
    """Queries start..stop-1 against clean keys 0..stop-block-1 followed by noisy keys start..stop-1."""
    queries = torch.arange(start, stop, device=device).unsqueeze(-1) // block
    clean = torch.arange(0, stop - block, device=device) // block
    noisy = torch.arange(start, stop, device=device) // block
    return torch.cat([clean < queries, noisy == queries], dim=-1)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, *, clean_key: Tensor, clean_value: Tensor, block: int
) -> Tensor:
    """Attention of the denoiser, all blocks in one pass.

    A query of block b sees the clean keys of every earlier block and the noisy keys of block b, in both directions.
    Queries go in chunks of whole blocks; a chunk's keys are exactly those it may need, so that work and memory are
    half of a dense l x 2l product and a mask is never larger than a chunk.

    Returns:
        (b, heads, l, e).
    """
    length = query.shape[2]
    assert length % block == 0, (length, block)
    step = max(block, QUERY_CHUNK - QUERY_CHUNK % block)
    outs = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        keys = torch.cat([clean_key[:, :, : stop - block], key[:, :, start:stop]], dim=2)
        values = torch.cat([clean_value[:, :, : stop - block], value[:, :, start:stop]], dim=2)
        mask = _chunk_mask(start, stop, block, query.device)
        chunk = query[:, :, start:stop]
        outs.append(F.scaled_dot_product_attention(chunk, keys, values, attn_mask=mask, enable_gqa=True))
    return torch.cat(outs, dim=2)


def block_attention_ref(
    query: Tensor, key: Tensor, value: Tensor, *, clean_key: Tensor, clean_value: Tensor, block: int
) -> Tensor:
    """The same with one dense l x 2l mask and an explicit softmax."""
    heads, length, size = query.shape[1:]
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    of_block = torch.arange(length, device=query.device) // block
    clean, noisy = of_block < of_block.unsqueeze(-1), of_block == of_block.unsqueeze(-1)
    scores = (query @ keys.transpose(-1, -2)) * size**-0.5
    return scores.masked_fill(~torch.cat([clean, noisy], dim=-1), float("-inf")).softmax(-1) @ values
