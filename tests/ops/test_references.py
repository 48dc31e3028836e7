"""Convolution, attention and head against their slow twins, all gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from megatron_twotower.ops import attention, convolution, cross_entropy
from megatron_twotower.ops.attention import block_attention, block_attention_ref, causal_attention, flex_block_attention
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv, seeded_block_conv_ref
from megatron_twotower.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from megatron_twotower.ops.norm import gated_rms_norm, gated_rms_norm_ref, rms_norm, rms_norm_ref


def draw(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def assert_same_gradients(got, want, tensors):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = draw(*got.shape, seed=99, grad=False)
    pairs = zip(torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Largest error over largest value: gradients of float32 are sums of many products, bfloat16 rounds
# each of them.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def assert_follows(operation, twin, tensors, dtype):
    """An operation in a narrow dtype against its twin in float64, from the same rounded inputs: value and gradients."""
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    got, want = operation(*narrow), twin(*wide)
    assert got.dtype == dtype
    upstream = draw(*got.shape, seed=99, grad=False).to(dtype)
    ours, theirs = torch.autograd.grad(got, narrow, upstream), torch.autograd.grad(want, wide, upstream.double())
    for a, b in zip((got, *ours), (want, *theirs), strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCES[dtype] * b.abs().max().clamp(min=1), (a, b)


def random_documents(length, seed):
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return starts.cumsum(1).to(torch.int32)


@given(
    block=st.sampled_from([1, 2, 3, 4, 12]),
    blocks=st.integers(1, 5),
    taps=st.integers(2, 5),
    packed=st.booleans(),
    cached=st.sampled_from([16, 1 << 20]),
    channels=st.sampled_from([5, 40]),
)
@settings(max_examples=50, deadline=None)
def test_seeded_convolution(block, blocks, taps, packed, cached, channels):
    length = block * blocks
    x, weight, bias = draw(2, length, channels), draw(channels, taps, seed=1), draw(channels, seed=2)
    clean = draw(2, length, channels, seed=3, grad=False)
    documents = random_documents(length, block) if packed else None
    history = block_history(clean, taps=taps, block=block)
    assert history.shape == (2, blocks, taps - 1, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "CPU_ELEMENTS", cached)
        got = seeded_block_conv(x, history, weight, bias, documents=documents)
        want = seeded_block_conv_ref(x, clean, weight, bias, block=block, documents=documents)
        assert_same_gradients(got, want, (x, weight, bias))


@pytest.mark.parametrize("packed", [False, True])
def test_causal_convolution_is_one_large_block(packed):
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    documents = random_documents(9, 4) if packed else None
    want = seeded_block_conv_ref(x, torch.zeros_like(x), weight, bias, block=9, documents=documents)
    assert_same_gradients(causal_conv(x, weight, bias, documents=documents), want, (x, weight, bias))


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
    query, key, value = (draw(2, heads, length, 6, seed=seed + i) for i, heads in enumerate((4, shared, shared)))
    names = ("clean_key", "clean_value")
    clean = {name: draw(2, shared, length, 6, seed=seed + 3 + i, grad=False) for i, name in enumerate(names)}
    shape = {"block": block, "documents": random_documents(length, seed) if packed else None}
    want = block_attention_ref(query, key, value, **clean, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORE_ROWS", rows)
        got = block_attention(query, key, value, **clean, **shape)
        assert_same_gradients(got, want, (query, key, value))


@given(
    dtype=st.sampled_from(list(TOLERANCES)),
    block=st.sampled_from([1, 3, 8]),
    blocks=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_narrow_dtypes(dtype, block, blocks, packed, seed):
    length = block * blocks
    documents = random_documents(length, seed) if packed else None
    attended = [draw(2, heads, length, 6, seed=seed + i) for i, heads in enumerate((4, 2, 2))]
    clean_key, clean_value = (draw(2, 2, length, 6, seed=seed + i, grad=False).to(dtype) for i in (3, 4))
    names = ("clean_key", "clean_value")
    shape = {"block": block, "documents": documents}
    assert_follows(
        lambda *own: block_attention(*own, **dict(zip(names, (clean_key, clean_value), strict=True)), **shape),
        lambda *own: block_attention_ref(
            *own, **dict(zip(names, (clean_key.double(), clean_value.double()), strict=True)), **shape
        ),
        attended,
        dtype,
    )
    filtered = [draw(2, length, 5, seed=seed), draw(5, 4, seed=seed + 1), draw(5, seed=seed + 2)]
    clean = draw(2, length, 5, seed=seed + 3, grad=False).to(dtype)
    history = block_history(clean, taps=4, block=block)
    assert_follows(
        lambda x, *own: seeded_block_conv(x, history, *own, documents=documents),
        lambda x, *own: seeded_block_conv_ref(x, clean.double(), *own, block=block, documents=documents),
        filtered,
        dtype,
    )
    normed = [draw(3, length, 8, seed=seed), draw(3, length, 8, seed=seed + 1), draw(2, 4, seed=seed + 2)]
    assert_follows(lambda *own: gated_rms_norm(*own, 1e-5), lambda *own: gated_rms_norm_ref(*own, 1e-5), normed, dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "block"), [(24, 4), (24, 8), (160, 16)])
def test_flex_attention_has_the_same_mask(length, block, packed):
    """In FlexAttention's plain form, which runs anywhere, forward alone; compiled it needs CUDA."""
    query, key, value = (draw(2, heads, length, 8, seed=i, grad=False) for i, heads in enumerate((4, 2, 2)))
    names = ("clean_key", "clean_value")
    clean = {name: draw(2, 2, length, 8, seed=3 + i, grad=False) for i, name in enumerate(names)}
    shape = {"block": block, "documents": random_documents(length, 1) if packed else None}
    got = flex_block_attention(query, key, value, **clean, **shape)
    want = block_attention_ref(query, key, value, **clean, **shape)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def tiles_of(mask, which):
    """Every (sequence, row, column) that a mask of FlexAttention lists."""
    counts, columns = getattr(mask, f"{which}num_blocks"), getattr(mask, f"{which}indices")
    each = [(b, row) for b in range(counts.shape[0]) for row in range(counts.shape[2])]
    return {(b, row, column) for b, row in each for column in columns[b, 0, row, : counts[b, 0, row]].tolist()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "block"), [(384, 16), (256, 128), (640, 40), (528, 176), (400, 4)])
