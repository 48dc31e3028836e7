"""Blend files, and runs over several corpora: shares, epochs, phases; the same for any layout."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.memory_corpus import corpus_of
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.phases import Phase
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.data.blend import Blend, BlendedDataset, prepared_folders, split_folder
from megatron_twotower.data.dataset import (
    SAMPLE_BITS,
    SequenceDataset,
    _warn_once,
    batches,
    global_batch,
    skipped_sequences,
)
from megatron_twotower.data.order import Shuffle
from megatron_twotower.data.packing import Packing
from megatron_twotower.train.noise import corrupt

LENGTH, BATCH = 32, 40
FIELDS = ("tokens", "samples", "epochs", "positions", "documents", "padding", "corpora")
DATA = Path(__file__).resolve().parents[2] / "data"


def phase(name, first_step, steps, *, block=8):
    noise = NoiseConfig(block_size_tokens=block)
    return Phase(name, name, first_step, steps, first_step * BATCH, steps * BATCH, noise, 1e-3, 0.0, 0, 0)


def blended(*, documents="ignore", shuffle=None, damaged=None, seed=7):
    """Three corpora of about 250, 125 and 62 sequences, in three phases.

    The phases read the first two, all three, and the last two.
    """
    datasets = {}
    for number, (name, count) in enumerate({"web": 400, "code": 200, "math": 100}.items()):
        corpus = corpus_of(count, longest=39, seed=number, base=10**6 * number, shard_tokens=700)
        if damaged and number == 0:
            corpus = dataclasses.replace(corpus, damaged=damaged)
        datasets[name] = SequenceDataset(
            corpus,
            sequence_length=LENGTH,
            seed=seed,
            number=number,
            shuffle=shuffle or Shuffle(),
            packing=Packing.of(corpus.starts, alignment=16) if documents == "respect" else None,
            skip_damaged=damaged is not None,
        )
    phases = (phase("one", 0, 10, block=16), phase("two", 10, 25, block=16), phase("three", 35, 30))
    weights = ({"web": 3, "code": 1}, {"web": 0.5, "code": 0.3, "math": 0.2}, {"code": 1, "math": 2})
    return BlendedDataset(datasets, phases, weights)


def assert_same(one, two):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(two, name)
        if a is None or b is None:
            assert a is None and b is None, name
        else:
            assert torch.equal(a, b), name


def joined(parts):
    values = {}
    for name in FIELDS:
        items = [getattr(part, name) for part in parts]
        values[name] = None if items[0] is None else torch.cat(items)
    return type(parts[0])(**values)


# --- what is read ---


def test_shares_hold_at_every_position_of_every_phase():
    source = blended()
    read = global_batch(source, first=0, count=65 * BATCH).corpora.numpy()
    shares = ([3 / 4, 1 / 4, 0], [0.5, 0.3, 0.2], [0, 1 / 3, 2 / 3])
    for stage, share in zip(source.phases, shares, strict=True):
        drawn = read[stage.first : stage.first + stage.sequences, None] == np.arange(3)
        ideal = np.arange(1, stage.sequences + 1)[:, None] * np.array(share)
        assert np.abs(drawn.cumsum(axis=0) - ideal).max() < 1
    for cursor in (0, 1, 399, 400, 401, 1399, 1400, 1401, 2600):
        counted = np.bincount(read[:cursor], minlength=3).tolist()
        assert list(source.sequences_before(cursor).values()) == counted


@pytest.mark.parametrize("documents", ["ignore", "respect"])
@pytest.mark.parametrize("shuffle", [Shuffle(), Shuffle("windowed", 10, 3), Shuffle("none")])
def test_no_sequence_is_lost_or_repeated_within_an_epoch_over_all_phases(documents, shuffle):
    """Counts each corpus over three phases: a complete epoch has every sequence once."""
    source = blended(documents=documents, shuffle=shuffle)
    whole = global_batch(source, first=0, count=65 * BATCH)
    for name, dataset in source.datasets.items():
        mine = whole.corpora == dataset.number
        numbers = (whole.samples[mine] - (dataset.number << SAMPLE_BITS)).numpy()
        epochs = whole.epochs[mine].numpy()
        assert (epochs == np.arange(len(epochs)) // len(dataset)).all(), "one epoch after the other"
        for epoch in range(epochs.max()):
            assert (np.sort(numbers[epochs == epoch]) == np.arange(len(dataset))).all(), (name, epoch)
        rest = numbers[epochs == epochs.max()]
        assert len(np.unique(rest)) == len(rest)
        for tokens, number in zip(whole.tokens[mine][:20].numpy(), numbers, strict=False):
            assert (tokens == dataset.sequence(number).tokens).all()
    assert whole.epochs.max() >= 2, "the corpora are read more than once"
    pairs = set(zip(whole.samples.tolist(), whole.epochs.tolist(), strict=True))
    assert len(pairs) == 65 * BATCH, "no two sequences of the run share their noise"


def test_epochs_and_corpora_have_orders_of_their_own():
    source = blended()
    web = source.datasets["web"]
    first, second = (web.locate(np.arange(50) + epoch * len(web))[1].tolist() for epoch in (0, 1))
    other = dataclasses.replace(web, number=5).locate(np.arange(50))[1].tolist()
    assert first != second and first != other and second != other


def test_the_first_corpus_alone_is_read_as_without_a_blend():
    dataset = blended().datasets["web"]
    alone = BlendedDataset({"web": dataset}, (phase("only", 0, 10),), ({"web": 2.5},))
    one, two = (global_batch(source, first=995, count=30) for source in (alone, dataset))
    assert_same(dataclasses.replace(one, corpora=None), two)
    assert one.corpora.tolist() == [0] * 30


# --- exact and elastic ---


def step_over(source, *, cursor, world, workers=1, depth=1, micro=1):
    """A global batch, joined from what every rank reads."""
    parts, after = [], set()
    for rank in range(world):
        stream = batches(
            source,
            cursor=cursor,
            global_batch_size=1000 if world == 1000 else BATCH,
            micro_batch_size=micro,
            rank=rank,
            world=world,
            workers=workers,
            depth=depth,
        )
        micro_batches, end = next(stream)
        stream.close()
        parts += micro_batches
        after.add(end)
    assert len(after) == 1
    return joined(parts), after.pop()


@pytest.mark.parametrize("documents", ["ignore", "respect"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_kth_global_batch_and_its_noise_are_the_same_on_any_number_of_ranks(world, documents):
    source = blended(documents=documents)
    for cursor in (0, 9 * BATCH, 400 - 13, 35 * BATCH - 1, 10**9 + 7):
        want = global_batch(source, first=cursor, count=BATCH)
        got, after = step_over(source, cursor=cursor, world=world)
        assert_same(got, want)
        assert after == cursor + BATCH
        noise = NoiseConfig(block_size_tokens=8, mask_token_id=0)
        assert torch.equal(corrupt(got, noise, seed=7).noisy, corrupt(want, noise, seed=7).noisy)


def test_a_thousand_ranks_read_what_one_does():
    source = blended()
    for cursor in (0, 1000, 10**9):
        got, _ = step_over(source, cursor=cursor, world=1000)
        want = global_batch(source, first=cursor, count=1000)
        assert_same(got, want)


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 4), (4, 2), (3, 9)])
def test_workers_change_nothing(workers, depth):
    source = blended(documents="respect", shuffle=Shuffle("windowed", 10, 3))
    stream = batches(
        source,
        cursor=8 * BATCH,
        global_batch_size=BATCH,
        micro_batch_size=20,
        rank=0,
        world=1,
        workers=workers,
        depth=depth,
    )
    for number in range(8, 40):
        micro, after = next(stream)
        assert after == (number + 1) * BATCH
        assert_same(joined(micro), global_batch(source, first=number * BATCH, count=BATCH))
    stream.close()


def test_a_run_resumed_many_times_on_other_numbers_of_ranks_reads_the_same():
    source, cursor, worlds = blended(), 0, [1, 8, 2, 4, 1, 5, 10, 20, 40]
    read = []
    for number in range(65):
        batch, cursor = step_over(blended(), cursor=cursor, world=worlds[number % len(worlds)])
        read.append(batch)
    assert_same(joined(read), global_batch(source, first=0, count=65 * BATCH))


def test_far_positions_read_no_more_than_near_ones():
    """Any position is found by arithmetic: only the sequences of the batch are read."""
    source = blended()
    for first in (0, 10**9, 10**15):
        for dataset in source.datasets.values():
            dataset.corpus.reads.clear()
        batch = global_batch(source, first=first, count=8)
        assert sum(len(dataset.corpus.reads) for dataset in source.datasets.values()) == 8
        assert batch.positions.tolist() == list(range(first, first + 8))


# --- damage ---


@pytest.mark.parametrize("documents", ["ignore", "respect"])
def test_skipping_keeps_the_order_of_everything_else(documents, caplog):
    _warn_once.cache_clear()
    sound, broken = blended(documents=documents), blended(documents=documents, damaged={3: "truncated", 5: "gone"})
    want, got = (global_batch(source, first=0, count=20 * BATCH) for source in (sound, broken))
    for name in ("samples", "epochs", "positions", "corpora"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    skipped = got.padding.all(dim=1)
    assert 0 < skipped.sum() < len(skipped) and skipped_sequences(got) == skipped.sum()
    assert torch.equal(got.tokens[~skipped], want.tokens[~skipped])
    assert (got.tokens[skipped] == 0).all()
    corpus = broken.datasets["web"].corpus
    for sample, lost in zip(got.samples[got.corpora == 0].tolist(), skipped[got.corpora == 0].tolist(), strict=True):
        read = sound.datasets["web"].sequence(sample).tokens
        shards = set(range(corpus.shard_of(int(read[0])), corpus.shard_of(int(read[-1])) + 1))
        assert lost == bool(shards & {3, 5})
    assert skipped_sequences(want) == 0
    assert sorted(caplog.messages) == [
        "shard 3: truncated; its sequences are skipped",
        "shard 5: gone; its sequences are skipped",
    ], "each damaged shard is named once"


@pytest.mark.parametrize("world", [2, 8])
def test_skipping_is_the_same_on_every_number_of_ranks(world):
    source = blended(documents="respect", damaged={0: "gone", 3: "truncated"})
    for cursor in (0, 200, 1000):
        got, _ = step_over(source, cursor=cursor, world=world)
        assert_same(got, global_batch(source, first=cursor, count=BATCH))
        assert 0 < skipped_sequences(got) < BATCH


def test_a_damaged_shard_stops_where_it_is_not_to_be_skipped():
    source = blended(damaged={3: "truncated"})
    strict = dataclasses.replace(
        source, datasets={name: dataclasses.replace(one, skip_damaged=False) for name, one in source.datasets.items()}
    )
    with pytest.raises(UserError, match="shard 3: truncated"):
        global_batch(strict, first=0, count=20 * BATCH)


# --- blend files ---

GOOD = """
corpora:
  web: {folder: web, source: "a crawl", public: true}
  math: {folder: /data/math}
  far: {folder: "http://host/far"}
