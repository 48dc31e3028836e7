"""Decides which documents of all parts stay, in which split and shard. Reads records, not ids."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.data.documents import TRAIN, VALIDATION, Unit
from megatron_twotower.data.parts import KEEP, RECORD, part_array, part_path
from megatron_twotower.data.planned_shards import PartRange, PlannedShard

SPLITS = (VALIDATION, TRAIN)

_DOCUMENTS_SORTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Selection:
    """What to write.

    Attributes:
        splits: The splits to write, in order.
        totals: By split: documents, tokens (with BOS and EOS), bytes and characters.
        left_out: By split, the number of texts left out by reason.
    """

    splits: tuple[str, ...]
    shards: tuple[PlannedShard, ...]
    totals: dict[str, Counter[str]]
    left_out: dict[str, Counter[str]]


def select(
    folder: Path,
    units: Sequence[Unit],
    part_counts: Sequence[dict[str, Any]],
    *,
    holdout_fraction: float,
    deduplicate: bool,
    min_tokens: int,
    max_tokens: int | None,
    shard_tokens: int,
    added_ids: int,
) -> Selection:
    """Decide over the parts of `units` and write their `.keep` files.

    Of a repeated text, the first copy stays. A record that was left out before its text was known
    counts as left out of `train`.

    Args:
        part_counts: What `write_part` returned, by unit.
        min_tokens, max_tokens: Limits of the length of the text alone.
        shard_tokens: Limit of a shard, where each document has `added_ids` more ids (BOS, EOS).
    """
    repeated = _repeats(folder, [counts["documents"] for counts in part_counts]) if deduplicate else None
    totals = {split: Counter(documents=0, tokens=0, bytes=0, characters=0) for split in SPLITS}
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    cutters = {split: _Cutter(split, shard_tokens) for split in SPLITS}
    first = 0
    parts = zip(units, part_counts, lines_before(units, part_counts), strict=True)
    for part, (unit, counts, before) in enumerate(parts):
        records = part_array(folder, part, ".records", dtype=RECORD)
        left_out[unit.split or TRAIN].update(counts["left_out"])
        lengths = records["tokens"]
        reasons = {
            "repeated": np.zeros(len(records), bool) if repeated is None else repeated[first : first + len(records)],
            "too_short": lengths < min_tokens,
            "too_long": lengths > (max_tokens or np.iinfo(np.int64).max),
        }
        in_validation = _held_out(records, unit, holdout_fraction)
        keep = np.where(in_validation, KEEP[VALIDATION], KEEP[TRAIN]).astype(np.uint8)
        for reason, rows in reasons.items():
            for split in SPLITS:
                if number := int((rows & (keep == KEEP[split])).sum()):
                    left_out[split][reason] += number
            keep[rows] = 0
        part_path(folder, part, ".keep").write_bytes(keep.tobytes())
        range_of = _range_of(part, unit, np.cumsum(lengths) - lengths, before)
        for split in SPLITS:
            rows = np.flatnonzero(keep == KEEP[split])
            kept = records[rows]
            cutters[split].add(rows, kept["tokens"] + added_ids, range_of)
            totals[split].update(
                documents=len(rows),
                tokens=int(kept["tokens"].sum()) + added_ids * len(rows),
                bytes=int(kept["bytes"].sum()),
                characters=int(kept["characters"].sum()),
            )
        first += len(records)
    shards = [shard for split in SPLITS for shard in cutters[split].finished()]
    split_files = {unit.split for unit in units}
    splits = tuple(split for split in SPLITS if split == TRAIN or split in split_files or totals[split]["documents"])
    return Selection(splits, tuple(shards), totals, left_out)


def lines_before(units: Sequence[Unit], part_counts: Sequence[dict[str, Any]]) -> list[int]:
    """For each unit of records, the number of lines (rows) of its file in earlier units."""
    befores, lines = [], 0
    for number, (unit, counts) in enumerate(zip(units, part_counts, strict=True)):
        if number and unit.files != units[number - 1].files:
            lines = 0
        befores.append(lines)
        lines += counts["lines"]
    return befores


def _held_out(records: np.ndarray, unit: Unit, holdout_fraction: float) -> np.ndarray:
    """(documents,) bool. The text of a record decides, however the input is cut into files."""
    if unit.split is not None:
        return np.full(len(records), unit.split == VALIDATION)
    return records["digest"][:, 0] < np.uint64(holdout_fraction * 2.0**64)


def _repeats(folder: Path, counts: Sequence[int]) -> np.ndarray:
    """(all documents,) bool: whether an earlier document has the same 128 bits of SHA-256."""
    total = sum(counts)
    digests, at = np.empty((total, 2), dtype=np.uint64), 0
    for part, count in enumerate(counts):
        digests[at : at + count] = part_array(folder, part, ".records", dtype=RECORD)["digest"]
        at += count
    repeated = np.zeros(total, dtype=bool)
    for rows in _by_first_byte(digests):
        order = np.lexsort((digests[rows, 1], digests[rows, 0]))  # stable: equal digests keep their order
        ordered = digests[rows][order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        repeated[rows[order[1:][same]]] = True
    return repeated


def _by_first_byte(digests: np.ndarray) -> Iterable[np.ndarray]:
    """Groups of rows; equal digests are in one group.

    Sorting needs memory, so a large number of digests is grouped by the first byte. A small number
    is one group.
    """
    if len(digests) <= _DOCUMENTS_SORTED_AT_ONCE:
        return [np.arange(len(digests))]
    first = digests.view(np.uint8)[:, 0].copy()
    return (np.flatnonzero(first == byte) for byte in range(256))


def _range_of(part: int, unit: Unit, first_ids: np.ndarray, before: int) -> Callable[[int, int], PartRange]:
    names = tuple(document.name for document in unit.files)
    lines = before if unit.split is None else None

    def part_range(begin: int, end: int) -> PartRange:
        return PartRange(part, begin, end, int(first_ids[begin]), names, lines)

    return part_range


@dataclass
class _Cutter:
    """Cuts the documents of a split, in order, into shards of at most `shard_tokens` tokens.

    A longer document is a shard of its own.

    Attributes:
        shards: The shards that are full.
        ranges, tokens, documents: The content of the shard that is being filled, its tokens and its
            documents.
        first: The number of the first document of that shard.
    """

    split: str
    shard_tokens: int
    shards: list[PlannedShard] = field(default_factory=list)
    ranges: list[PartRange] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    first: int = 0

    def add(self, rows: np.ndarray, lengths: np.ndarray, range_of: Callable[[int, int], PartRange]) -> None:
        """Add documents of a part.

        Args:
            rows: (n,) their rows in the part.
            lengths: (n,) their tokens.
            range_of: Makes the `PartRange` of rows begin to end.
        """
        ends = np.cumsum(lengths)
        at = 0
        while at < len(rows):
            used = int(ends[at - 1]) if at else 0
            fit = max(int(np.searchsorted(ends, used + self.shard_tokens - self.tokens, side="right")), at)
            if fit == at and not self.ranges:
                fit = at + 1
            if fit > at:
                self.ranges.append(range_of(int(rows[at]), int(rows[fit - 1]) + 1))
                self.tokens += int(ends[fit - 1]) - used
                self.documents += fit - at
            if fit < len(rows):
                self._close()
            at = fit

    def finished(self) -> list[PlannedShard]:
        """All shards, the last one included."""
        if self.ranges:
            self._close()
        return self.shards

    def _close(self) -> None:
        self.shards.append(PlannedShard(self.split, len(self.shards), self.first, tuple(self.ranges)))
        self.first += self.documents
        self.ranges, self.tokens, self.documents = [], 0, 0
