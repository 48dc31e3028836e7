"""A corpus as fixed-length sequences in a shuffled order that any machine can compute from a position alone.

The run reads positions 0, 1, 2, ... Position p is place p % n of epoch p // n, n the number of
sequences, and `order` says which sequence stands there. So the cursor, one integer, is the whole
state of the data: nothing else is saved, a resume costs nothing, and the order knows nothing of
ranks, micro-batches or workers.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.data.order import Shuffle, corpus_seed, shuffled
from megatron_twotower.data.packing import Packing
from megatron_twotower.data.shards import Corpus
from megatron_twotower.types import Batch

T = TypeVar("T")

# The key of a sequence's noise: the number of its corpus stands above the sequence's number within
# it.
SAMPLE_BITS = 43
_FILLER = 0  # stands where a sequence could not be read; never scored


@dataclass(frozen=True)
class Row:
    """One sequence. tokens: (l,) int64; documents: (l,) int32 and padding: (l,) bool as in `Batch`."""

    tokens: np.ndarray
    documents: np.ndarray | None = None
    padding: np.ndarray | None = None


class Source(Protocol):
    """Anything that batches are read from."""

    def batch(self, positions: np.ndarray) -> Batch:
        """The sequences at positions (b,) int64 of the run, a function of the positions alone."""


@dataclass(frozen=True)
class SequenceDataset:
    """A corpus cut into sequences of `sequence_length` tokens; the rest at its end is never read.

    seed: keys the order of every epoch. number: of the corpus within its blend. packing: keeps
    documents apart; None to cut across them. skip_damaged: what touches a damaged shard becomes
    padding, where else the run stops; the corpus must have been opened with `verify_shards`.

    Errors: `UserError` for a corpus shorter than one sequence.
    """

    corpus: Corpus
    sequence_length: int = field(kw_only=True)
    seed: int = field(kw_only=True)
    number: int = field(kw_only=True, default=0)
    shuffle: Shuffle = field(kw_only=True, default=Shuffle())
    packing: Packing | None = field(kw_only=True, default=None)
    skip_damaged: bool = field(kw_only=True, default=False)

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UserError(f"sequence_length {self.sequence_length}: expected at least 1")
        assert self.packing is None or self.sequence_length % self.packing.alignment == 0, self
        if len(self) == 0:
            raise UserError(
                f"{self.corpus.folder}: found {self.corpus.total_tokens} tokens, expected at least one sequence of "
                f"{self.sequence_length}"
            )
        assert len(self) < 1 << SAMPLE_BITS, len(self)

    def __len__(self) -> int:
        total = self.corpus.total_tokens if self.packing is None else self.packing.total_tokens
        return total // self.sequence_length

    def sequence(self, number: int) -> np.ndarray:
        """(l,) int64 token ids of sequence `number`."""
        return self.row(number).tokens

    def row(self, number: int) -> Row:
        """Sequence `number`; padding all through where it cannot be read and is to be skipped."""
        assert 0 <= number < len(self), (number, len(self))
        try:
            return self._read(number)
        except UserError as error:  # the corpus names the shard
            if not self.skip_damaged:
                raise
            _tell_once(f"{error}; its sequences are skipped")
        length = self.sequence_length
        documents = None if self.packing is None else np.zeros(length, dtype=np.int32)
        return Row(np.full(length, _FILLER, dtype=np.int64), documents, np.ones(length, dtype=bool))

    def _read(self, number: int) -> Row:
        first, count = number * self.sequence_length, self.sequence_length
        if self.packing is None:
            return Row(self.corpus.tokens(first, count))
        stretch = self.packing.stretch(first, count)
        begin, end = int(stretch.sources[0]), int(stretch.sources[-1]) + 1
        tokens = self.corpus.tokens(begin, end - begin)[stretch.sources - begin]
        return Row(tokens, stretch.documents, stretch.padding)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sequence numbers, (b,) int64 each, at indices (b,) int64 of this corpus's own endless reading."""
        epochs, places = np.divmod(indices, len(self))
        seed = corpus_seed(self.seed, self.number)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = shuffled(places[chosen], n=len(self), seed=seed, epoch=epoch, shuffle=self.shuffle)
        return epochs, places

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """(b,) int64 what identifies the sequences over all corpora: their own numbers in the first one."""
        return (self.number << SAMPLE_BITS) + numbers

    def batch(self, positions: np.ndarray) -> Batch:
        epochs, numbers = self.locate(positions)
        rows = [self.row(number) for number in numbers.tolist()]
        return stacked(rows, samples=self.keys(numbers), epochs=epochs, positions=positions)


