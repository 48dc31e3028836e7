"""The order in which a run reads: shuffles and mixtures, each a pure function of a position.

Nothing here has a state. A shuffle is keyed by (seed, epoch). A mixture is a table of one period.
The entry at position 10^12 costs as much as the first one. Which positions a data-parallel rank
reads at a step is decided in `dataset.batches`.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megatron_twotower.common.splitmix64 import MULTIPLIER_1, MULTIPLIER_2

_ROUNDS = 8

# The longest period of a mixture, in positions.
LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True)
class Permutation:
    """A shuffle of range(n), keyed by (seed, epoch): `permutation[indices]` computes any entries.

    It is a Feistel network. A number below rows * columns is written as (row, column); both sizes
    are about sqrt(n), and their product is at least n. The rounds alternate: one shifts the row by
    a keyed hash of the column, the next shifts the column by a keyed hash of the row. Each round
    can be undone, so the network is a bijection of range(rows * columns). About one result in
    sqrt(n) is n or more. Such a result goes through the network again until it is below n, which
    gives a bijection of range(n) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
    sections 4 and 5).

    Attributes:
        stream: The number of one of several different shuffles under the same seed and epoch, from
            1; 0 if there is only one.
    """

    n: int
    seed: int = field(kw_only=True)
    epoch: int = field(kw_only=True)
    stream: int = field(kw_only=True, default=0)

    def __post_init__(self) -> None:
        assert self.n > 0 and self.seed >= 0 and self.epoch >= 0 and self.stream >= 0, self

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Entries (b,) int64 in range(n) at indices (b,) int64 in range(n)."""
        assert ((indices >= 0) & (indices < self.n)).all(), (indices, self.n)
        keys = _keys(self.seed, self.epoch, self.stream, count=_ROUNDS)
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


def _keys(seed: int, *more: int, count: int) -> np.ndarray:
    """(count,) uint64 from a seed and further integers; zeros at the end change nothing."""
    return np.random.SeedSequence((seed, *more)).generate_state(count, np.uint64)


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """Keyed hash of (b,) uint64 to (b,) uint64: the mixing of `common.splitmix64`, two rounds."""
    for word in (key, ~key):
        numbers = numbers ^ word
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
        numbers = numbers ^ (numbers >> np.uint64(31))
    return numbers


@dataclass(frozen=True)
class Shuffle:
    """How the sequences of an epoch of a corpus are ordered.

    Attributes:
        kind: `full`, `windowed` or `none`. `full` is one permutation of all sequences; reads go to
            all shards at once. `windowed` cuts the corpus into runs of `run` neighbouring sequences
            (about a shard) and permutes the runs; each window of `runs` runs is read together, its
            sequences permuted, so at most `runs` runs are open at once. `none` keeps the order of
            the corpus.
        run: Sequences in a run.
        runs: Runs in a window.
    """

    kind: str = "full"
    run: int = 1
    runs: int = 1

    def __post_init__(self) -> None:
        assert self.kind in ("full", "windowed", "none") and self.run > 0 and self.runs > 0, self


def shuffled(places: np.ndarray, *, n: int, seed: int, epoch: int, shuffle: Shuffle) -> np.ndarray:
    """Sequence numbers (b,) int64 at the places (b,) int64 of an epoch: a bijection of range(n)."""
    if shuffle.kind == "none":
        return places
    if shuffle.kind == "full":
        return Permutation(n, seed=seed, epoch=epoch)[places]
    return _windowed(places, n=n, seed=seed, epoch=epoch, shuffle=shuffle)