def test_flex_tiles_are_those_of_the_whole_mask(length, block, packed):
    """FlexAttention builds the same table from all pairs. Where documents meet, ours may look at a tile in vain."""
    documents = (torch.arange(length) // 100).to(torch.int32).expand(2, -1) if packed else None
    mask = attention._build_mask(length, block, torch.device("cpu"), documents)
    whole = create_block_mask(mask.mask_mod, 2 if packed else None, None, length, 2 * length, device="cpu")
    assert tiles_of(mask, "full_kv_") == tiles_of(whole, "full_kv_")
    assert tiles_of(mask, "full_q_") == tiles_of(whole, "full_q_")
    ours, theirs = tiles_of(mask, "kv_"), tiles_of(whole, "kv_")
    assert ours == theirs if not packed else ours >= theirs and len(ours) <= len(theirs) + 2 * 2 * length // 100
    assert tiles_of(mask, "full_kv_") or block != 16 or packed, "a mask without whole tiles tests little"


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


def test_norms():
    x, weight = draw(3, 5, 12), draw(12, seed=1)
    assert_same_gradients(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), (x, weight))
    gate, by_group = draw(3, 5, 12, seed=2), draw(3, 4, seed=3)
    pair = (gated_rms_norm(x, gate, by_group, 1e-5), gated_rms_norm_ref(x, gate, by_group, 1e-5))
    assert_same_gradients(*pair, (x, gate, by_group))


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=20, deadline=None)
def test_linear_cross_entropy_in_bfloat16(positions, vocabulary, chunk, seed):
    targets, weights = torch.arange(positions) % vocabulary, torch.ones(positions)
    narrow = [draw(n, 6, seed=seed + n, grad=False).bfloat16() for n in (positions, vocabulary)]
    hidden, weight = (tensor.requires_grad_() for tensor in narrow)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights)
    want, each = linear_cross_entropy_ref(*wide, targets, weights)
    assert got.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(losses, each, rtol=0.02, atol=0.05)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, wide), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)


@given(
    positions=st.integers(0, 30), vocabulary=st.integers(2, 20), chunk=st.integers(1, 12), seed=st.integers(0, 10**6)
)
@settings(max_examples=50, deadline=None)
def test_linear_cross_entropy(positions, vocabulary, chunk, seed):
    hidden, weight = (draw(n, 6, seed=seed + n, grad=False).float() for n in (positions, vocabulary))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(positions) % vocabulary
    weights = torch.rand(positions, generator=torch.Generator().manual_seed(seed))
    weights[::5] = 0  # places that only fill up the list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "POSITION_CHUNK", chunk)
        got, losses = linear_cross_entropy(hidden, weight, targets, weights)
    want, each = linear_cross_entropy_ref(hidden, weight, targets, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * want, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_second_backward_pass_is_refused():
    """The first one uses the memory of its gradients."""
    hidden, weight = torch.ones(3, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, torch.arange(3), torch.ones(3))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def test_no_scored_position_gives_zero_loss_and_zero_gradients():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert total.item() == 0 and losses.numel() == 0 and weight.grad is not None and not weight.grad.any()