@functools.cache
def _tell_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def stacked(
    rows: Sequence[Row],
    *,
    samples: np.ndarray,
    epochs: np.ndarray,
    positions: np.ndarray,
    corpora: np.ndarray | None = None,
) -> Batch:
    """Rows and what identifies them, (b,) int64 each, as a batch."""
    tokens = np.stack([row.tokens for row in rows])
    documents = padding = None
    if rows[0].documents is not None:
        documents = np.stack([row.documents for row in rows if row.documents is not None])
    if any(row.padding is not None for row in rows):
        none = np.zeros(tokens.shape[1], dtype=bool)
        padding = np.stack([none if row.padding is None else row.padding for row in rows])
    required = (torch.from_numpy(item) for item in (tokens, samples, epochs, positions))
    optional = (None if item is None else torch.from_numpy(item) for item in (documents, padding, corpora))
    return Batch(*required, *optional)


def skipped_sequences(batch: Batch) -> int:
    """How many sequences of a batch stand for one in a damaged shard. A readable one is never padding all through."""
    return 0 if batch.padding is None else int(batch.padding.all(dim=1).sum())


def global_batch(source: Source, *, first: int, count: int) -> Batch:
    """The sequences at positions first .. first + count - 1 of the run, b = count.

    Depends on the arguments alone, and costs the same for any `first`.
    """
    assert first >= 0 and count > 0, (first, count)
    return source.batch(np.arange(first, first + count, dtype=np.int64))


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` sequences, the last one of what is left: views of the batch."""
    required = (batch.tokens, batch.samples, batch.epochs, batch.positions)
    optional = (batch.documents, batch.padding, batch.corpora)

    def part(at: int) -> Batch:
        cut = slice(at, at + size)
        return Batch(*(item[cut] for item in required), *(None if item is None else item[cut] for item in optional))

    return [part(at) for at in range(0, len(batch.tokens), size)]


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
    source: Source,
    *,
    cursor: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world: int,
    workers: int = 1,
    depth: int = 2,
) -> Iterator[tuple[list[Batch], int]]:
    """Endless steps: (this rank's micro-batches, cursor after the step). A cursor counts the sequences of all ranks.

    workers, depth: threads that read ahead, and steps they are ahead; they change nothing about
    what is read.

    Errors: `UserError`, at the call, when the global batch does not divide into `world` times whole
    micro-batches.
    """
    _, share = rank_slice(cursor, global_batch_size, rank=rank, world=world)
    if micro_batch_size < 1 or share < 1 or share % micro_batch_size:
        raise UserError(
            f"micro_batch_size {micro_batch_size}: expected a divisor of the {share} sequences of a rank "
            f"(global_batch_size {global_batch_size} over {world} ranks)"
        )

    def step(number: int) -> tuple[list[Batch], int]:
        start = cursor + number * global_batch_size
        first, _ = rank_slice(start, global_batch_size, rank=rank, world=world)
        whole = global_batch(source, first=first, count=share)
        return split_batch(whole, micro_batch_size), start + global_batch_size

    return read_ahead(step, workers=workers, depth=depth)


def read_ahead(make: Callable[[int], T], *, workers: int, depth: int) -> Generator[T, None, None]:
    """make(0), make(1), ... in order, up to `depth` of them made ahead by `workers` threads from the first `next` on.

    `make` must be a function of its argument alone. An exception of it is raised here, after the
    items before it. Closing the result (or dropping it) ends the threads.
    """
    assert workers > 0 and depth > 0, (workers, depth)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    pending: deque[Future[T]] = deque()
    number = 0
    try:
        while True:
            while len(pending) <= depth:
                pending.append(pool.submit(make, number))
                number += 1
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stretches(corpus: Corpus, *, count: int, length: int) -> Tensor:
    """(count, length) int64 tokens, evenly spread over the corpus; fewer where it is short."""
    count = min(count, corpus.total_tokens // length)
    if count < 2:
        raise UserError(f"{corpus.folder}: found {corpus.total_tokens} tokens, expected at least 2 x {length}")
    starts = [i * (corpus.total_tokens - length) // (count - 1) for i in range(count)]
    return torch.stack([torch.from_numpy(corpus.tokens(start, length)) for start in starts])
