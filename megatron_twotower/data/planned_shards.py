"""Writes the shards of a prepared folder from parts, as `selection` has planned them.

What the index needs to know of a written shard is kept until all of them are written:

    shards/train-00002.json     its row of the index, written last
    shards/train-00002.arrays   (2, documents) int64: offsets and lengths of its documents; of
                                conversations (3, documents), with the offsets of their masks
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_twotower.common import workers
from megatron_twotower.common.files import atomic_file, write_file
from megatron_twotower.data import remote
from megatron_twotower.data.parts import KEEP, RECORD, part_array
from megatron_twotower.data.repeats import group_path
from megatron_twotower.data.shards import Sample, Shard, ShardArrays, write_shard


@dataclass(frozen=True)
class PartRange:
    """Documents `begin` to `end` of a part. Those that `selection` gives to the split are meant.

    Attributes:
        group: The group that they are in.
        place: The place in the group of document `begin`.
        first_id: The place in `.ids` of the first id of document `begin`.
        names: The names of all files of a unit of text files, or the name of one file of records.
        lines_before: Lines of the file of records in earlier units; None for text files.
    """

    part: int
    begin: int
    end: int
    group: int
    place: int
    first_id: int
    names: tuple[str, ...]
    lines_before: int | None


@dataclass(frozen=True)
class PlannedShard:
    """The content of a shard of a split.

    Attributes:
        first: The number of its first document within the split.
    """

    split: str
    number: int
    first: int
    ranges: tuple[PartRange, ...]


@dataclass(frozen=True)
class ShardTask:
    """A shard to write from parts.

    Attributes:
        bos, eos: The id to add to each document, or None.
        conversations: Whether the parts say what is scored.
        url: The URL of the folder of the split, to which the shard is moved; None to leave it.
    """

    shard: PlannedShard
    folder: Path
    dtype: str
    bos: int | None
    eos: int | None
    conversations: bool = False
    url: str | None = None

    @property
    def base(self) -> Path:
        """The path of the shard's files for the index, without a suffix."""
        return self.folder / "shards" / f"{self.shard.split}-{self.shard.number:05d}"


def write_planned_shard(task: ShardTask) -> Shard:
    """Write a shard, and what the index needs to know of it.

    The ids of one document are in memory at a time.
    """
    file = f"shard-{task.shard.number:05d}.tar"
    target = task.folder / "data" / task.shard.split / file
    with atomic_file(target) as path:
        sha256, arrays = write_shard(path, _samples(task), first=task.shard.first)
        size = path.stat().st_size
    if task.url is not None:
        remote.put(target, f"{task.url}/{file}")
        target.unlink()
    rows = [row for row in arrays if row is not None]
    write_file(task.base.with_suffix(".arrays"), np.stack(rows).tobytes())
    shard = Shard(file, size, sha256, len(arrays.lengths), int(arrays.lengths.sum()))
    write_file(task.base.with_suffix(".json"), json.dumps(shard._asdict()))
    return shard


def read_planned_shard(task: ShardTask) -> Shard | None:
    """What `write_planned_shard` returned, or None if the shard is not written."""
    try:
        return Shard(**json.loads(task.base.with_suffix(".json").read_bytes()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def shard_arrays(task: ShardTask) -> ShardArrays:
    """What `write_planned_shard` has found out about the documents of a shard."""
    rows = 3 if task.conversations else 2
    return ShardArrays(*np.fromfile(task.base.with_suffix(".arrays"), dtype=np.int64).reshape(rows, -1))


def _samples(task: ShardTask) -> Iterator[Sample]:
    dtype = np.dtype(task.dtype)
    bos, eos = (np.array([] if one is None else [one], dtype=dtype) for one in (task.bos, task.eos))
    for source in task.shard.ranges:
        records = part_array(task.folder, source.part, ".records", dtype=RECORD)[source.begin : source.end]
        count = source.end - source.begin
        keep = np.fromfile(
            group_path(task.folder, source.group, ".kept"), dtype=np.uint8, count=count, offset=source.place
        )
        ids = part_array(task.folder, source.part, ".ids", dtype=dtype)
        scored = part_array(task.folder, source.part, ".scored", dtype=np.dtype(bool)) if task.conversations else None
        firsts = source.first_id + np.cumsum(records["tokens"]) - records["tokens"]
        for row in np.flatnonzero(keep == KEEP[task.shard.split]).tolist():
            first, place = int(firsts[row]), int(records["place"][row])
            last = first + int(records["tokens"][row])
            tokens = np.concatenate([bos, ids[first:last], eos])
            before = source.lines_before
            name = source.names[place] if before is None else f"{source.names[0]}:{before + place + 1}"
            yield Sample(name, int(records["bytes"][row]), tokens, None if scored is None else scored[first:last])
            workers.count(1, 0, len(tokens))
