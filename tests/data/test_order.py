"""Shuffles are bijections that look random; mixtures keep their shares at every position.

Neither ever changes.
"""

import itertools
import math

import numpy as np
import pytest

from megatron_twotower.data.order import (
    LONGEST_PERIOD,
    Mixture,
    Permutation,
    Shuffle,
    corpus_seed,
    integer_shares,
    shuffled,
)


def order(n, *, seed=0, epoch=0):
    return Permutation(n, seed=seed, epoch=epoch)[np.arange(n)]


def chi_square(counts):
    """Chi-square per degree of freedom of counts that should be equal.

    Its mean is 1, its standard deviation sqrt(2 / (cells - 1)).
    """
    counts = np.asarray(counts, dtype=float).ravel()
    return ((counts - counts.mean()) ** 2).sum() / counts.mean() / (len(counts) - 1)


# --- the permutation ---


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
    """A run that a later version resumes must continue in the same order."""
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


def test_streams_of_one_epoch_are_unrelated():
    n = 20_000
    one = order(n, seed=5, epoch=0)
    two = Permutation(n, seed=5, epoch=0, stream=1)[np.arange(n)]
    assert (one == two).sum() < 8
    assert (Permutation(n, seed=5, epoch=0, stream=0)[np.arange(n)] == one).all()


def test_the_first_corpus_keeps_the_seed_of_the_run():
    assert corpus_seed(1234, 0) == 1234
    assert len({corpus_seed(seed, number) for seed in range(3) for number in range(200)}) == 600


# --- in windows ---


def windowed(n, *, run, runs, seed=0, epoch=0):
    return shuffled(np.arange(n), n=n, seed=seed, epoch=epoch, shuffle=Shuffle("windowed", run, runs))


@pytest.mark.parametrize(
    ("n", "run", "runs"),
    [(1, 1, 1), (10, 3, 2), (100, 7, 3), (997, 10, 1000), (50, 80, 4), (1000, 10, 100), (4096, 16, 8)],
)
def test_windows_are_a_bijection(n, run, runs):
    for seed, epoch in ((0, 0), (7, 0), (0, 1), (2**40, 10**6)):
        whole = windowed(n, run=run, runs=runs, seed=seed, epoch=epoch)
        assert (np.sort(whole) == np.arange(n)).all()
        places = np.array([n - 1, 0, n // 2])
        alone = shuffled(places, n=n, seed=seed, epoch=epoch, shuffle=Shuffle("windowed", run, runs))
        assert (alone == whole[places]).all()


def test_the_order_in_windows_never_changes():
    assert windowed(12, run=2, runs=2, seed=7, epoch=3).tolist() == [11, 3, 0, 4, 2, 8, 7, 1, 10, 9, 5, 6]


def test_a_window_opens_few_runs_and_mixes_them():
    n, run, runs = 64 * 512, 64, 8
    result = windowed(n, run=run, runs=runs, seed=3)
    groups = result.reshape(-1, run * runs)
    # The runs are cut from a rotated corpus, so against the unrotated one each can reach into two.
    assert max(len(np.unique(group // run)) for group in groups) <= 2 * runs
    starts = [np.unique(group // run).mean() for group in groups]
    assert abs(np.corrcoef(np.arange(len(groups)), starts)[0, 1]) < 4 / math.sqrt(len(groups)), "runs from everywhere"
    inside = np.concatenate([np.argsort(np.argsort(group)) for group in groups])
    places = np.tile(np.arange(run * runs), len(groups))
    spread = 4 * math.sqrt(2 / 32**2)
    assert abs(chi_square(np.histogram2d(places, inside, bins=32)[0]) - 1) < spread
    neighbours = (np.abs(np.diff(result)) == 1).mean()
    assert neighbours < 4 * 2 / (run * runs), "neighbours are separated"


def test_the_rest_after_the_last_run_is_not_always_the_same():
    """100 sequences in runs of 30: the ten that fill no run are different ones in every epoch."""
    last = [set(windowed(100, run=30, runs=1, epoch=epoch)[-10:].tolist()) for epoch in range(50)]
    assert len(set.union(*last)) > 90


def test_epochs_in_windows_are_unrelated():
    one, two = windowed(20_000, run=100, runs=10), windowed(20_000, run=100, runs=10, epoch=1)
    assert (one == two).sum() < 8


# --- mixtures ---

WEIGHTS = [
    [1],
    [1, 1],
    [30, 20, 12.5, 37.5],
    [0.1, 0.2, 0.7],
    [1, 1000],
    [3.14159265, 2.71828182, 1.41421356, 0.57721566],
    [1] * 37,
    [0.62, 0.11, 0.09, 0.07, 0.05, 0.03, 0.02, 0.01],
]


def test_shares_are_exact_where_decimals_allow_it():
    assert integer_shares([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert integer_shares([30, 20, 12.5, 37.5]) == [12, 8, 5, 15]
    assert integer_shares([5]) == [1]
    odd = WEIGHTS[5]
    counts = integer_shares(odd)
    assert sum(counts) == LONGEST_PERIOD
    for weight, count in zip(odd, counts, strict=True):
        assert abs(count - weight / sum(odd) * LONGEST_PERIOD) < 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_the_weights_hold_at_every_position(weights):
    mixture, corpora = Mixture.of(weights), len(weights)
    drawn = mixture.table[:, None] == np.arange(corpora)
    ideal = np.arange(1, mixture.period + 1)[:, None] * mixture.counts / mixture.period
    worst = np.abs(np.cumsum(drawn, axis=0) - ideal).max()
    assert worst <= 1 - 1 / max(2 * corpora - 2, 1) + 1e-9
    assert (drawn.sum(axis=0) == mixture.counts).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_every_index_of_a_corpus_comes_once_and_in_order(weights):
    mixture = Mixture.of(weights)
    first = 3 * mixture.period - 7
    corpora, indices = mixture.at(np.arange(first, first + mixture.period + 20))
    seen = mixture.counts_before(first)
    for corpus, index in zip(corpora.tolist(), indices.tolist(), strict=True):
        assert index == seen[corpus]
        seen[corpus] += 1
    assert (seen == mixture.counts_before(first + mixture.period + 20)).all()


def test_far_positions_cost_and_hold_the_same():
    mixture = Mixture.of([3, 2, 1])
    far = 6 * 10**14
    assert mixture.counts_before(far).tolist() == [3 * 10**14, 2 * 10**14, 10**14]
    corpora, indices = mixture.at(np.arange(far, far + 6))
    assert sorted(corpora.tolist()) == [0, 0, 0, 1, 1, 2]
    assert indices[corpora == 2].tolist() == [10**14]


def test_a_mixture_never_changes():
    """A run that a later version resumes must read the same corpora."""
    assert Mixture.of([5, 3, 2]).table.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    odd = Mixture.of(WEIGHTS[5]).table
    assert int((odd.astype(np.int64) * np.arange(len(odd))).sum()) % 99_991 == 92526
