"""Counts over random corpora, mixtures, phases, ranks and resumes: nothing is lost or repeated."""

import collections

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.memory_corpus import MemoryCorpus
from megatron_twotower.config.phases import Phase
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.data.blend import BlendedDataset
from megatron_twotower.data.dataset import SequenceDataset, global_batch, rank_slice
from megatron_twotower.data.order import Mixture, Permutation, Shuffle, shuffled
from megatron_twotower.data.packing import Packing

BLOCK = 4

shuffles = st.one_of(
    st.just(Shuffle()),
    st.just(Shuffle("none")),
    st.builds(Shuffle, st.just("windowed"), st.integers(1, 20), st.integers(1, 6)),
)
weights = st.one_of(st.integers(1, 100), st.floats(0.1, 100, allow_nan=False))


@st.composite
def corpora(draw, number=0):
    """A dataset with at least one sequence, packed or not; documents may be empty."""
    lengths = np.array([*draw(st.lists(st.integers(0, 37), min_size=1, max_size=60)), BLOCK * 8])
    corpus = MemoryCorpus(lengths, base=10**6 * number, shard_tokens=draw(st.integers(1, 500)))
    packing = Packing.of(corpus.starts, alignment=BLOCK) if draw(st.booleans()) else None
    length = BLOCK * draw(st.integers(1, 8))
    return SequenceDataset(
        corpus,
        sequence_length=length,
        seed=draw(st.integers(0, 2**40)),
        number=number,
        shuffle=draw(shuffles),
        packing=packing,
    )


@st.composite
def runs(draw):
    """(dataset, global batch size, steps) of a run: up to four corpora and three phases."""
    first = draw(corpora())
    datasets = {"0": first}
    for number in range(1, draw(st.integers(1, 4))):
        corpus = draw(corpora(number)).corpus
        packing = None if first.packing is None else Packing.of(corpus.starts, alignment=BLOCK)
        datasets[str(number)] = SequenceDataset(
            corpus,
            sequence_length=first.sequence_length,
            seed=first.seed,
            number=number,
            shuffle=first.shuffle,
            packing=packing,
        )
    batch = draw(st.sampled_from([1, 6, 12, 24]))
    phases, shares, step = [], [], 0
    for number in range(draw(st.integers(1, 3))):
        names = draw(st.lists(st.sampled_from(sorted(datasets)), min_size=1, unique=True))
        steps = draw(st.integers(1, 120 // batch + 1))
        noise = NoiseConfig(block_size_tokens=BLOCK)
        phases.append(Phase(str(number), "", step, steps, step * batch, steps * batch, noise, 1e-3, 0.0, 0, 0))
        shares.append({name: draw(weights) for name in names})
        step += steps
    return BlendedDataset(datasets, tuple(phases), shares), batch, step


def tokens_of(batch):
    """What a batch holds that is not padding, and how often."""
    kept = batch.tokens if batch.padding is None else batch.tokens[~batch.padding]
    return collections.Counter(kept.flatten().tolist())


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 2**40), shuffles)
@settings(max_examples=60, deadline=None)
def test_every_order_is_a_bijection(n, seed, epoch, shuffle):
    found = shuffled(np.arange(n), n=n, seed=seed, epoch=epoch, shuffle=shuffle)
    assert (np.bincount(found, minlength=n) == 1).all() and len(found) == n


@given(st.integers(1, 2**43), st.integers(0, 2**63), st.lists(st.integers(0, 2**43), min_size=2, unique=True))
@settings(max_examples=50, deadline=None)
def test_different_places_of_a_large_order_are_different_sequences(n, seed, places):
    places = np.unique(np.array(places) % n)
    found = Permutation(n, seed=seed, epoch=0)[places]
    assert len(np.unique(found)) == len(places) and found.min() >= 0 and found.max() < n


@given(corpora(), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_every_token_of_the_whole_sequences_once(dataset, epoch):
    n = len(dataset)
    read = tokens_of(global_batch(dataset, first=epoch * n, count=n))
    assert set(read.values()) <= {1}
    # What is missing is the rest at the end of the stream that fills no sequence.
    total, rest = dataset.corpus.total_tokens, dataset.corpus.total_tokens - len(read)
    assert set(read) == set(range(total - rest)) and rest < dataset.sequence_length


@given(runs(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_run_over_any_ranks_and_resumes_reads_each_sequence_once_an_epoch(run, data):
    source, batch, steps = run
    cursor, read = 0, []
    for _ in range(steps):  # each step on another number of ranks, from nothing but the cursor
        world = data.draw(st.sampled_from([one for one in (1, 2, 3, 6) if batch % one == 0]))
        for rank in range(world):
            first, count = rank_slice(cursor, batch, rank=rank, world=world)
            read.append(global_batch(source, first=first, count=count))
        cursor += batch
    samples, epochs, of = (
        np.concatenate([getattr(part, name).numpy() for part in read]) for name in ("samples", "epochs", "corpora")
    )
    assert len(set(zip(samples.tolist(), epochs.tolist(), strict=True))) == len(samples) == cursor, "none twice"
    assert list(source.sequences_before(cursor).values()) == np.bincount(of, minlength=len(source.datasets)).tolist()
    for dataset in source.datasets.values():
        mine = of == dataset.number
        counts = np.bincount(epochs[mine], minlength=1)
        assert (counts[:-1] == len(dataset)).all(), "no epoch begins before all of the one before has come"


@given(st.lists(weights, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_weights_hold_within_one_at_every_position(values):
    mixture = Mixture.of(values)
    drawn = np.cumsum(mixture.table[:, None] == np.arange(len(values)), axis=0)
    ideal = np.arange(1, mixture.period + 1)[:, None] * mixture.counts / mixture.period
    assert np.abs(drawn - ideal).max() < 1
    assert np.abs(mixture.counts / mixture.period - np.array(values) / sum(values)).max() < 1 / 2**16 + 1e-12
