"""Selection: which documents stay, and how they are cut into shards, against plain loops."""

from pathlib import Path

import numpy as np
import pytest

from megatron_twotower.common.workers import local_engine
from megatron_twotower.data import repeats, selection
from megatron_twotower.data.documents import Document, Unit
from megatron_twotower.data.parts import KEEP, RECORD, part_path
from megatron_twotower.data.selection import Rules, lines_before, select

RULES = {"holdout_fraction": 0.0, "deduplicate": True, "min_tokens": 1, "max_tokens": None}


def selected(folder, units, part_counts, *, shard_tokens=100, added_ids=1, workers=1, on_count=None, **rules):
    with local_engine(workers) as engine:
        return select(
            folder,
            units,
            part_counts,
            rules=Rules(**{**RULES, **rules}),
            shard_tokens=shard_tokens,
            added_ids=added_ids,
            engine=engine,
            on_count=on_count or (lambda _: None),
        )


def make_parts(folder, counts, *, seed=0, different=10**6):
    """Parts of records with random digests below `different` and random lengths."""
    (folder / "parts").mkdir()
    generator = np.random.default_rng(seed)
    units, part_counts, parts = [], [], []
    for number, count in enumerate(counts):
        records = np.zeros(count, dtype=RECORD)
        draws = generator.integers(0, different, count).astype(np.uint64)
        records["digest"] = np.stack([draws * np.uint64(2**64 // different), draws % np.uint64(2)], axis=1)
        records["tokens"] = generator.integers(1, 60, count)
        records["place"] = np.arange(count)
        records.tofile(part_path(folder, number, ".records"))
        units.append(Unit((Document("a", Path("a")),), None, number, number + 1, 1))
        part_counts.append({"documents": count, "lines": count + 2, "left_out": {"empty": 2}})
        parts.append(records)
    return units, part_counts, parts


def kept(folder, split):
    """(part, row) of the documents that the groups give to a split."""
    decided = np.concatenate([np.fromfile(path, np.uint8) for path in sorted((folder / "selection").glob("*.kept"))])
    places = [
        (number, row)
        for number, path in enumerate(sorted((folder / "parts").glob("*.records")))
        for row in range(path.stat().st_size // RECORD.itemsize)
    ]
    assert len(places) == len(decided)
    return [place for place, split_number in zip(places, decided, strict=True) if split_number == KEEP[split]]


def documents_of(shard, folder):
    rows = set(kept(folder, shard.split))
    return [
        (source.part, row)
        for source in shard.ranges
        for row in range(source.begin, source.end)
        if (source.part, row) in rows
    ]


@pytest.mark.parametrize(
    ("different", "at_once", "workers"),
    [
        (50, 1 << 24, 1),
        (50, 10, 1),
        (50, 7, 1),
        pytest.param(50, 1, 1, marks=pytest.mark.slow),
        (10**6, 10, 1),
        (50, 40, 2),
    ],
)
def test_of_a_repeated_text_the_first_copy_stays(at_once, different, workers, tmp_path, monkeypatch):
    """Also if its copies are in other groups, and its part in several."""
    monkeypatch.setattr(repeats, "DOCUMENTS_AT_ONCE", at_once)
    units, part_counts, parts = make_parts(tmp_path, [70, 0, 130, 40], different=different)
    counts = []
    found = selected(tmp_path, units, part_counts, workers=workers, on_count=lambda one: counts.append(list(one)))
    seen, expected = set(), []
    for number, records in enumerate(parts):
        for row, digest in enumerate(map(tuple, records["digest"].tolist())):
            if digest not in seen:
                expected.append((number, row))
                seen.add(digest)
    assert kept(tmp_path, "train") == expected
    assert found.left_out["train"] == {"empty": 8} | ({"repeated": 240 - len(expected)} if len(expected) < 240 else {})
    assert counts[-1] == [240 * selection.PASSES, 0, 0] and counts == sorted(counts)
    assert selected(tmp_path, units, part_counts, workers=workers) == found  # from what was decided
    whole = {path.name for path in (tmp_path / "selection").iterdir()}
    assert not any(name.endswith(".partial") for name in whole)


def test_no_task_holds_more_than_its_documents(tmp_path, monkeypatch):
    """A part larger than a group is decided in pieces; buckets are about as large as groups."""
    monkeypatch.setattr(repeats, "DOCUMENTS_AT_ONCE", 1000)
    groups = repeats.cut_groups([0, 2500, 300, 0, 700])
    assert [group.documents for group in groups] == [1000, 1000, 1000, 500]
    assert [tuple(piece) for group in groups for piece in group.pieces] == [
        *[(0, 0, 0), (1, 0, 1000), (1, 1000, 2000), (1, 2000, 2500), (2, 0, 300), (3, 0, 0), (4, 0, 200)],
        (4, 200, 700),
    ]
    units, part_counts, _ = make_parts(tmp_path, [20_000], different=2**40)
    selected(tmp_path, units, part_counts)
    sizes = [path.stat().st_size for path in (tmp_path / "selection").glob("*.marks")]
    assert len(sizes) == 20 and 800 < min(sizes) <= max(sizes) < 1200


def test_repeated_texts_stay_if_wanted(tmp_path):
    units, part_counts, _ = make_parts(tmp_path, [50, 60], different=5)
    assert selected(tmp_path, units, part_counts, deduplicate=False).totals["train"]["documents"] == 110
    assert not list((tmp_path / "selection").glob("*.digests"))


@pytest.mark.parametrize("at_once", [1 << 24, 33])
@pytest.mark.parametrize("shard_tokens", [1, 30, 61, 100, 1000, 10**9])
def test_shards_are_filled_in_order(shard_tokens, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "DOCUMENTS_AT_ONCE", at_once)
    units, part_counts, parts = make_parts(tmp_path, [70, 1, 0, 130, 40])
    found = selected(tmp_path, units, part_counts, shard_tokens=shard_tokens, holdout_fraction=0.2)
    for split in ("train", "validation"):
        groups, held = [], 0
        for part, row in kept(tmp_path, split):
            length = int(parts[part]["tokens"][row]) + 1
            if not groups or held + length > shard_tokens:
                groups.append([])
                held = 0
            groups[-1].append((part, row))
            held += length
        shards = [shard for shard in found.shards if shard.split == split]
        assert [documents_of(shard, tmp_path) for shard in shards] == groups
        assert [shard.number for shard in shards] == list(range(len(groups)))
        firsts = np.cumsum([0, *map(len, groups)])[:-1].tolist()
        assert [shard.first for shard in shards] == firsts
        for source in (source for shard in shards for source in shard.ranges):
            assert source.first_id == parts[source.part]["tokens"][: source.begin].sum()
        rows = kept(tmp_path, split)
        assert found.totals[split]["documents"] == len(rows)
        assert found.totals[split]["tokens"] == sum(int(parts[part]["tokens"][row]) + 1 for part, row in rows)


def test_length_limits_ignore_added_ids(tmp_path):
    units, part_counts, parts = make_parts(tmp_path, [100])
    found = selected(tmp_path, units, part_counts, min_tokens=10, max_tokens=50, added_ids=2)
    lengths = parts[0]["tokens"]
    assert [row for _, row in kept(tmp_path, "train")] == np.flatnonzero((lengths >= 10) & (lengths <= 50)).tolist()
    assert found.left_out["train"]["too_short"] == (lengths < 10).sum()
    assert found.left_out["train"]["too_long"] == (lengths > 50).sum()


def test_lines_are_counted_file_by_file():
    one, two = (Document(name, Path(name)) for name in "ab")
    units = [Unit((file,), None, 0, 1, 1) for file in (one, one, one, two, two)]
    assert lines_before(units, [{"lines": lines} for lines in (5, 7, 2, 9, 4)]) == [0, 5, 12, 0, 9]
