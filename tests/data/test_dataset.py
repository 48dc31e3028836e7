"""Order, slices and batches: pure functions of a position for any layout; and reading ahead."""

import dataclasses
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from helpers.memory_corpus import MemoryCorpus
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.context_split import stretches
from megatron_twotower.data.dataset import (
    UNREAD,
    SequenceDataset,
    TokenSequence,
    batches,
    global_batch,
    rank_slice,
    read_ahead,
    skipped_sequences,
    split_batch,
    stack_sequences,
)
from megatron_twotower.data.order import Permutation, Shuffle
from megatron_twotower.data.packing import Packing, WholePacking
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import train_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "text").mkdir()
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(" ".join(str(number * word) for word in range(5 + number)))
    train_tokenizer(["0 1 2 3"], vocab_size=262, output=root / "tokenizer")
    prepare(
        [str(root / "text")], tokenizer=root / "tokenizer", output=root / "out", holdout_fraction=0, shard_tokens=700
    )
    return Corpus.open(root / "out" / "train")


@pytest.fixture(scope="module")
def dataset(corpus):
    return SequenceDataset(corpus, sequence_length=LENGTH, seed=11)


# --- sequences and batches ---


def test_sequences_are_the_stream_in_pieces(corpus, dataset):
    stream = corpus.tokens(0, corpus.total_tokens)
    assert len(dataset) == corpus.total_tokens // LENGTH
    assert corpus.total_tokens % LENGTH  # the fixture has a rest, so the floor above is tested
    for number in range(len(dataset)):
        assert (dataset.sequence(number).tokens == stream[number * LENGTH : (number + 1) * LENGTH]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_context_rank_reads_its_stretches_and_the_token_after_each(corpus, monkeypatch, packed):
    packing = Packing.of(corpus.starts, alignment=4) if packed else None
    everything = SequenceDataset(corpus, sequence_length=LENGTH, seed=11, packing=packing)
    part = dataclasses.replace(everything, stretches=stretches(LENGTH, ranks=2, rank=0))
    assert part.stretches == (slice(0, 4), slice(12, 16))
    counts, read = [], Corpus.tokens
    monkeypatch.setattr(Corpus, "tokens", lambda self, start, count: counts.append(count) or read(self, start, count))
    got, want = global_batch(part, first=3, count=8), global_batch(everything, first=3, count=8)
    known = torch.zeros(LENGTH, dtype=torch.bool)
    known[[0, 1, 2, 3, 4, 12, 13, 14, 15]] = True
    assert torch.equal(got.tokens[:, known], want.tokens[:, known])
    assert (got.tokens[:, ~known] == UNREAD).all()
    if packed:
        assert torch.equal(got.documents, want.documents) and torch.equal(got.padding, want.padding)
    else:
        assert counts == [5, 4] * 8 + [LENGTH] * 8


def test_an_epoch_is_every_sequence_once_and_the_next_in_another_order(dataset):
    n = len(dataset)
    first, second = (global_batch(dataset, first=epoch * n, count=n) for epoch in (0, 1))
    for epoch, batch in enumerate((first, second)):
        assert batch.tokens.dtype == batch.samples.dtype == batch.epochs.dtype == batch.positions.dtype == torch.int64
        assert batch.tokens.shape == (n, LENGTH)
        assert batch.samples.sort().values.tolist() == list(range(n))
        assert batch.epochs.unique().tolist() == [epoch]
        assert batch.positions.tolist() == list(range(epoch * n, (epoch + 1) * n))
        for tokens, sample in zip(batch.tokens, batch.samples.tolist(), strict=True):
            assert (tokens.numpy() == dataset.sequence(sample).tokens).all()
    assert first.samples.tolist() != second.samples.tolist()
    assert first.samples.tolist() != list(range(n))


def test_without_shuffling_it_is_the_order_of_the_corpus(corpus, dataset):
    n = len(dataset)
    plain = SequenceDataset(corpus, sequence_length=LENGTH, seed=11, shuffle=Shuffle("none"))
    batch = global_batch(plain, first=n - 2, count=5)
    assert batch.samples.tolist() == [n - 2, n - 1, 0, 1, 2]
    assert batch.epochs.tolist() == [0, 0, 1, 1, 1]


def test_a_batch_is_the_same_however_it_is_cut(dataset):
    n = len(dataset)
    whole = global_batch(dataset, first=n - 7, count=20)  # over the end of an epoch
    assert whole.epochs.tolist() == [0] * 7 + [1] * 13
    for size in (1, 4, 5):
        parts = [global_batch(dataset, first=n - 7 + at, count=size) for at in range(0, 20, size)]
        for name in ("tokens", "samples", "epochs", "positions"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


@pytest.mark.parametrize("first", [10**9 + 1, 10**15])
def test_any_position_is_reached_at_once(dataset, first):
    batch = global_batch(dataset, first=first, count=4)
    for position, sample, epoch in zip(range(first, first + 4), batch.samples, batch.epochs, strict=True):
        assert epoch == position // len(dataset)
        expected = Permutation(len(dataset), seed=11, epoch=int(epoch))[np.array([position % len(dataset)])]
        assert sample == int(expected[0])


def test_the_seed_changes_the_order(corpus, dataset):
    other = SequenceDataset(corpus, sequence_length=LENGTH, seed=12)
    one, two = (global_batch(data, first=0, count=30).samples.tolist() for data in (dataset, other))
    assert one != two


def test_a_corpus_shorter_than_a_sequence_is_refused(corpus):
    total = corpus.total_tokens
    assert len(SequenceDataset(corpus, sequence_length=total, seed=0)) == 1
    with pytest.raises(UserError, match=rf"train: found {total} tokens, expected at least one sequence of {total + 1}"):
        SequenceDataset(corpus, sequence_length=total + 1, seed=0)
    with pytest.raises(UserError, match="sequence_length 0: expected at least 1"):
        SequenceDataset(corpus, sequence_length=0, seed=0)


# --- ranks and micro-batches ---


def test_the_slices_of_the_ranks_are_the_batch():
    for world in (1, 2, 3, 4, 6, 12):
        positions = [
            position
            for rank in range(world)
            for first, count in [rank_slice(100, 12, rank=rank, world=world)]
            for position in range(first, first + count)
        ]
        assert positions == list(range(100, 112))
    with pytest.raises(UserError, match="12 sequences: expected a multiple of 5"):
        rank_slice(0, 12, rank=0, world=5)


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_layout_does_not_change_what_a_step_reads(dataset, world, micro):
    cursor, size = len(dataset) - 20, 12
    streams = [
        batches(dataset, cursor=cursor, global_batch_size=size, micro_batch_size=micro, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in range(3):
        taken = [next(stream) for stream in streams]
        assert {after for _, after in taken} == {cursor + (step + 1) * size}
        assert {len(micro_batches) for micro_batches, _ in taken} == {size // world // micro}
        joined = [batch for micro_batches, _ in taken for batch in micro_batches]
        assert {len(batch.tokens) for batch in joined} == {micro}
        whole = global_batch(dataset, first=cursor + step * size, count=size)
        for name in ("tokens", "samples", "epochs", "positions"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in joined]), getattr(whole, name))


def test_a_stream_resumes_where_its_cursor_says(dataset):
    sizes = {"global_batch_size": 8, "micro_batch_size": 4, "rank": 1, "world": 2}
    stream = batches(dataset, cursor=0, **sizes)
    steps = [next(stream) for _ in range(4)]
    stream.close()
    resumed = batches(dataset, cursor=steps[1][1], **sizes)
    for expected, after in steps[2:]:
        found, cursor = next(resumed)
        assert cursor == after
        assert [batch.samples.tolist() for batch in found] == [batch.samples.tolist() for batch in expected]


def test_sizes_that_do_not_divide_are_refused_at_the_call(dataset):
    with pytest.raises(UserError, match="12 sequences: expected a multiple of 5"):
        batches(dataset, cursor=0, global_batch_size=12, micro_batch_size=1, rank=0, world=5)
    for micro in (4, 0, 12):
        with pytest.raises(UserError, match=f"micro_batch_size {micro}: expected a divisor of the 6 sequences"):
            batches(dataset, cursor=0, global_batch_size=12, micro_batch_size=micro, rank=0, world=2)


# --- reading ahead ---


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert reading_threads() == []


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 100), (2, 2), (5, 1), (4, 20)])
def test_items_come_in_order_however_many_read(workers, depth):
    def slow_first(number):
        time.sleep(0.002 * (number % 3 == 0))
        return number

    stream = read_ahead(slow_first, workers=workers, depth=depth)
    assert [next(stream) for _ in range(50)] == list(range(50))
    stream.close()


