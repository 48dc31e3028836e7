"""Operations over context-parallel ranks are those of complete sequences, with their gradients."""

import pytest
import torch
import torch.nn.functional as F

from helpers.context_threads import ContextThreads, rows_of_rank, whole
from megatron_twotower.config.context_split import stretches
from megatron_twotower.ops.attention import block_attention, block_attention_ref, causal_attention
from megatron_twotower.ops.context_parallel import ContextRanks, context_ranks, finish
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv, seeded_block_conv_ref
from megatron_twotower.ops.scan import chunk_scan, scan_ref, two_stream_scan, two_stream_scan_ref

SEQUENCES, LENGTH, BLOCK, CHUNK = 3, 48, 4, 4
# One document over all ranks, boundaries at seams and beside them, and many documents.
DOCUMENTS = [[], [12, 24, 25, 47], list(range(2, 48, 5))]


def documents_of(known):
    if not known:
        return None
    starts = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int32)
    for row, at in enumerate(DOCUMENTS):
        starts[row, at] = 1
    return starts.cumsum(1, dtype=torch.int32) + 3


def randn(*shape, seed=0, positive=False):
    tensor = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.softplus(tensor) if positive else tensor


def scan_inputs(seed=0):
    heads, size, groups, state = 4, 3, 2, 5
    return {
        "x": randn(SEQUENCES, LENGTH, heads, size, seed=seed),
        "dt": 0.3 * randn(SEQUENCES, LENGTH, heads, seed=seed + 1, positive=True),
        "A": -randn(heads, seed=seed + 2, positive=True),
        "B": randn(SEQUENCES, LENGTH, groups, state, seed=seed + 3),
        "C": randn(SEQUENCES, LENGTH, groups, state, seed=seed + 4),
        "D": randn(heads, seed=seed + 5),
    }


def on_rank(tensors, ranks, rank):
    """The rows of a rank of everything that has positions, as leaves."""
    own = {
        name: rows_of_rank(tensor, ranks, rank) if tensor.shape[:2] == (SEQUENCES, LENGTH) else tensor
        for name, tensor in tensors.items()
    }
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in own.items()}


def joined(gradients):
    """Gradients of all ranks: of rows joined to sequences, of parameters summed."""
    first = gradients[0]
    return {
        name: whole([each[name] for each in gradients]) if first[name].dim() > 2 else sum(g[name] for g in gradients)
        for name in first
    }


def assert_equal_gradients(got, want):
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("length", [48, 96])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_stretches_are_a_partition_and_causal_attention_is_balanced(length, ranks):
    own = [stretches(length, ranks=ranks, rank=rank) for rank in range(ranks)]
    positions = [i for parts in own for part in parts for i in range(length)[part]]
    assert sorted(positions) == list(range(length))
    pairs = [sum(i + 1 for part in parts for i in range(length)[part]) for parts in own]
    assert len(set(pairs)) == 1, "all ranks have the same number of pairs of a query and a key"


def test_without_other_ranks_there_is_no_context_parallelism(monkeypatch):
    ContextThreads(monkeypatch, 1)
    assert context_ranks("context", None) is None and context_ranks(None, None) is None
    assert stretches(48, ranks=1, rank=0) == (slice(None),)


