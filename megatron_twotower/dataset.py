"""A corpus as fixed-length sequences in a shuffled order that any machine can compute from a position alone.

The run reads positions 0, 1, 2, ... Position p is sequence `Permutation(n)[p % n]` of epoch p // n, n the number of
sequences. So the cursor, one integer, is the whole state of the data: nothing else is saved, a resume costs nothing,
and the order knows nothing of ranks, micro-batches or workers.
"""

import math
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_twotower.records import Batch, UserError
from megatron_twotower.shards import Corpus

T = TypeVar("T")

_ROUNDS = 8


@dataclass(frozen=True)
class Permutation:
    """A shuffle of range(n), keyed by (seed, epoch), that computes any entry on its own: `permutation[indices]`.

    A Feistel network. Numbers below rows * columns, a rectangle of about sqrt(n) a side that holds n, are written as
    (row, column), and in turn each is shifted by a keyed hash of the other: every step can be undone, so the whole is
    a bijection. A result of n or more (about one in sqrt(n)) goes through again until it falls below n, which keeps
    it one (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, sections 4 and 5).
    """

    n: int
    seed: int = field(kw_only=True)
    epoch: int = field(kw_only=True)

    def __post_init__(self) -> None:
        assert self.n > 0 and self.seed >= 0 and self.epoch >= 0, self

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """indices: (b,) int64 in range(n). Returns (b,) int64 in range(n)."""
        assert ((indices >= 0) & (indices < self.n)).all(), (indices, self.n)
        keys = np.random.SeedSequence((self.seed, self.epoch)).generate_state(_ROUNDS, np.uint64)
        result = self._shuffle_once(indices.astype(np.uint64), keys)
        while (outside := result >= self.n).any():
            result[outside] = self._shuffle_once(result[outside], keys)
        return result.astype(np.int64)

    def _shuffle_once(self, numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
        columns = math.isqrt(self.n - 1) + 1
        rows = -(-self.n // columns)
        row, column = np.divmod(numbers, np.uint64(columns))
        for key in keys.reshape(-1, 2):
            row = (row + _hash(column, key[0]) % np.uint64(rows)) % np.uint64(rows)
            column = (column + _hash(row, key[1]) % np.uint64(columns)) % np.uint64(columns)
        return row * np.uint64(columns) + column


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """(b,) uint64 to (b,) uint64: the mixing of SplitMix64 (Steele, Lea and Flood, 2014), twice around the key."""
    for word in (key, ~key):
        numbers = numbers ^ word
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers = numbers ^ (numbers >> np.uint64(31))
    return numbers


@dataclass(frozen=True)
class SequenceDataset:
    """A corpus cut into sequences of `sequence_length` tokens; the rest at its end is never read.

    `seed` keys the order of every epoch. Errors: `UserError` for a corpus shorter than one sequence.
    """

    corpus: Corpus
    sequence_length: int = field(kw_only=True)
    seed: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UserError(f"sequence_length {self.sequence_length}: expected at least 1")
        if len(self) == 0:
            raise UserError(
                f"{self.corpus.folder}: found {self.corpus.total_tokens} tokens, expected at least one sequence of "
                f"{self.sequence_length}"
            )

    def __len__(self) -> int:
        return self.corpus.total_tokens // self.sequence_length

    def sequence(self, number: int) -> np.ndarray:
        """(l,) int64 token ids of sequence `number`."""
        assert 0 <= number < len(self), (number, len(self))
        return self.corpus.tokens(number * self.sequence_length, self.sequence_length)


def global_batch(dataset: SequenceDataset, *, first: int, count: int, shuffle: bool = True) -> Batch:
    """The sequences at positions first .. first + count - 1 of the run, b = count.

    Depends on the arguments alone, and costs the same for any `first`. Without `shuffle`, every epoch reads the
    sequences in the order of the corpus.
    """
    assert first >= 0 and count > 0, (first, count)
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, samples = np.divmod(positions, len(dataset))
    if shuffle:
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            samples[chosen] = Permutation(len(dataset), seed=dataset.seed, epoch=epoch)[samples[chosen]]
    tokens = np.stack([dataset.sequence(sample) for sample in samples.tolist()])
    return Batch(*(torch.from_numpy(field) for field in (tokens, samples, epochs, positions)))


def rank_slice(first: int, count: int, *, rank: int, world: int) -> tuple[int, int]:
    """(first, count) of the part of a global batch that data-parallel rank `rank` of `world` reads: a contiguous one.

    Errors: `UserError` when `count` does not divide by `world`.
    """
    assert 0 <= rank < world, (rank, world)
    if count % world:
        raise UserError(f"{count} sequences: expected a multiple of {world}, the number of data-parallel ranks")
    share = count // world
    return first + rank * share, share


def batches(
    dataset: SequenceDataset,
    *,
    cursor: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world: int,
) -> Iterator[tuple[list[Batch], int]]:
    """Endless steps: (this rank's micro-batches, cursor after the step). A cursor counts the sequences of all ranks.

    Errors: `UserError`, at the call, when the global batch does not divide into `world` times whole micro-batches.
    """
    _, share = rank_slice(cursor, global_batch_size, rank=rank, world=world)
    if micro_batch_size < 1 or share < 1 or share % micro_batch_size:
        raise UserError(
            f"micro_batch_size {micro_batch_size}: expected a divisor of the {share} sequences of a rank "
            f"(global_batch_size {global_batch_size} over {world} ranks)"
        )

    def steps() -> Iterator[tuple[list[Batch], int]]:
        at = cursor
        while True:
            first, _ = rank_slice(at, global_batch_size, rank=rank, world=world)
            starts = range(first, first + share, micro_batch_size)
            at += global_batch_size
            yield [global_batch(dataset, first=start, count=micro_batch_size) for start in starts], at

    return steps()


def prefetch(iterator: Iterator[T], *, depth: int = 2) -> Generator[T, None, None]:
    """The items of `iterator`, up to `depth` of them made ahead by a thread that starts with the first `next`.

    An exception of the iterator is raised here, after the items before it. Closing the result (or dropping it) ends the
    thread and closes the iterator.
    """
    assert depth > 0, depth
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for item in iterator:
                ready.put(("item", item))
                if closed.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (received := ready.get())[0] == "item":
            yield received[1]
        if received[0] == "error":
            raise received[1]
    finally:
        closed.set()
        while not ready.empty():  # room for the one item the thread may be waiting to hand over
            ready.get_nowait()
        thread.join()
