"""In which order a run reads: shuffles and mixtures that any machine can compute from a position alone.

Nothing here has a state. A shuffle is keyed by (seed, epoch), a mixture is a table of one period,
and the entry at position 10^12 costs what the first one does.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

_ROUNDS = 8

# Positions after which a mixture repeats, at most.
LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True)
class Permutation:
    """A shuffle of range(n), keyed by (seed, epoch), that computes any entry on its own: `permutation[indices]`.

    A Feistel network. Numbers below rows * columns, a rectangle of about sqrt(n) a side that holds
    n, are written as (row, column), and in turn each is shifted by a keyed hash of the other: every
    step can be undone, so the whole is a bijection. A result of n or more (about one in sqrt(n))
    goes through again until it falls below n, which keeps it one (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002, sections 4 and 5).

    stream: numbers shuffles that are not to be alike under the same seed and epoch, from 1; 0 for
    the only one.
    """

    n: int
    seed: int = field(kw_only=True)
    epoch: int = field(kw_only=True)
    stream: int = field(kw_only=True, default=0)

    def __post_init__(self) -> None:
        assert self.n > 0 and self.seed >= 0 and self.epoch >= 0 and self.stream >= 0, self

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """indices: (b,) int64 in range(n). Returns (b,) int64 in range(n)."""
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
    """(count,) uint64 from a seed and further numbers; a 0 at the end is as good as left out."""
    return np.random.SeedSequence((seed, *more)).generate_state(count, np.uint64)


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """(b,) uint64 to (b,) uint64: the mixing of SplitMix64 (Steele, Lea and Flood, 2014), twice around the key."""
    for word in (key, ~key):
        numbers = numbers ^ word
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers = numbers ^ (numbers >> np.uint64(31))
    return numbers


@dataclass(frozen=True)
class Shuffle:
    """How an epoch of a corpus is ordered.

    `full`: one permutation of all its sequences, read from everywhere at once. `windowed`: the
    corpus is cut into runs of `run` neighbouring sequences (about a shard), the runs are permuted,
    and `runs` of them at a time are read together, their sequences permuted: no more than `runs`
    runs are open at once. `none`: as they stand.
    """

    kind: str = "full"
    run: int = 1
    runs: int = 1

    def __post_init__(self) -> None:
        assert self.kind in ("full", "windowed", "none") and self.run > 0 and self.runs > 0, self


def shuffled(places: np.ndarray, *, n: int, seed: int, epoch: int, shuffle: Shuffle) -> np.ndarray:
    """The sequences, of n, that stand at `places` of an epoch: (b,) int64 to (b,) int64, a bijection of range(n)."""
    if shuffle.kind == "none":
        return places
    if shuffle.kind == "full":
        return Permutation(n, seed=seed, epoch=epoch)[places]
    return _windowed(places, n=n, seed=seed, epoch=epoch, shuffle=shuffle)


def _windowed(places: np.ndarray, *, n: int, seed: int, epoch: int, shuffle: Shuffle) -> np.ndarray:
    run = min(shuffle.run, n)
    whole = n // run
    groups = -(-whole // shuffle.runs)  # of `runs` runs each; the last one has what is left
    size = shuffle.runs * run
    group = np.minimum(places // size, groups - 1)
    result = np.empty_like(places)
    for number in np.unique(group).tolist():
        chosen = group == number
        held = size if number < groups - 1 else n - number * size
        inner = Permutation(held, seed=seed, epoch=epoch, stream=number + 2)[places[chosen] - number * size]
        result[chosen] = inner + number * size
    slot, offset = np.divmod(result, run)
    # The sequences after the last whole run stay in the last group; the rotation below moves them
    # about.
    moved = slot < whole
    slot[moved] = Permutation(whole, seed=seed, epoch=epoch, stream=1)[slot[moved]]
    turn = int(_keys(seed, epoch, 1, 1, count=1)[0] % n)
    return (slot * run + offset + turn) % n


# --- mixtures -----------------------------------------------------------------------------------------------------


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of positions in a period of at most `LONGEST_PERIOD`.

    Exact where the weights, as written in decimals, allow it; otherwise by largest remainder, off
    by less than one position of the longest period.
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
    """Which of C corpora each position reads from, and the how-manieth of that corpus it is.

    One period of positions is laid out once and repeats for ever, and in every period corpus c
    comes up `counts[c]` times. After any number k of positions it has come up within 1 - 1 / (2C -
    2) of k * counts[c] / period times (Tijdeman, "The chairman assignment problem", 1980; his
    schedule, found as earliest deadline first).

    table: (period,) uint16, the corpus at each place. ranks: (period,) int64, how often it came
    before in the period.
    """

    counts: np.ndarray
    table: np.ndarray = field(repr=False)
    ranks: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        """Weights: positive numbers on any scale, each at least half a position of `LONGEST_PERIOD`."""
        counts = whole_shares(weights)
        assert min(counts) > 0, weights
        table = np.array(_chairmen(counts), dtype=np.uint16)
        ranks = np.empty(len(table), dtype=np.int64)
        for corpus, count in enumerate(counts):
            ranks[table == corpus] = np.arange(count)
        return cls(np.array(counts, dtype=np.int64), table, ranks)

    @property
    def period(self) -> int:
        return len(self.table)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus (b,) int64 and index within it (b,) int64 at positions (b,) int64."""
        periods, places = np.divmod(positions, self.period)
        corpora = self.table[places].astype(np.int64)
        return corpora, periods * self.counts[corpora] + self.ranks[places]

    def before(self, position: int) -> np.ndarray:
        """(C,) int64: how often each corpus comes up before `position`."""
        periods, places = divmod(position, self.period)
        return periods * self.counts + np.bincount(self.table[:places], minlength=len(self.counts))


def _chairmen(counts: Sequence[int]) -> list[int]:
    """The corpus at each place of a period; all arithmetic in whole numbers, so that it is the same everywhere."""
    period, spread = sum(counts), max(2 * len(counts) - 2, 1)
    # Turn j of a corpus may come when its share of the places so far reaches j + 1 / spread, and
    # must have come when that share passes j + 1 - 1 / spread.
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
    """The seed that orders corpus `number` of a blend: the run's own for the first, unrelated ones for the others."""
    return seed if number == 0 else int(_keys(seed, number, 1, 2, count=1)[0])
