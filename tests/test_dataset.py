"""Order, slices and batches: pure functions of a position, whatever the layout; and the thread that reads ahead."""

import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch

from megatron_twotower.dataset import (
    Permutation,
    SequenceDataset,
    batches,
    global_batch,
    prefetch,
    rank_slice,
)
from megatron_twotower.records import UserError
from megatron_twotower.shards import Corpus, prepare
from megatron_twotower.tokenizer import train_tokenizer

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


def order(n, *, seed=0, epoch=0):
    return Permutation(n, seed=seed, epoch=epoch)[np.arange(n)]


def chi_square(counts):
    """Of counts that should be equal, per degree of freedom: 1 with standard deviation sqrt(2 / (cells - 1))."""
    counts = np.asarray(counts, dtype=float).ravel()
    return ((counts - counts.mean()) ** 2).sum() / counts.mean() / (len(counts) - 1)


# --- the permutation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 1000, 4096, 4097, 99_991])
def test_it_is_a_bijection(n):
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**40, 10**6)):
        assert (np.sort(order(n, seed=seed, epoch=epoch)) == np.arange(n)).all()


def test_an_entry_does_not_depend_on_how_it_is_asked_for():
    whole = order(5003, seed=4, epoch=2)
    permutation = Permutation(5003, seed=4, epoch=2)
    some = np.array([5002, 17, 17, 0, 2500])
    assert (permutation[some] == whole[some]).all()
    assert [int(permutation[np.array([index])][0]) for index in some] == whole[some].tolist()


def test_the_order_never_changes():
    """A run resumed by a later version must go on in the same order."""
    assert order(12, seed=7, epoch=3).tolist() == [3, 10, 2, 6, 9, 0, 11, 4, 7, 1, 8, 5]
    far = Permutation(10**15, seed=7, epoch=3)[np.array([0, 1, 10**15 - 1])]
    assert far.tolist() == [128904580024437, 518038847724305, 808041225146592]


@pytest.mark.parametrize("other", [{"seed": 5, "epoch": 1}, {"seed": 6, "epoch": 0}, {"seed": 0, "epoch": 5}])
def test_seeds_and_epochs_give_unrelated_orders(other):
    n = 20_000
    one, two = order(n, seed=5, epoch=0), order(n, **other)
    assert (one == two).sum() < 8  # Poisson with mean 1
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(n)


def test_the_order_looks_random():
    n = 99_991
    result = order(n, seed=3)
    assert (result == np.arange(n)).sum() < 8
    assert abs(np.corrcoef(np.arange(n), result)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 4 / math.sqrt(n)
    cells = 32
    spread = 4 * math.sqrt(2 / cells**2)
    for first, second in ((np.arange(n), result), (result[:-1], result[1:]), (result[:-2], result[2:])):
        assert abs(chi_square(np.histogram2d(first, second, bins=cells)[0]) - 1) < spread
    steps = np.diff(result) % n
    assert abs(chi_square(np.bincount(steps * cells // n, minlength=cells)) - 1) < 4 * math.sqrt(2 / cells)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_order_of_a_few_comes_up_equally_often(n):
    orders = list(itertools.permutations(range(n)))
    counts = dict.fromkeys(orders, 0)
    for epoch in range(200 * len(orders)):
        counts[tuple(order(n, seed=8, epoch=epoch).tolist())] += 1
    assert chi_square(list(counts.values())) < 1 + 4 * math.sqrt(2 / (len(orders) - 1))


# --- sequences and batches ----------------------------------------------------------------------------------------


def test_sequences_are_the_stream_in_pieces(corpus, dataset):
    stream = corpus.tokens(0, corpus.total_tokens)
    assert len(dataset) == corpus.total_tokens // LENGTH
    assert corpus.total_tokens % LENGTH  # the fixture has a rest, so the floor above is tested
    for number in range(len(dataset)):
        assert (dataset.sequence(number) == stream[number * LENGTH : (number + 1) * LENGTH]).all()


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
            assert (tokens.numpy() == dataset.sequence(sample)).all()
    assert first.samples.tolist() != second.samples.tolist()
    assert first.samples.tolist() != list(range(n))


def test_without_shuffling_it_is_the_order_of_the_corpus(dataset):
    n = len(dataset)
    batch = global_batch(dataset, first=n - 2, count=5, shuffle=False)
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
    started = time.perf_counter()
    batch = global_batch(dataset, first=first, count=4)
    assert time.perf_counter() - started < 1
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


# --- ranks and micro-batches --------------------------------------------------------------------------------------


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


# --- reading ahead ------------------------------------------------------------------------------------------------


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_prefetching_gives_the_same_items_in_order(depth):
    assert list(prefetch(iter(range(50)), depth=depth)) == list(range(50))
    assert list(prefetch(iter([]), depth=depth)) == []


def test_it_works_ahead_by_its_depth_and_no_further():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    stream = prefetch(items(), depth=3)
    assert made == []
    assert next(stream) == 0
    wait_until(lambda: len(made) == 5)  # one taken, three ready, one in the thread's hand
    time.sleep(0.05)
    assert len(made) == 5
    stream.close()


def test_an_exception_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise UserError("the shard is gone")

    stream = prefetch(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(UserError, match="the shard is gone"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_ends_the_thread_and_closes_the_source(taken):
    closed = []

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    stream = prefetch(items(), depth=2)
    for _ in range(taken):
        next(stream)
    assert len(prefetch_threads()) == 1
    stream.close()
    assert prefetch_threads() == []
    assert closed == ["prefetch"]


def test_dropping_an_unfinished_stream_ends_its_thread():
    stream = prefetch(itertools.count())
    assert next(stream) == 0
    del stream
    wait_until(lambda: prefetch_threads() == [])


def test_prefetched_batches_are_the_batches(dataset):
    sizes = {"cursor": 5, "global_batch_size": 4, "micro_batch_size": 2, "rank": 0, "world": 1}
    ahead, plain = prefetch(batches(dataset, **sizes)), batches(dataset, **sizes)
    for _ in range(20):
        (one, first), (two, second) = next(ahead), next(plain)
        assert first == second
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    ahead.close()