mixtures:
  breadth: {web: 90, math: 10.5}
  quality: {math: 1, far: 3}
"""


def write(tmp_path, text):
    path = tmp_path / "blend.yaml"
    path.write_text(text)
    return path


def test_a_blend_file_is_read(tmp_path):
    blend = Blend.open(write(tmp_path, GOOD))
    assert [mixture.name for mixture in blend.mixtures] == ["breadth", "quality"]
    web, math = blend.mixtures[0].corpora
    assert (web.name, web.number, web.folder, web.weight) == ("web", 0, str(tmp_path / "web"), 90.0)
    assert (web.source, web.public) == ("a crawl", True)
    assert (math.folder, math.weight, math.public) == ("/data/math", 10.5, False)
    assert [corpus.number for corpus in blend.mixture("quality").corpora] == [1, 2]
    assert blend.mixtures[1].corpora[1].folder == "http://host/far"
    elsewhere = Blend.open(tmp_path / "blend.yaml", root="tokens")
    assert elsewhere.mixtures[0].corpora[0].folder == "tokens/web"
    with pytest.raises(UserError, match="found the mixtures breadth, quality, expected depth"):
        blend.mixture("depth")
    with pytest.raises(UserError, match="expected phases that name them"):
        blend.mixture("")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixtures:", "mixture:", "mixtures: found None, expected names"),
        ("corpora:", "- corpora", "not YAML"),
        ("web: 90", "web: -1", "breadth: web: found the weight -1, expected a number above 0"),
        ("web: 90", "web: true", "breadth: web: found the weight True"),
        ("web: 90", "wep: 90", "breadth: found the corpus wep, expected one of web, math, far"),
        ("math: 10.5", "math: 0.00001", "breadth: math: found the weight 1e-05, expected at least 1 in 65536 of all"),
        ("folder: web", "folders: web", r"corpora.web: found .*, expected a folder"),
        ("public: true", "pubic: true", "corpora.web: found the key pubic, expected folder, source, public"),
        ("mixtures:", "extra: 1\nmixtures:", "found the key extra, expected corpora and mixtures"),
    ],
)
def test_a_bad_blend_file_is_named_in_one_line(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message) as error:
        Blend.open(write(tmp_path, GOOD.replace(old, new, 1)))
    assert str(tmp_path / "blend.yaml") in str(error.value) and "\n" not in str(error.value)


def test_a_split_is_below_its_folder_or_url():
    assert split_folder("tokens/web", "train") == Path("tokens/web/train")
    assert split_folder("http://host/web/", "train") == "http://host/web/train"
    assert split_folder("pipe:cat /data/{file}", "train") == "pipe:cat /data/train/{file}"


def test_the_prepared_folders_of_a_blend_and_of_a_folder(prepared_blend):
    one, two = str(prepared_blend / "one"), str(prepared_blend / "two")
    assert prepared_folders(one) == {"one": one}
    assert prepared_folders(str(prepared_blend / "blend.yaml")) == {"first": one, "second": two}
    with pytest.raises(UserError, match=r"one: found no \.yaml with --folder x, expected a blend file"):
        prepared_folders(one, folder="x")


def test_a_missing_blend_file_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none.yaml'}: cannot be read")):
        Blend.open(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(DATA.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_blends_of_the_repository_are_sound(path):
    blend = Blend.open(path)
    assert blend.mixtures
    for mixture in blend.mixtures:
        assert sum(corpus.weight for corpus in mixture.corpora) == pytest.approx(100)
        assert all(corpus.source for corpus in mixture.corpora)
