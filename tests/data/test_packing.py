"""The stream of padded documents: every window against a reference implementation."""

import numpy as np
import pytest

from megatron_twotower.data import packing
from megatron_twotower.data.packing import Packing, WholePacking


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def reference_stream(lengths, alignment):
    """Reference implementation: the complete padded stream, document by document."""
    documents, sources, padding, at = [], [], [], 0
    for number, length in enumerate(lengths):
        for offset in range(-(-length // alignment) * alignment):
            documents.append(number)
            sources.append(at + min(offset, length - 1))
            padding.append(offset >= length)
        at += length
    return np.array(documents), np.array(sources), np.array(padding)


@pytest.mark.parametrize("alignment", [1, 2, 16, 32])
@pytest.mark.parametrize("longest", [1, 3, 40, 700])
def test_any_window_equals_the_reference(alignment, longest, monkeypatch):
    monkeypatch.setattr(packing, "_GROUP", 4)
    monkeypatch.setattr(packing, "_GROUPS_AT_ONCE", 8)
    lengths = np.random.default_rng(alignment * longest).integers(1, longest + 1, 150)
    packed = Packing.of(starts_of(lengths), alignment=alignment)
    documents, sources, padding = reference_stream(lengths.tolist(), alignment)
    assert packed.total_tokens == len(documents)
    assert packed.padding_fraction == pytest.approx(padding.mean())
    total = packed.total_tokens
    for first, count in ((0, total), (0, 1), (total - 1, 1), (total // 3, total // 2), (total // 2, 1), (5, 64)):
        count = min(count, total - first)
        found, cut = packed.window(first, count), slice(first, first + count)
        assert (found.sources == sources[cut]).all()
        assert (found.padding == padding[cut]).all()
        assert (found.documents == documents[cut] - documents[first]).all()
        assert found.documents.dtype == np.int32 and found.sources.dtype == np.int64


def test_blocks_never_straddle_documents_and_begin_with_a_token():
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    packed = Packing.of(starts_of(lengths), alignment=16)
    whole = packed.window(0, packed.total_tokens)
    blocks = whole.documents.reshape(-1, 16)
    assert (blocks == blocks[:, :1]).all()
    assert not whole.padding.reshape(-1, 16)[:, 0].any()
    assert sorted(whole.sources[~whole.padding].tolist()) == list(range(lengths.sum())), "every token once"


def test_documents_of_no_length_take_no_place():
    packed = Packing.of(starts_of([0, 5, 0, 0, 3]), alignment=4)
    found = packed.window(0, packed.total_tokens)
    assert packed.total_tokens == 12
    assert found.sources.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7]
    assert np.flatnonzero(np.diff(found.documents)).tolist() == [7]


def whole_sequences(lengths, alignment, length):
    """Reference implementation: documents go into sequences one by one, each as far as it fits."""
    sequences, room, at = [], 0, 0
    for size in lengths:
        kept = min(size, length)
        padded = -(-kept // alignment) * alignment
        if padded > room:
            sequences.append([])
            room = length
        last = sequences[-1][-1][0] + 1 if sequences[-1] else 0
        sequences[-1] += [(last, at + min(offset, kept - 1), False) for offset in range(padded)]
        room -= padded
        at += size
    return [each + [(*each[-1][:2], True)] * (length - len(each)) for each in sequences]


@pytest.mark.parametrize(("alignment", "length"), [(1, 64), (8, 64), (16, 128), (64, 64)])
@pytest.mark.parametrize("longest", [3, 40, 150])
def test_whole_documents_fill_sequences(alignment, length, longest):
    lengths = np.random.default_rng(alignment * longest).integers(1, longest + 1, 200).tolist()
    packed, expected = (
        WholePacking.of(starts_of(lengths), alignment=alignment, length=length),
        whole_sequences(lengths, alignment, length),
    )
    assert packed.total_tokens == length * len(expected)
    for number, sequence in enumerate(expected):
        found = packed.window(number * length, length)
        documents, sources, padding = map(np.array, zip(*sequence, strict=True))
        assert (found.documents == 2 * documents + 1).all() and found.documents.dtype == np.int32
        assert found.scored is None
        assert (found.sources == sources).all() and found.sources.dtype == np.int64
        assert (found.padding == padding).all()
    kept = sum(min(size, length) for size in lengths)
    assert packed.padding_fraction == pytest.approx(1 - kept / packed.total_tokens)
    assert packed.cut_documents == sum(size > length for size in lengths)


@pytest.mark.parametrize(("alignment", "length"), [(1, 64), (8, 64), (16, 128)])
def test_every_answer_begins_a_block_after_what_is_before_it(alignment, length):
    rng = np.random.default_rng(alignment)
    conversations = []  # where each begins, and the begin and end of its answers
    for begin in np.cumsum(rng.integers(60, 200, 80)).tolist():
        edges = np.sort(rng.choice(np.arange(begin + 1, begin + 90), 2 * int(rng.integers(1, 4)), replace=False))
        conversations += [(begin, first, last) for first, last in edges.reshape(-1, 2).tolist()]
    packed = WholePacking.of_answers(*np.array(conversations).T, alignment=alignment, length=length)
    found = []
    for number in range(packed.total_tokens // length):
        window = packed.window(number * length, length)
        assert (np.diff(window.documents) >= 0).all() and window.documents.dtype == np.int32
        assert not (window.scored & window.padding).any()
        for document in np.unique(window.documents[~window.padding]):
            here = np.flatnonzero((window.documents == document) & ~window.padding)
            assert (np.diff(here) == 1).all() and (here[-1] + 1) % alignment == 0
            scored = here[window.scored[here]]
            assert scored[0] % alignment == 0 and scored[-1] == here[-1]
            sources = window.sources[here]
            # The last token of the answer fills up the block.
            last = int(sources[-1])
            assert sources.tolist() == [min(int(sources[0]) + k, last) for k in range(len(here))]
            found.append((int(sources[0]), int(window.sources[scored[0]]), last + 1))
    cut = 0
    expected = []
    for begin, first, last in conversations:
        shift = -(first - begin) % alignment
        if first - begin + shift >= length:
            cut += 1
            continue
        cut += last - begin + shift > length
        expected.append((begin, first, min(last, begin + length - shift)))
    assert found == expected and packed.cut_documents == cut
    assert packed.padding_fraction == pytest.approx(1 - sum(c - a for a, _, c in expected) / packed.total_tokens)


def test_an_index_on_disk_stays_there(tmp_path):
    np.save(tmp_path / "starts.npy", starts_of(np.full(20_000, 10)))
    mapped = np.load(tmp_path / "starts.npy", mmap_mode="r")
    packed = Packing.of(mapped, alignment=16)
    assert packed.starts is mapped
    assert packed.sums.nbytes < mapped.nbytes / 100
    assert packed.window(16 * 12_345, 16).sources.tolist() == [*range(123_450, 123_460), *[123_459] * 6]