def _windowed(places: np.ndarray, *, n: int, seed: int, epoch: int, shuffle: Shuffle) -> np.ndarray:
    run = min(shuffle.run, n)
    complete_runs = n // run
    windows = -(-complete_runs // shuffle.runs)
    size = shuffle.runs * run
    window = np.minimum(places // size, windows - 1)
    result = np.empty_like(places)
    for number in np.unique(window).tolist():
        chosen = window == number
        # The last window has the remaining sequences: at most `runs` complete runs and the rest.
        count = size if number < windows - 1 else n - number * size
        inner = Permutation(count, seed=seed, epoch=epoch, stream=number + 2)[places[chosen] - number * size]
        result[chosen] = inner + number * size
    slot, offset = np.divmod(result, run)
    # The sequences after the last complete run always stay in the last window. The rotation below
    # makes them other sequences in every epoch.
    moved = slot < complete_runs
    slot[moved] = Permutation(complete_runs, seed=seed, epoch=epoch, stream=1)[slot[moved]]
    rotation = int(_keys(seed, epoch, 1, 1, count=1)[0] % n)
    return (slot * run + offset + rotation) % n


# --- mixtures ---


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Weights as numbers of positions in a period of at most `LONGEST_PERIOD`.

    The shares are exact if the weights, as written in decimals, allow it. Otherwise they are
    rounded by the largest-remainder method, and each is off by less than one position of the
    longest period.
    """
    written = [Fraction(str(weight)) for weight in weights]
    total = sum(written)
    assert written and min(written) > 0, weights
    shares = [weight / total for weight in written]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    exact = [share * LONGEST_PERIOD for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: LONGEST_PERIOD - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass(frozen=True)
class Mixture:
    """Which of C corpora each position reads from, and the index of the read within that corpus.

    One period of positions is computed and repeats for ever. In every period corpus c comes
    `counts[c]` times. After k positions, for any k, it has come k * counts[c] / period times, with
    an error of at most 1 - 1 / (2C - 2) (Tijdeman, "The chairman assignment problem", Discrete
    Mathematics 32, 1980).

    Attributes:
        counts: (C,) int64, positions of each corpus in a period.
        table: (period,) uint16, the corpus at each place of the period.
        ranks: (period,) int64, how often that corpus came before in the period.
    """

    counts: np.ndarray
    table: np.ndarray = field(repr=False)
    ranks: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        """The mixture of positive weights on any scale.

        Each weight must be at least half a position of `LONGEST_PERIOD`.
        """
        counts = integer_shares(weights)
        assert min(counts) > 0, weights
        table = np.array(_chairman_assignment(counts), dtype=np.uint16)
        ranks = np.empty(len(table), dtype=np.int64)
        for corpus, count in enumerate(counts):
            ranks[table == corpus] = np.arange(count)
        return cls(np.array(counts, dtype=np.int64), table, ranks)

    @property
    def period(self) -> int:
        """The number of positions after which the mixture repeats."""
        return len(self.table)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus (b,) int64 and index within it (b,) int64 at positions (b,) int64."""
        periods, places = np.divmod(positions, self.period)
        corpora = self.table[places].astype(np.int64)
        return corpora, periods * self.counts[corpora] + self.ranks[places]

    def counts_before(self, position: int) -> np.ndarray:
        """(C,) int64: how often each corpus comes before `position`."""
        periods, places = divmod(position, self.period)
        return periods * self.counts + np.bincount(self.table[:places], minlength=len(self.counts))


def _chairman_assignment(counts: Sequence[int]) -> list[int]:
    """The corpus at each place of a period, by Tijdeman's schedule: earliest deadline first.

    The name is that of the problem in the literature: C states with given weights each provide the
    chairman of a union in some years, so that after every year all shares are as fair as possible.
    All arithmetic is on integers, so that the schedule is the same on every machine.
    """
    period, spread = sum(counts), max(2 * len(counts) - 2, 1)
    # Turn j of a corpus may come from the place on at which its exact share so far reaches
    # j + 1 / spread. It must come before that share exceeds j + 1 - 1 / spread.
    turns = (
        sorted(
            (
                -(-period * (turn * spread + 1) // (spread * count)),
                period * ((turn + 1) * spread - 1) // (spread * count),
                corpus,
            )
            for corpus, count in enumerate(counts)
            for turn in range(count)
        )
        if len(counts) > 1
        else [(1, period, 0)] * period
    )
    ready: list[tuple[int, int]] = []
    table, taken = [], 0
    for place in range(1, period + 1):
        while taken < len(turns) and turns[taken][0] <= place:
            heapq.heappush(ready, turns[taken][1:])
            taken += 1
        deadline, corpus = heapq.heappop(ready)
        assert place <= deadline + 1, "Tijdeman's schedule always exists"
        table.append(corpus)
    return table


def corpus_seed(seed: int, number: int) -> int:
    """The seed of the order of corpus `number` of a blend.

    The first corpus has the seed of the run. The seeds of the others are unrelated to it.
    """
    return seed if number == 0 else int(_keys(seed, number, 1, 2, count=1)[0])