@pytest.mark.parametrize("known", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_scan_passes_states_and_their_gradients_over_seams(monkeypatch, ranks, known):
    documents, inputs = documents_of(known), scan_inputs()
    upstream = randn(*inputs["x"].shape, seed=9)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    expected, _ = scan_ref(*leaves.values(), documents=documents)
    expected.backward(upstream)
    threads = ContextThreads(monkeypatch, ranks)

    def rank(number):
        own = on_rank(inputs, ranks, number)
        rows = None if documents is None else rows_of_rank(documents, ranks, number)
        context = ContextRanks(threads.group, documents)
        y, states, final = chunk_scan(*own.values(), chunk=CHUNK, documents=rows, context=context)
        y.backward(rows_of_rank(upstream, ranks, number))
        return y.detach(), {name: tensor.grad for name, tensor in own.items()}, states, final

    ys, gradients, states, finals = zip(*threads.run(rank), strict=True)
    torch.testing.assert_close(whole(ys), expected.detach(), rtol=1e-10, atol=1e-10)
    assert_equal_gradients(joined(gradients), {name: tensor.grad for name, tensor in leaves.items()})
    _, all_states, final = chunk_scan(*inputs.values(), chunk=CHUNK, documents=documents)
    read = torch.ones(all_states.shape[:2], dtype=torch.bool)
    if documents is not None:  # the state of another document than that of the chunk's start is not read
        read[:, 1:] = documents[:, CHUNK::CHUNK] == documents[:, CHUNK - 1 : -1 : CHUNK]
    torch.testing.assert_close(whole(states)[read], all_states[read], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(finals[0][1::2], final, rtol=1e-10, atol=1e-10)
    names = [name for _, name, _ in threads.sent]
    assert names.count("all_gather") == 2 * ranks and len(names) == 2 * ranks, "once forward, once backward"


@pytest.mark.parametrize("known", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_blocks_of_the_denoiser_start_from_the_states_of_the_complete_sequence(monkeypatch, ranks, known):
    documents, clean, noisy = documents_of(known), scan_inputs(), scan_inputs(seed=20)
    past = {name: clean[name] for name in ("x", "dt", "A", "B")}
    expected = two_stream_scan_ref(
        *noisy.values(), **{f"clean_{name}": t for name, t in past.items()}, block=BLOCK, documents=documents
    )
    threads = ContextThreads(monkeypatch, ranks)

    def rank(number):
        rows = None if documents is None else rows_of_rank(documents, ranks, number)
        own, stream = (on_rank(tensors, ranks, number) for tensors in (clean, noisy))
        context = ContextRanks(threads.group, documents)
        with torch.no_grad():
            _, states, _ = chunk_scan(*own.values(), chunk=2 * BLOCK, documents=rows, context=context)
        y = two_stream_scan(
            *stream.values(),
            **{f"clean_{name}": own[name].detach() for name in past},
            states=states,
            block=BLOCK,
            chunk=2 * BLOCK,
            documents=rows,
        )
        y.sum().backward()
        return y.detach()

    torch.testing.assert_close(whole(threads.run(rank)), expected, rtol=1e-10, atol=1e-10)
    assert [name for _, name, _ in threads.sent] == ["all_gather"] * ranks, "the denoiser sends nothing"


@pytest.mark.parametrize("known", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_convolution_reads_inputs_across_seams(monkeypatch, ranks, known):
    channels, taps = 6, 4
    documents, x = documents_of(known), randn(SEQUENCES, LENGTH, channels)
    inputs = {"x": x, "weight": randn(channels, taps, seed=1), "bias": randn(channels, seed=2)}
    upstream, noisy = randn(*x.shape, seed=3), randn(*x.shape, seed=4)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    # Blocks of one position of a stream that is both streams: the plain convolution.
    expected = seeded_block_conv_ref(leaves["x"], leaves["x"], *list(leaves.values())[1:], block=1, documents=documents)
    expected.backward(upstream)
    threads = ContextThreads(monkeypatch, ranks)

    def rank(number):
        own = on_rank(inputs, ranks, number)
        rows = None if documents is None else rows_of_rank(documents, ranks, number)
        before = finish(ContextRanks(threads.group, documents).before(own["x"], taps - 1))
        out = causal_conv(own["x"], own["weight"], own["bias"], documents=rows, before=before)
        out.backward(rows_of_rank(upstream, ranks, number))
        history = block_history(own["x"].detach(), taps=taps, block=BLOCK, before=before.detach())
        stream = rows_of_rank(noisy, ranks, number).contiguous()
        with torch.no_grad():
            seeded = seeded_block_conv(stream, history, own["weight"], own["bias"], documents=rows)
        return out.detach(), {name: tensor.grad for name, tensor in own.items()}, seeded

    outs, gradients, seeded = zip(*threads.run(rank), strict=True)
    torch.testing.assert_close(whole(outs), expected.detach(), rtol=1e-10, atol=1e-10)
    want = {name: tensor.grad for name, tensor in leaves.items()}
    summed = {name: sum(each[name] for each in gradients) for name in ("weight", "bias")}
    assert_equal_gradients({"x": whole([each["x"] for each in gradients]), **summed}, want)
    in_blocks = seeded_block_conv_ref(noisy, x, inputs["weight"], inputs["bias"], block=BLOCK, documents=documents)
    torch.testing.assert_close(whole(seeded), in_blocks, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("known", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_reads_the_keys_of_other_ranks(monkeypatch, ranks, known):
    heads, kv_heads, size = 4, 2, 8
    documents = documents_of(known)
    # (b, l, heads, e), as the rows are cut; the operations take (b, heads, l, e).
    inputs = {
        "query": randn(SEQUENCES, LENGTH, heads, size),
        "key": randn(SEQUENCES, LENGTH, kv_heads, size, seed=1),
        "value": randn(SEQUENCES, LENGTH, kv_heads, size, seed=2),
    }
    noisy = {name: randn(*tensor.shape, seed=10 + i) for i, (name, tensor) in enumerate(inputs.items())}
    upstream = randn(*inputs["query"].shape, seed=3)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    by_head = [tensor.transpose(1, 2) for tensor in leaves.values()]
    expected = causal_attention(*by_head, documents=documents).transpose(1, 2)
    expected.backward(upstream)
    clean = [inputs[name].transpose(1, 2) for name in ("key", "value")]
    of_blocks = block_attention_ref(
        *(tensor.transpose(1, 2) for tensor in noisy.values()),
        clean_key=clean[0],
        clean_value=clean[1],
        block=BLOCK,
        documents=documents,
    ).transpose(1, 2)
    threads = ContextThreads(monkeypatch, ranks)

    def rank(number):
        own = on_rank(inputs, ranks, number)
        query, key, value = (tensor.transpose(1, 2) for tensor in own.values())
        context = ContextRanks(threads.group, documents)
        keys, values = finish(context.whole_sequences(key, value))
        stream = [rows_of_rank(tensor, ranks, number).transpose(1, 2) for tensor in noisy.values()]
        length, causal, blocks = query.shape[2], [], []
        for place, stretch in enumerate(context.numbers):
            end, rows = (stretch + 1) * length, slice(place, None, 2)
            known = None if documents is None else documents[:, :end]
            causal.append(causal_attention(query[rows], keys[:, :, :end], values[:, :, :end], documents=known))
            blocks.append(
                block_attention(
                    *(tensor[rows] for tensor in stream),
                    clean_key=keys[:, :, :end].detach(),
                    clean_value=values[:, :, :end].detach(),
                    block=BLOCK,
                    documents=known,
                )
            )
        out, denoised = (torch.stack(parts, dim=1).flatten(0, 1).transpose(1, 2) for parts in (causal, blocks))
        out.backward(rows_of_rank(upstream, ranks, number))
        return out.detach(), {name: tensor.grad for name, tensor in own.items()}, denoised

    outs, gradients, denoised = zip(*threads.run(rank), strict=True)
    torch.testing.assert_close(whole(outs), expected.detach(), rtol=1e-10, atol=1e-10)
    assert_equal_gradients(joined(gradients), {name: tensor.grad for name, tensor in leaves.items()})
    torch.testing.assert_close(whole(denoised), of_blocks, rtol=1e-10, atol=1e-10)
    assert [name for _, name, _ in sorted(threads.sent)] == ["all_gather", "reduce_scatter"] * ranks
