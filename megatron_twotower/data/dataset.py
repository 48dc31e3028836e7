"""A corpus as sequences of fixed length, in a shuffled order that follows from a position alone.

A run reads the positions 0, 1, 2, ... Position p is place p % n of epoch p // n, where n is the
number of sequences; `order` says which sequence is at that place. So the cursor, one integer, is
the complete state of the data. Nothing else is saved, a resume costs nothing, and the order does
not depend on ranks, micro-batches or workers.
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
from megatron_twotower.config.context_split import COMPLETE
from megatron_twotower.data.order import Shuffle, corpus_seed, shuffled
from megatron_twotower.data.packing import PackedWindow, Packing, WholePacking
from megatron_twotower.data.shards import Corpus
from megatron_twotower.types import Batch

T = TypeVar("T")

# A sample key has the number of the corpus above these bits, and the number of the sequence within
# the corpus in them. It keys the noise of the sequence.
SAMPLE_BITS = 43
_FILLER = 0  # the token id of a sequence that cannot be read; never scored
UNREAD = -1  # the token id of positions that another context-parallel rank reads; never used


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of a corpus.

    Attributes:
        tokens: (l,) int64.
        documents: (l,) int32 as in `Batch`.
        padding: (l,) bool as in `Batch`.
        scored: (l,) bool as in `Batch`.
    """

    tokens: np.ndarray
    documents: np.ndarray | None = None
    padding: np.ndarray | None = None
    scored: np.ndarray | None = None


class Source(Protocol):
    """Anything that batches are read from."""

    def batch(self, positions: np.ndarray) -> Batch:
        """The sequences at positions (b,) int64 of the run, a function of the positions alone."""


@dataclass(frozen=True)
class SequenceDataset:
    """A corpus cut into sequences of `sequence_length` tokens.

    Tokens at the end of the corpus that do not fill a sequence are never read.

    Attributes:
        seed: Keys the order of every epoch.
        number: The number of the corpus within its blend.
        packing: Keeps documents apart; None to cut across documents.
        skip_damaged: Make a sequence that touches a damaged shard padding, instead of stopping the
            run. The corpus must be opened with `verify_shards`.
        stretches: The positions of each sequence that are read; the token after each of them is
            read too, as a target. The others are `UNREAD`.

    Raises:
        UserError: The corpus is shorter than one sequence.
    """

    corpus: Corpus
    sequence_length: int = field(kw_only=True)
    seed: int = field(kw_only=True)
    number: int = field(kw_only=True, default=0)
    shuffle: Shuffle = field(kw_only=True, default=Shuffle())
    packing: Packing | WholePacking | None = field(kw_only=True, default=None)
    skip_damaged: bool = field(kw_only=True, default=False)
    stretches: tuple[slice, ...] = field(kw_only=True, default=COMPLETE)

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

    def sequence(self, number: int) -> TokenSequence:
        """Sequence `number`; only padding if it cannot be read and `skip_damaged` is set."""
        assert 0 <= number < len(self), (number, len(self))
        try:
            return self._read(number)
        except UserError as error:  # the message of the corpus names the shard
            if not self.skip_damaged:
                raise
            _warn_once(f"{error}; its sequences are skipped")
        length = self.sequence_length
        documents = None if self.packing is None else np.zeros(length, dtype=np.int32)
        return TokenSequence(np.full(length, _FILLER, dtype=np.int64), documents, np.ones(length, dtype=bool))

    def _read(self, number: int) -> TokenSequence:
        first, count = number * self.sequence_length, self.sequence_length
        window = None if self.packing is None else self.packing.window(first, count)

        def tokens(start: int, stop: int) -> np.ndarray:
            if window is None:
                return self.corpus.tokens(first + start, stop - start)
            sources = window.sources[start:stop]
            begin, end = int(sources.min()), int(sources.max()) + 1
            return self.corpus.tokens(begin, end - begin)[sources - begin]

        if self.stretches == COMPLETE:
            read = tokens(0, count)
        else:
            read = np.full(count, UNREAD, dtype=np.int64)
            for stretch in self.stretches:
                stop = min(stretch.stop + 1, count)
                read[stretch.start : stop] = tokens(stretch.start, stop)
        if window is None:
            return TokenSequence(read, scored=self.corpus.scored(first, count))
        return TokenSequence(read, window.documents, window.padding, self._scored(window))

    def _scored(self, window: PackedWindow) -> np.ndarray | None:
        """What is scored of a window, also outside of `stretches`; None if all is."""
        if window.scored is not None:
            return window.scored
        begin, end = int(window.sources.min()), int(window.sources.max()) + 1
        scored = self.corpus.scored(begin, end - begin)
        return None if scored is None else scored[window.sources - begin] & ~window.padding

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sequence numbers, (b,) int64 each, at indices (b,) int64.

        The indices count the sequences read from this corpus, over all epochs.
        """
        epochs, places = np.divmod(indices, len(self))
        seed = corpus_seed(self.seed, self.number)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = shuffled(places[chosen], n=len(self), seed=seed, epoch=epoch, shuffle=self.shuffle)
        return epochs, places

    def sample_keys(self, numbers: np.ndarray) -> np.ndarray:
        """(b,) int64, unique over all corpora, of the sequences `numbers` (b,) int64.

        In the first corpus they are the numbers themselves.
        """
        return (self.number << SAMPLE_BITS) + numbers

    def batch(self, positions: np.ndarray) -> Batch:
        """The sequences at positions (b,) int64."""
        epochs, numbers = self.locate(positions)
        sequences = [self.sequence(number) for number in numbers.tolist()]
        return stack_sequences(sequences, samples=self.sample_keys(numbers), epochs=epochs, positions=positions)


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def stack_sequences(
    sequences: Sequence[TokenSequence],
    *,
    samples: np.ndarray,
    epochs: np.ndarray,
    positions: np.ndarray,
    corpora: np.ndarray | None = None,
) -> Batch:
    """A batch of sequences; the other arguments are (b,) int64, as in `Batch`."""
    tokens = np.stack([sequence.tokens for sequence in sequences])
    documents = padding = None
    if sequences[0].documents is not None:
        documents = np.stack([sequence.documents for sequence in sequences if sequence.documents is not None])
    if any(sequence.padding is not None for sequence in sequences):
        no_padding = np.zeros(tokens.shape[1], dtype=bool)
        padding = np.stack([no_padding if one.padding is None else one.padding for one in sequences])
    scored = None
    if any(sequence.scored is not None for sequence in sequences):
        everything = np.ones(tokens.shape[1], dtype=bool)  # of a text, as in a blend with conversations
        scored = np.stack([everything if one.scored is None else one.scored for one in sequences])
    required = (torch.from_numpy(item) for item in (tokens, samples, epochs, positions))
    optional = (None if item is None else torch.from_numpy(item) for item in (documents, padding, corpora, scored))
    return Batch(*required, *optional)


def skipped_sequences(batch: Batch) -> int:
    """How many sequences of a batch could not be read because their shard is damaged.

    Such a sequence is only padding, which a readable sequence never is.
    """
    return 0 if batch.padding is None else int(batch.padding.all(dim=1).sum())


def global_batch(source: Source, *, first: int, count: int) -> Batch:
    """The sequences at positions first .. first + count - 1 of the run, b = count.

    Depends on the arguments alone, and costs the same for any `first`.
    """
    assert first >= 0 and count > 0, (first, count)
    return source.batch(np.arange(first, first + count, dtype=np.int64))


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` sequences, the last one with the remainder: views of the batch."""
    required = (batch.tokens, batch.samples, batch.epochs, batch.positions)
    optional = (batch.documents, batch.padding, batch.corpora, batch.scored)

    def part(at: int) -> Batch:
        cut = slice(at, at + size)
        return Batch(*(item[cut] for item in required), *(None if item is None else item[cut] for item in optional))

    return [part(at) for at in range(0, len(batch.tokens), size)]


