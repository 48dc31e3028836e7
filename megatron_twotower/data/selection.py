"""Which documents of all parts stay, in which split, and how they are cut in shards. Sees records, not ids."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.data.documents import TRAIN, VALIDATION, Unit
from megatron_twotower.data.parts import KEEP, RECORD, PlannedShard, Span, part_array, part_path

SPLITS = (VALIDATION, TRAIN)

_DOCUMENTS_SORTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Selection:
    """splits: those to write, in order. totals, by split: documents, tokens (BOS, EOS included), bytes, characters."""

    splits: tuple[str, ...]
    shards: tuple[PlannedShard, ...]
    totals: dict[str, Counter[str]]
    left_out: dict[str, Counter[str]]


def select(
    folder: Path,
    units: Sequence[Unit],
    abouts: Sequence[dict[str, Any]],
    *,
    holdout_fraction: float,
    deduplicate: bool,
    min_tokens: int,
    max_tokens: int | None,
    shard_tokens: int,
    marks: int,
) -> Selection:
    """Decide over the parts of `units` (abouts: what `write_part` returned) and write their `.keep` files.

    min_tokens, max_tokens: of the text alone; shard_tokens: with the `marks` ids (BOS, EOS) that
    each document gets. Of a repeated text the first copy stays. A record left out before it had a
    text counts in `train`.
    """
    repeated = _repeats(folder, [about["documents"] for about in abouts]) if deduplicate else None
    totals = {split: Counter(documents=0, tokens=0, bytes=0, characters=0) for split in SPLITS}
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    cutters = {split: _Cutter(split, shard_tokens) for split in SPLITS}
    first = 0
    befores = lines_before(units, abouts)
    for part, (unit, about, before) in enumerate(zip(units, abouts, befores, strict=True)):
        records = part_array(folder, part, ".records", dtype=RECORD)
        left_out[unit.split or TRAIN].update(about["left_out"])
        held = _held_out(records, unit, holdout_fraction)
        lengths = records["tokens"]
        reasons = {
            "repeated": np.zeros(len(records), bool) if repeated is None else repeated[first : first + len(records)],
            "too_short": lengths < min_tokens,
            "too_long": lengths > (max_tokens or np.iinfo(np.int64).max),
        }
        keep = np.where(held, KEEP[VALIDATION], KEEP[TRAIN]).astype(np.uint8)
        for reason, rows in reasons.items():
            for split in SPLITS:
                if number := int((rows & (keep == KEEP[split])).sum()):
                    left_out[split][reason] += number
            keep[rows] = 0
        part_path(folder, part, ".keep").write_bytes(keep.tobytes())
        span_of = _span_of(part, unit, np.cumsum(lengths) - lengths, before)
        for split in SPLITS:
            rows = np.flatnonzero(keep == KEEP[split])
            kept = records[rows]
            cutters[split].add(rows, kept["tokens"] + marks, span_of)
            totals[split].update(
                documents=len(rows),
                tokens=int(kept["tokens"].sum()) + marks * len(rows),
                bytes=int(kept["bytes"].sum()),
                characters=int(kept["characters"].sum()),
            )
        first += len(records)
    shards = [shard for split in SPLITS for shard in cutters[split].finished()]
    split_files = {unit.split for unit in units}
    splits = tuple(split for split in SPLITS if split == TRAIN or split in split_files or totals[split]["documents"])
    return Selection(splits, tuple(shards), totals, left_out)


def lines_before(units: Sequence[Unit], abouts: Sequence[dict[str, Any]]) -> list[int]:
    """Of each unit of records, the lines (rows) of its file in the units before it."""
    befores, lines = [], 0
    for number, (unit, about) in enumerate(zip(units, abouts, strict=True)):
        if number and unit.files != units[number - 1].files:
            lines = 0
        befores.append(lines)
        lines += about["lines"]
    return befores


def _held_out(records: np.ndarray, unit: Unit, holdout_fraction: float) -> np.ndarray:
    """(documents,) bool. A record goes by its text: the same side however the input is cut into files."""
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
        order = np.lexsort((digests[rows, 1], digests[rows, 0]))  # stable: equal ones stay in order
        ordered = digests[rows][order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        repeated[rows[order[1:][same]]] = True
    return repeated


def _by_first_byte(digests: np.ndarray) -> Iterable[np.ndarray]:
    """Rows that can repeat each other, in one group where there are few: sorting takes memory."""
    if len(digests) <= _DOCUMENTS_SORTED_AT_ONCE:
        return [np.arange(len(digests))]
    first = digests.view(np.uint8)[:, 0].copy()
    return (np.flatnonzero(first == byte) for byte in range(256))


def _span_of(part: int, unit: Unit, firsts: np.ndarray, before: int) -> Callable[[int, int], Span]:
    names = tuple(document.name for document in unit.files)

    def span(begin: int, end: int) -> Span:
        return Span(part, begin, end, int(firsts[begin]), names, before if unit.split is None else None)

    return span


@dataclass
class _Cutter:
    """Cuts the documents of a split, as they come, into shards of at most `shard_tokens`, or one longer document."""

    split: str
    shard_tokens: int
    shards: list[PlannedShard] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    tokens: int = 0  # held in `spans`
    documents: int = 0
    first: int = 0

    def add(self, rows: np.ndarray, lengths: np.ndarray, span_of: Callable[[int, int], Span]) -> None:
        """rows: (n,) documents of a part; lengths: (n,) their tokens."""
        ends = np.cumsum(lengths)
        at = 0
        while at < len(rows):
            used = int(ends[at - 1]) if at else 0
            fit = max(int(np.searchsorted(ends, used + self.shard_tokens - self.tokens, side="right")), at)
            if fit == at and not self.spans:
                fit = at + 1
            if fit > at:
                self.spans.append(span_of(int(rows[at]), int(rows[fit - 1]) + 1))
                self.tokens += int(ends[fit - 1]) - used
                self.documents += fit - at
            if fit < len(rows):
                self._close()
            at = fit

    def finished(self) -> list[PlannedShard]:
        if self.spans:
            self._close()
        return self.shards

    def _close(self) -> None:
        self.shards.append(PlannedShard(self.split, len(self.shards), self.first, tuple(self.spans)))
        self.first += self.documents
        self.spans, self.tokens, self.documents = [], 0, 0
