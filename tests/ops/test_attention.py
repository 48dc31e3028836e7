"""Attention against its reference implementations, all gradients included."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from helpers.references import TOLERANCES, assert_follows, assert_same_gradients, draw, random_documents
from megatron_twotower.ops import attention
from megatron_twotower.ops.attention import (
    block_attention,
    block_attention_ref,
    block_mask,
    causal_attention,
    flex_block_attention,
)


def attended(length, *, size=6, shared=2, seed=0, grad=True):
    """Query, key and value of two sequences; by name the clean key and value, without gradients."""
    own = [draw(2, heads, length, size, seed=seed + i, grad=grad) for i, heads in enumerate((4, shared, shared))]
    names = ("clean_key", "clean_value")
    return own, {name: draw(2, shared, length, size, seed=seed + 3 + i, grad=False) for i, name in enumerate(names)}


@given(
    block=st.sampled_from([1, 2, 3, 4, 12]),
    blocks=st.integers(1, 6),
    rows=st.sampled_from([2, 6, 20, 512]),
    packed=st.booleans(),
    shared=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_block_attention(block, blocks, rows, packed, shared, seed):
    length = block * blocks
    own, clean = attended(length, shared=shared, seed=seed)
    shape = {"block": block, "documents": random_documents(length, seed) if packed else None}
    want = block_attention_ref(*own, **clean, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORE_ROWS", rows)
        got = block_attention(*own, **clean, **shape)
        assert_same_gradients(got, want, own)


@given(
    dtype=st.sampled_from(list(TOLERANCES)),
    block=st.sampled_from([1, 3, 8]),
    blocks=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_block_attention_in_narrow_dtypes(dtype, block, blocks, packed, seed):
    length = block * blocks
    own, clean = attended(length, seed=seed)
    clean = {name: tensor.to(dtype) for name, tensor in clean.items()}
    wide = {name: tensor.double() for name, tensor in clean.items()}
    shape = {"block": block, "documents": random_documents(length, seed) if packed else None}
    assert_follows(
        lambda *own: block_attention(*own, **clean, **shape),
        lambda *own: block_attention_ref(*own, **wide, **shape),
        own,
        dtype,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "block"), [(24, 4), (24, 8), (160, 16)])
def test_flex_attention_has_the_same_mask(length, block, packed):
    """Not compiled, which runs anywhere, forward only; compiled, FlexAttention needs CUDA."""
    own, clean = attended(length, size=8, grad=False)
    shape = {"block": block, "documents": random_documents(length, 1) if packed else None}
    got = flex_block_attention(*own, **clean, **shape)
    want = block_attention_ref(*own, **clean, **shape)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_one_mask_is_built_for_all_layers_of_a_micro_batch(monkeypatch, packed):
    own, clean = attended(24, size=8, grad=False)
    tokens, documents = torch.zeros(2, 24), random_documents(24, 1) if packed else None
    shape = {"block": 4, "documents": documents}
    assert block_mask(tokens, **shape) is None, "attention in torch needs none"
    monkeypatch.setattr(attention, "_uses_flex", lambda x: True)
    mask = block_mask(tokens, **shape)
    want = block_attention_ref(*own, **clean, **shape)
    monkeypatch.setattr(attention, "_build_mask", None)
    monkeypatch.setattr(attention, "_mask_of_shape", None)
    for _ in range(2):
        got = block_attention(*own, **clean, **shape, mask=mask)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_layers_of_a_model_share_the_mask(monkeypatch, groups, packed):
    """Not compiled, forward only, on the CPU."""
    config = tiny_config("*M*")
    model, _ = build_two_tower(config, groups)
    batch = random_noisy_batch(config)
    if packed:
        batch = dataclasses.replace(batch, documents=(torch.arange(batch.tokens.shape[1]) // 8).int().expand(2, -1))
    built, build = [], attention._flex_mask
    with torch.no_grad():
        want = model(batch)
        monkeypatch.setattr(attention, "_uses_flex", lambda x: True)
        monkeypatch.setattr(attention, "_flex_mask", lambda *shape: built.append(build(*shape)) or built[-1])
        torch.testing.assert_close(model(batch), want)
    assert len(built) == 1


def test_few_tiles_of_the_backward_pass_are_for_keys_and_values():
    """Of 8192 tokens: all tiles for the gradient of queries, the noisy ones for that of keys."""
    mask = attention._build_mask(8192, 32, torch.device("cpu"))
    by_rows = len(tiles_of(mask, "kv_") | tiles_of(mask, "full_kv_"))
    by_columns = len(tiles_of(mask, "q_") | tiles_of(mask, "full_q_"))
    assert (by_rows, by_columns) == (2144, 64)


def test_flex_attention_sends_no_gradient_into_clean_keys(monkeypatch):
    own, clean = attended(24, size=8)
    clean = {name: tensor.requires_grad_() for name, tensor in clean.items()}
    given = []
    monkeypatch.setattr(attention, "_flex", lambda compiled: lambda *tensors, **more: given.extend(tensors))
    flex_block_attention(*own, **clean, block=4)
    _, keys, values = given
    found = torch.autograd.grad((keys + values).sum(), [*own[1:], *clean.values()], allow_unused=True)
    assert [gradient is not None for gradient in found] == [True, True, False, False]


def tiles_of(mask, which):
    """All (sequence, row, column) that a mask of FlexAttention lists."""
    counts, columns = getattr(mask, f"{which}num_blocks"), getattr(mask, f"{which}indices")
    each = [(b, row) for b in range(counts.shape[0]) for row in range(counts.shape[2])]
    return {(b, row, column) for b, row in each for column in columns[b, 0, row, : counts[b, 0, row]].tolist()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "block"), [(384, 16), (256, 128), (640, 40), (528, 176), (400, 4)])
def test_flex_tiles_are_those_of_the_whole_mask(length, block, packed):
    """As FlexAttention builds it from all pairs. At the ends of documents, ours may add a tile."""
    documents = (torch.arange(length) // 100).to(torch.int32).expand(2, -1) if packed else None
    mask = attention._build_mask(length, block, torch.device("cpu"), documents)
    whole = create_block_mask(mask.mask_mod, 2 if packed else None, None, length, 2 * length, device="cpu")
    assert tiles_of(mask, "full_kv_") == tiles_of(whole, "full_kv_")
    # The lists of columns are for the gradients of keys and values. Those of clean keys are empty,
    # except in a column that has noisy keys too.
    first = length // attention.FLEX_TILE
    noisy = {tile for tile in tiles_of(whole, "full_q_") if tile[1] >= first}
    assert tiles_of(mask, "full_q_") == noisy
    transposed = {(b, column, row) for b, row, column in tiles_of(mask, "kv_") if column >= first}
    assert tiles_of(mask, "q_") == transposed
    ours, theirs = tiles_of(mask, "kv_"), tiles_of(whole, "kv_")
    assert ours == theirs if not packed else ours >= theirs and len(ours) <= len(theirs) + 2 * 2 * length // 100
    assert tiles_of(mask, "full_kv_") or block != 16 or packed, "a mask without full tiles tests little"


def test_causal_attention_of_packed_documents_is_that_of_each_alone(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    query, key, value = draw(1, 4, 9, 6), draw(1, 2, 9, 6, seed=1), draw(1, 2, 9, 6, seed=2)
    got = causal_attention(query, key, value, documents=torch.tensor([[0, 0, 0, 0, 0, 2, 2, 2, 2]]))
    parts = [[t[:, :, part] for t in (query, key, value)] for part in (slice(0, 5), slice(5, 9))]
    want = torch.cat([causal_attention(*part) for part in parts], dim=2)
    assert_same_gradients(got, want, (query, key, value))


def test_blocks_of_one_copied_token_are_causal_attention():
    query, key, value = draw(2, 4, 7, 6), draw(2, 2, 7, 6, seed=1), draw(2, 2, 7, 6, seed=2)
    got = block_attention(query, key, value, clean_key=key, clean_value=value, block=1)
    torch.testing.assert_close(got, causal_attention(query, key, value), rtol=1e-12, atol=1e-12)