def rank_slice(first: int, count: int, *, rank: int, world: int) -> tuple[int, int]:
    """(first, count) of the contiguous part of a global batch that a data-parallel rank reads.

    Raises:
        UserError: `count` is not a multiple of `world`, the number of data-parallel ranks.
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
    """Endless steps: (the micro-batches of this rank, the cursor after the step).

    Args:
        cursor: Where to begin. A cursor counts the sequences of all ranks.
        rank: The data-parallel rank.
        world: The number of data-parallel ranks.
        workers: Threads that read ahead. They do not change what is read.
        depth: Steps that are read ahead.

    Raises:
        UserError: At the call, if the global batch does not divide into `world` equal parts of
            complete micro-batches.
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
        own = global_batch(source, first=first, count=share)
        return split_batch(own, micro_batch_size), start + global_batch_size

    return read_ahead(step, workers=workers, depth=depth)


def read_ahead(make: Callable[[int], T], *, workers: int, depth: int) -> Generator[T, None, None]:
    """Yields make(0), make(1), ... in order; `workers` threads compute up to `depth` items ahead.

    Reading starts at the first `next`. `make` must be a function of its argument alone. An
    exception in it is raised here, after the items before it. Closing or dropping the generator
    ends the threads.
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


def window_count(corpus: Corpus, *, count: int, length: int) -> int:
    """The number of windows at equal distances: `count`, or as many as fit without an overlap.

    Raises:
        UserError: Fewer than two fit.
    """
    count = min(count, corpus.total_tokens // length)
    if count < 2:
        raise UserError(f"{corpus.folder}: found {corpus.total_tokens} tokens, expected at least 2 x {length}")
    return count


def window_start(corpus: Corpus, number: int, *, count: int, length: int) -> int:
    """The place of window `number` of `count` windows of `length` tokens at equal distances."""
    return number * (corpus.total_tokens - length) // (count - 1)


def evenly_spaced_windows(corpus: Corpus, *, count: int, length: int) -> Tensor:
    """Windows of a corpus at equal distances: (count, length) int64 tokens.

    A short corpus gives fewer windows, see `window_count`.

    Raises:
        UserError: Fewer than two windows fit.
    """
    count = window_count(corpus, count=count, length=length)
    starts = [window_start(corpus, number, count=count, length=length) for number in range(count)]
    return torch.from_numpy(np.stack([corpus.tokens(start, length) for start in starts]))