def test_it_works_ahead_by_its_depth_and_no_further():
    made = []
    stream = read_ahead(made.append, workers=2, depth=3)
    assert made == []
    next(stream)
    wait_until(lambda: len(made) == 4)  # one taken, three ready
    time.sleep(0.05)
    assert sorted(made) == [0, 1, 2, 3]
    stream.close()


def test_workers_read_at_the_same_time():
    both = threading.Barrier(2, timeout=10)
    stream = read_ahead(lambda number: both.wait() >= 0, workers=2, depth=3)
    assert next(stream) and next(stream), "each waits for the other"
    stream.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_comes_after_the_items_before_it(workers):
    def make(number):
        if number == 2:
            raise UserError("the shard is gone")
        return number

    stream = read_ahead(make, workers=workers, depth=5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(UserError, match="the shard is gone"):
        next(stream)
    assert reading_threads() == []
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_or_dropping_a_stream_ends_its_threads():
    for taken, close in ((1, True), (3, True), (1, False)):
        stream = read_ahead(lambda number: number, workers=2, depth=2)
        for _ in range(taken):
            next(stream)
        assert 0 < len(reading_threads()) <= 2
        if close:
            stream.close()
        del stream
        wait_until(lambda: reading_threads() == [])


# --- boundaries ---


def test_documents_kept_apart_begin_blocks_and_are_numbered(corpus):
    block, end = 8, int(corpus.document(0)[-1])
    packed = SequenceDataset(corpus, sequence_length=32, seed=1, packing=Packing.of(corpus.starts, alignment=block))
    batch = global_batch(packed, first=0, count=len(packed))
    assert batch.documents.dtype == torch.int32 and batch.padding.dtype == torch.bool
    assert batch.documents.shape == batch.padding.shape == batch.tokens.shape
    assert (batch.tokens[batch.padding] == end).all(), "filled with the end-of-text id"
    assert (batch.documents[:, 0] == 0).all() and (batch.documents.diff(dim=1) >= 0).all()
    blocks = batch.documents.reshape(-1, block)
    assert (blocks == blocks[:, :1]).all(), "no block straddles two documents"
    # In the order of the corpus, what is not padding is the stream: nothing lost, nothing twice.
    order = batch.samples.argsort()
    kept = batch.tokens[order][~batch.padding[order]]
    assert (kept.numpy() == corpus.tokens(0, len(kept))).all()
    # Pieces of a document follow its boundaries.
    pieces = [
        tokens[documents == number][~padding[documents == number]].tolist()
        for tokens, documents, padding in zip(
            batch.tokens[order], batch.documents[order], batch.padding[order], strict=True
        )
        for number in documents.unique().tolist()
    ]
    assert all(end not in piece[:-1] for piece in pieces), "an end of text only at the end of a piece"
    assert skipped_sequences(batch) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_conversations_stay_whole_and_bring_what_is_scored(whole):
    """Each document is a prompt, and an answer that is scored to its end."""
    rng, length, block = np.random.default_rng(0), 32, 8
    lengths = rng.integers(2, 40, 120)
    mask = np.concatenate([np.arange(size) >= rng.integers(0, size) for size in lengths])
    corpus = MemoryCorpus(lengths, mask=mask)
    packing = WholePacking.of(corpus.starts, alignment=block, length=length) if whole else None
    dataset = SequenceDataset(corpus, sequence_length=length, seed=1, packing=packing)
    batch = global_batch(dataset, first=0, count=len(dataset))
    assert batch.scored.dtype == torch.bool and batch.scored.shape == batch.tokens.shape
    assert (batch.scored.numpy() == mask[batch.tokens.numpy()] & (True if not whole else ~batch.padding.numpy())).all()
    if not whole:
        return
    begins = set(corpus.starts[:-1].tolist())
    for tokens, documents, scored, padding in zip(
        batch.tokens, batch.documents, batch.scored, batch.padding, strict=True
    ):
        for number in documents.unique().tolist():
            own = tokens[(documents == number) & ~padding]
            first = int(own[0])
            assert first in begins and len(own) % block == 0
            end = min(first + int(lengths[corpus.starts.searchsorted(first)]), first + length) - 1
            # The end of the answer fills up the block, and is scored there too.
            assert own.tolist() == [min(first + offset, end) for offset in range(len(own))]
        assert not (scored & padding).any()


def test_a_blend_of_conversations_and_texts_scores_all_of_a_text():
    sequences = [TokenSequence(np.arange(4)), TokenSequence(np.arange(4), scored=np.array([False, True, True, False]))]
    numbers = np.arange(2)
    batch = stack_sequences(sequences, samples=numbers, epochs=numbers, positions=numbers)
    assert batch.scored.tolist() == [[True] * 4, [False, True, True, False]]
    assert [part.scored.tolist() for part in split_batch(batch, 1)] == [[[True] * 4], [[False, True, True, False]]]


def test_without_boundaries_there_is_nothing_to_mark(dataset):
    batch = global_batch(dataset, first=0, count=3)
    assert batch.documents is None and batch.padding is None and batch.corpora is None and batch.scored is None


def test_memory_is_bounded_by_the_depth(corpus):
    """At most `depth` steps and one more are in memory; the corpus is a memory map."""
    alive = []

    class Counted:
        def batch(self, positions):
            made = dataset_of(corpus).batch(positions)
            weakref.finalize(made.tokens, alive.remove, len(positions))
            alive.append(len(positions))
            return made

    stream = batches(Counted(), cursor=0, global_batch_size=4, micro_batch_size=4, rank=0, world=1, workers=2, depth=3)
    most = 0
    for _ in range(50):
        next(stream)
        most = max(most, len(alive))
    stream.close()
    assert most <= 3 + 2


def dataset_of(corpus):
    return SequenceDataset(corpus, sequence_length=LENGTH, seed=11)
