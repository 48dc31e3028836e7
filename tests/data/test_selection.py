"""Selection: which documents stay, and how they are cut into shards, against plain loops."""

from pathlib import Path

import numpy as np
import pytest

from megatron_twotower.data import selection
from megatron_twotower.data.documents import Document, Unit
from megatron_twotower.data.parts import KEEP, RECORD, part_path
from megatron_twotower.data.selection import lines_before, select

OPTIONS = {
    "holdout_fraction": 0.0,
    "deduplicate": True,
    "min_tokens": 1,
    "max_tokens": None,
    "shard_tokens": 100,
    "added_ids": 1,
}


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
    """(part, row) of the documents that `.keep` gives to a split."""
    return [
        (number, row)
        for number in range(len(list((folder / "parts").glob("*.keep"))))
        for row in np.flatnonzero(
            np.fromfile(part_path(folder, number, ".keep"), dtype=np.uint8) == KEEP[split]
        ).tolist()
    ]


def documents_of(shard, folder):
    rows = set(kept(folder, shard.split))
    return [
        (source.part, row)
        for source in shard.ranges
        for row in range(source.begin, source.end)
        if (source.part, row) in rows
    ]


@pytest.mark.parametrize("at_once", [1 << 24, 10])
@pytest.mark.parametrize("different", [50, 10**6])
def test_of_a_repeated_text_the_first_copy_stays(at_once, different, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "_DOCUMENTS_SORTED_AT_ONCE", at_once)
    units, part_counts, parts = make_parts(tmp_path, [70, 0, 130, 40], different=different)
    selected = select(tmp_path, units, part_counts, **OPTIONS)
    seen, expected = set(), []
    for number, records in enumerate(parts):
        for row, digest in enumerate(map(tuple, records["digest"].tolist())):
            if digest not in seen:
                expected.append((number, row))
                seen.add(digest)
    assert kept(tmp_path, "train") == expected
    assert selected.left_out["train"] == {"empty": 8} | (
        {"repeated": 240 - len(expected)} if len(expected) < 240 else {}
    )


@pytest.mark.parametrize("shard_tokens", [1, 30, 61, 100, 1000, 10**9])
def test_shards_are_filled_in_order(shard_tokens, tmp_path):
    units, part_counts, parts = make_parts(tmp_path, [70, 1, 0, 130, 40])
    options = {**OPTIONS, "shard_tokens": shard_tokens, "holdout_fraction": 0.2}
    selected = select(tmp_path, units, part_counts, **options)
    for split in ("train", "validation"):
        groups, held = [], 0
        for part, row in kept(tmp_path, split):
            length = int(parts[part]["tokens"][row]) + 1
            if not groups or held + length > shard_tokens:
                groups.append([])
                held = 0
            groups[-1].append((part, row))
            held += length
        shards = [shard for shard in selected.shards if shard.split == split]
        assert [documents_of(shard, tmp_path) for shard in shards] == groups
        assert [shard.number for shard in shards] == list(range(len(groups)))
        firsts = np.cumsum([0, *map(len, groups)])[:-1].tolist()
        assert [shard.first for shard in shards] == firsts
        for source in (source for shard in shards for source in shard.ranges):
            assert source.first_id == parts[source.part]["tokens"][: source.begin].sum()
        rows = kept(tmp_path, split)
        assert selected.totals[split]["documents"] == len(rows)
        assert selected.totals[split]["tokens"] == sum(int(parts[part]["tokens"][row]) + 1 for part, row in rows)


def test_length_limits_ignore_added_ids(tmp_path):
    units, part_counts, parts = make_parts(tmp_path, [100])
    selected = select(tmp_path, units, part_counts, **{**OPTIONS, "min_tokens": 10, "max_tokens": 50, "added_ids": 2})
    lengths = parts[0]["tokens"]
    assert [row for _, row in kept(tmp_path, "train")] == np.flatnonzero((lengths >= 10) & (lengths <= 50)).tolist()
    assert selected.left_out["train"]["too_short"] == (lengths < 10).sum()
    assert selected.left_out["train"]["too_long"] == (lengths > 50).sum()


def test_lines_are_counted_file_by_file():
    one, two = (Document(name, Path(name)) for name in "ab")
    units = [Unit((file,), None, 0, 1, 1) for file in (one, one, one, two, two)]
    assert lines_before(units, [{"lines": lines} for lines in (5, 7, 2, 9, 4)]) == [0, 5, 12, 0, 9]
