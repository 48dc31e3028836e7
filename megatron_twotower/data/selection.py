"""Decides which documents of all parts stay, in which split and shard. Reads records, not ids.

Every step but the last is done by any number of workers, group by group (`repeats`):

    selection/group-00000.kept      a byte for each document: its split as in `KEEP`, or 0
    selection/group-00000.tokens    (documents,) int64, the tokens of each document
    selection/group-00000.decided   the totals of the group, as JSON, written last

The last step cuts the documents that stay into shards, in this process and in their order. It holds
one group at a time, and the table of the shards.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common import workers
from megatron_twotower.common.files import write_file
from megatron_twotower.common.workers import Engine, OnCount
from megatron_twotower.data.documents import TRAIN, VALIDATION, Unit
from megatron_twotower.data.parts import KEEP
from megatron_twotower.data.planned_shards import PartRange, PlannedShard
from megatron_twotower.data.repeats import (
    Group,
    Marks,
    SplitTask,
    bucket_count,
    bucket_tasks,
    cut_groups,
    find_repeats,
    group_path,
    group_records,
    marks_of_groups,
    read_repeats,
    split_group,
)

SPLITS = (VALIDATION, TRAIN)
PASSES = 3  # how often every document is counted to workers


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


@dataclass(frozen=True)
class Rules:
    """What decides on a document.

    Attributes:
        holdout_fraction: The share of held-out records, by their text.
        deduplicate: Whether a repeated text is left out.
        min_tokens, max_tokens: Limits of the length of the text alone.
    """

    holdout_fraction: float
    deduplicate: bool
    min_tokens: int
    max_tokens: int | None


def select(
    folder: Path,
    units: Sequence[Unit],
    part_counts: Sequence[dict[str, Any]],
    *,
    rules: Rules,
    shard_tokens: int,
    added_ids: int,
    engine: Engine,
    on_count: OnCount = lambda amounts: None,
) -> Selection:
    """Decide over the parts of `units`, and write what was decided.

    Of a repeated text, the first copy stays. A record that was left out before its text was known
    counts as left out of `train`.

    Args:
        part_counts: What `write_part` returned, by unit.
        shard_tokens: Limit of a shard, where each document has `added_ids` more ids (BOS, EOS).
        engine: Does the work.
        on_count: Receives (documents, 0, 0); every document is counted `PASSES` times.
    """
    (folder / "selection").mkdir(exist_ok=True)
    groups = cut_groups([counts["documents"] for counts in part_counts])
    done = 0

    def count(amounts: Sequence[int]) -> None:
        on_count([done + amounts[0], 0, 0])

    documents = sum(counts["documents"] for counts in part_counts)
    marks: Sequence[Marks | None] = [None] * len(groups)
    if rules.deduplicate and groups:
        tasks = (SplitTask(folder, group, bucket_count(documents)) for group in groups)
        counts = {task.group.number: found for task, found in engine(split_group, tasks, on_count=count)}
        in_buckets = [counts[group.number] for group in groups]
        done += documents
        for _ in engine(find_repeats, bucket_tasks(folder, in_buckets), on_count=count):
            pass
        marks = marks_of_groups(in_buckets)
    done = 2 * documents
    splits_of = [unit.split for unit in units]
    decisions = (
        DecisionTask(folder, group, marks[group.number], tuple(splits_of[piece.part] for piece in group.pieces), rules)
        for group in groups
    )
    totals = {split: Counter(documents=0, tokens=0, bytes=0, characters=0) for split in SPLITS}
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for unit, each in zip(units, part_counts, strict=True):
        left_out[unit.split or TRAIN].update(each["left_out"])
    for _, found in engine(decide_group, decisions, on_count=count):
        for split in SPLITS:
            totals[split].update(found["totals"][split])
            left_out[split].update(found["left_out"][split])
    for split in SPLITS:
        totals[split]["tokens"] += added_ids * totals[split]["documents"]
    shards = _cut_shards(folder, units, part_counts, groups, shard_tokens=shard_tokens, added_ids=added_ids)
    split_files = {unit.split for unit in units}
    splits = tuple(split for split in SPLITS if split == TRAIN or split in split_files or totals[split]["documents"])
    return Selection(splits, tuple(shards), totals, left_out)


# --- deciding ---


@dataclass(frozen=True)
class DecisionTask:
    """A group to decide on.

    Attributes:
        marks: Where its repeats are marked; None to keep repeated texts.
        splits: The split of the unit of each piece; None for records.
    """

    folder: Path
    group: Group
    marks: Marks | None
    splits: tuple[str | None, ...]
    rules: Rules


def decide_group(task: DecisionTask) -> dict[str, Any]:
    """Decide on the documents of a group and write its files.

    Returns:
        The content of .decided: by split, the totals of what stays (documents, tokens, bytes,
        characters), and the numbers of texts left out by reason.
    """
    result = group_path(task.folder, task.group.number, ".decided")
    if result.is_file():  # of an interrupted run
        return dict(json.loads(result.read_bytes()))
    records = group_records(task.folder, task.group, ["digest", "tokens", "bytes", "characters"])
    digests, lengths = records["digest"], records["tokens"]
    repeated = None if task.marks is None else read_repeats(task.folder, digests, task.marks)
    reasons = {
        "repeated": np.zeros(len(records), bool) if repeated is None else repeated,
        "too_short": lengths < task.rules.min_tokens,
        "too_long": lengths > (task.rules.max_tokens or np.iinfo(np.int64).max),
    }
    keep = np.where(_held_out(digests, task), KEEP[VALIDATION], KEEP[TRAIN]).astype(np.uint8)
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for reason, rows in reasons.items():
        for split in SPLITS:
            if number := int((rows & (keep == KEEP[split])).sum()):
                left_out[split][reason] += number
        keep[rows] = 0
    totals = {}
    for split in SPLITS:
        kept = keep == KEEP[split]
        sums = {name: int(records[name][kept].sum()) for name in ("tokens", "bytes", "characters")}
        totals[split] = {"documents": int(kept.sum()), **sums}
    found = {"totals": totals, "left_out": left_out}
    write_file(group_path(task.folder, task.group.number, ".kept"), keep.tobytes())
    write_file(group_path(task.folder, task.group.number, ".tokens"), lengths.tobytes())
    write_file(result, json.dumps(found))
    workers.count(len(records), 0, 0)
    return found


def _held_out(digests: np.ndarray, task: DecisionTask) -> np.ndarray:
    """(documents,) bool. The text of a record decides, however the input is cut into files."""
    held, at = digests[:, 0] < np.uint64(task.rules.holdout_fraction * 2.0**64), 0
    for piece, split in zip(task.group.pieces, task.splits, strict=True):
        count = piece.end - piece.begin
        if split is not None:
            held[at : at + count] = split == VALIDATION
        at += count
    return held


# --- cutting into shards ---


def lines_before(units: Sequence[Unit], part_counts: Sequence[dict[str, Any]]) -> list[int]:
    """For each unit of records, the number of lines (rows) of its file in earlier units."""
    befores, lines = [], 0
    for number, (unit, counts) in enumerate(zip(units, part_counts, strict=True)):
        if number and unit.files != units[number - 1].files:
            lines = 0
        befores.append(lines)
        lines += counts["lines"]
    return befores


def _cut_shards(
    folder: Path,
    units: Sequence[Unit],
    part_counts: Sequence[dict[str, Any]],
    groups: Sequence[Group],
    *,
    shard_tokens: int,
    added_ids: int,
) -> list[PlannedShard]:
    cutters = {split: _Cutter(split, shard_tokens) for split in SPLITS}
    befores = lines_before(units, part_counts)
    names = _Names()
    first_id = 0
    for group in groups:
        keep = np.fromfile(group_path(folder, group.number, ".kept"), dtype=np.uint8)
        tokens = np.fromfile(group_path(folder, group.number, ".tokens"), dtype=np.int64)
        at = 0
        for part, begin, end in group.pieces:
            own, lengths = keep[at : at + end - begin], tokens[at : at + end - begin]
            if begin == 0:
                first_id = 0
            unit = units[part]
            lines = befores[part] if unit.split is None else None
            # The places in .ids of the first ids of the documents of this piece, and of the next.
            first_ids = first_id + np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            range_of = functools.partial(_range_of, part, begin, group.number, at, first_ids, names.of(unit), lines)
            for split in SPLITS:
                rows = np.flatnonzero(own == KEEP[split])
                cutters[split].add(rows, lengths[rows] + added_ids, range_of)
            first_id = int(first_ids[-1])
            at += end - begin
    return [shard for split in SPLITS for shard in cutters[split].finished()]


class _Names:
    """The names of a unit's files; consecutive units of one file share one tuple."""

    def __init__(self) -> None:
        self._last: tuple[str, ...] = ()

    def of(self, unit: Unit) -> tuple[str, ...]:
        """The names."""
        found = tuple(document.name for document in unit.files)
        if found != self._last:
            self._last = found
        return self._last


def _range_of(
    part: int,
    first_row: int,
    group: int,
    place: int,
    first_ids: np.ndarray,
    names: tuple[str, ...],
    lines_before: int | None,
    begin: int,
    end: int,
) -> PartRange:
    """Rows `begin` to `end` of a piece.

    Args:
        first_row, place: Where the piece begins in its part and in its group.
    """
    return PartRange(
        part=part,
        begin=first_row + begin,
        end=first_row + end,
        group=group,
        place=place + begin,
        first_id=int(first_ids[begin]),
        names=names,
        lines_before=lines_before,
    )


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
        """Add documents of a piece.

        Args:
            rows: (n,) their rows in the piece.
            lengths: (n,) their tokens.
            range_of: Makes the `PartRange` of rows begin to end of the piece.
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
