"""Finds repeated texts in all parts of a corpus, however many, with any number of workers.

The documents of all parts, in order, are cut into groups of some million. Digests are partitioned
into buckets by their first bits, so that equal ones meet in one bucket:

1. `split_group` sorts the digests of a group by bucket, and writes them.
2. `find_repeats` reads one bucket of all groups, in order, and marks every digest that an earlier
   document has.
3. `read_repeats` gives a group its marks back.

Each step holds a group or a bucket, about `DOCUMENTS_AT_ONCE` documents. Files in OUTPUT.partial,
each complete or absent:

    selection/group-00000.digests   the digests of a group by bucket; in a bucket, in their order
    selection/group-00000.json      how many there are in each bucket
    selection/bucket-00000.marks    a byte for each digest of a bucket: 1 if an earlier one is equal
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_twotower.common import workers
from megatron_twotower.common.files import write_file
from megatron_twotower.data.parts import RECORD, part_array

# A task needs about 70 bytes for each document.
DOCUMENTS_AT_ONCE = 1 << 21


class Piece(NamedTuple):
    """Documents `begin` to `end` of a part."""

    part: int
    begin: int
    end: int


@dataclass(frozen=True)
class Group:
    """Consecutive documents that are decided together: pieces of one part or of several."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def documents(self) -> int:
        """The number of documents."""
        return sum(piece.end - piece.begin for piece in self.pieces)


def cut_groups(counts: Sequence[int]) -> list[Group]:
    """The groups of all documents, of `DOCUMENTS_AT_ONCE` each, and of fewer in the last one.

    A part without documents has an empty piece.

    Args:
        counts: Documents of each part.
    """
    groups: list[Group] = []
    pieces: list[Piece] = []
    room = DOCUMENTS_AT_ONCE
    for part, count in enumerate(counts):
        begin = 0
        while begin < count or not count:
            end = min(begin + room, count)
            pieces.append(Piece(part, begin, end))
            room -= end - begin
            begin = end
            if not room:
                groups.append(Group(len(groups), tuple(pieces)))
                pieces, room = [], DOCUMENTS_AT_ONCE
            if not count:
                break
    if pieces:
        groups.append(Group(len(groups), tuple(pieces)))
    return groups


def bucket_count(documents: int) -> int:
    """The number of buckets, each of about `DOCUMENTS_AT_ONCE` documents; at most 2^16."""
    return min(max(-(-documents // DOCUMENTS_AT_ONCE), 1), 1 << 16)


def group_records(folder: Path, group: Group, names: Sequence[str]) -> np.ndarray:
    """(documents,) the fields `names` of the records of a group."""
    fields = np.dtype([(name, RECORD[name]) for name in names])
    records, at = np.empty(group.documents, dtype=fields), 0
    for part, begin, end in group.pieces:
        found = part_array(folder, part, ".records", dtype=RECORD)[begin:end]
        for name in names:
            records[name][at : at + end - begin] = found[name]
        at += end - begin
    return records


# --- the first step ---


@dataclass(frozen=True)
class SplitTask:
    """A group to split into buckets."""

    folder: Path
    group: Group
    buckets: int


def split_group(task: SplitTask) -> list[int]:
    """Write the digests of a group by bucket. Returns how many there are in each bucket."""
    result = group_path(task.folder, task.group.number, ".json")
    if result.is_file():  # of an interrupted run
        return list(json.loads(result.read_bytes()))
    digests = group_records(task.folder, task.group, ["digest"])["digest"]
    bucket = _buckets_of(digests, task.buckets)
    # uint16 keys: a radix sort; stable: the order within a bucket stays.
    write_file(group_path(task.folder, task.group.number, ".digests"), digests[_by_bucket(bucket)].tobytes())
    counts = np.bincount(bucket, minlength=task.buckets).tolist()
    write_file(result, json.dumps(counts))
    workers.count(len(digests), 0, 0)
    return list(counts)


def _buckets_of(digests: np.ndarray, buckets: int) -> np.ndarray:
    """(documents,) uint16. SHA-256 fills all buckets equally."""
    return ((digests[:, 0] >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint16)


def _by_bucket(bucket: np.ndarray) -> np.ndarray:
    return np.argsort(bucket, kind="stable")


def group_path(folder: Path, number: int, suffix: str) -> Path:
    """The path of a file of a group."""
    return folder / "selection" / f"group-{number:05d}{suffix}"


# --- the second step ---


@dataclass(frozen=True)
class BucketTask:
    """A bucket to find repeats in.

    Attributes:
        begins, counts: (groups,) int64, where the bucket is in the digests of each group.
    """

    folder: Path
    bucket: int
    begins: np.ndarray
    counts: np.ndarray


def find_repeats(task: BucketTask) -> None:
    """Mark every digest of a bucket that an earlier document has too."""
    result = _bucket_path(task.folder, task.bucket)
    if result.is_file():  # of an interrupted run
        return
    digests, at = np.empty((int(task.counts.sum()), 2), dtype=np.uint64), 0
    for group, (begin, count) in enumerate(zip(task.begins.tolist(), task.counts.tolist(), strict=True)):
        path = group_path(task.folder, group, ".digests")
        digests[at : at + count] = np.fromfile(
            path, dtype=np.uint64, count=2 * count, offset=begin * 2 * digests.itemsize
        ).reshape(-1, 2)
        at += count
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests keep their order
    ordered = digests[order]
    same = (ordered[1:] == ordered[:-1]).all(axis=1)
    repeated = np.zeros(len(digests), dtype=bool)
    repeated[order[1:][same]] = True
    write_file(result, repeated.tobytes())
    workers.count(len(digests), 0, 0)


def bucket_tasks(folder: Path, counts: Sequence[Sequence[int]]) -> list[BucketTask]:
    """The second step for all buckets.

    Args:
        counts: What `split_group` returned, by group.
    """
    table = np.array(counts, dtype=np.int64)
    begins = np.cumsum(table, axis=1) - table
    return [BucketTask(folder, bucket, begins[:, bucket], table[:, bucket]) for bucket in range(table.shape[1])]


def _bucket_path(folder: Path, bucket: int) -> Path:
    return folder / "selection" / f"bucket-{bucket:05d}.marks"


# --- the third step ---


@dataclass(frozen=True)
class Marks:
    """Where the marks of a group are.

    Attributes:
        begins, counts: (buckets,) int64, where they are in each bucket.
    """

    begins: np.ndarray
    counts: np.ndarray


def marks_of_groups(counts: Sequence[Sequence[int]]) -> list[Marks]:
    """Where the marks of every group are.

    Args:
        counts: What `split_group` returned, by group.
    """
    table = np.array(counts, dtype=np.int64)
    begins = np.cumsum(table, axis=0) - table
    return [Marks(begin, count) for begin, count in zip(begins, table, strict=True)]


def read_repeats(folder: Path, digests: np.ndarray, marks: Marks) -> np.ndarray:
    """(documents,) bool of a group: whether an earlier document has the same digest.

    Args:
        digests: (documents, 2) those of the group, in order.
    """
    found = [
        np.fromfile(_bucket_path(folder, bucket), dtype=bool, count=count, offset=begin)
        for bucket, (begin, count) in enumerate(zip(marks.begins.tolist(), marks.counts.tolist(), strict=True))
    ]
    repeated = np.empty(len(digests), dtype=bool)
    repeated[_by_bucket(_buckets_of(digests, len(marks.counts)))] = np.concatenate(found)
    return repeated
