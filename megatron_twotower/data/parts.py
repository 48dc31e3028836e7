"""The two kinds of work that `prepare` hands to worker processes: a unit of text to a part, parts to a shard.

A part is a unit tokenised, kept until its documents stand in shards:

    parts/000007.ids       the ids of its documents, one after another, nothing added
    parts/000007.records   one `RECORD` per document
    parts/000007.json      its counts, written last: a part is there in full or not at all
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common.files import atomic_file
from megatron_twotower.data import workers
from megatron_twotower.data.documents import TRAIN, VALIDATION, Fault, Unit, read_unit
from megatron_twotower.data.shards import Sample, Shard, write_shard
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder

# digest: of the text; place: line, row or file within the unit; bytes, characters: of the text.
RECORD = np.dtype([("digest", "<u8", 2), ("place", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("characters", "<i8")])
KEEP = {TRAIN: 1, VALIDATION: 2}  # what a `.keep` file says of each document of a part; 0: left out
FIRST_FAULTS = 10  # malformed records that a part names

_BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at a time: enough for all its threads, little to hold


@dataclass(frozen=True)
class UnitTask:
    """A unit to tokenise into parts/NUMBER.*"""

    number: int
    unit: Unit
    folder: Path
    tokenizer: Path
    tokenizer_fingerprint: str
    text_field: str
    dtype: str


@dataclass(frozen=True)
class Span:
    """Documents `begin` to `end` of part `part`, those that `.keep` gives to the split.

    first_id: place in `.ids` of the first id of document `begin`.
    names: of the files of a unit of text; or the name of one file of records and how many lines it
    has before the unit.
    """

    part: int
    begin: int
    end: int
    first_id: int
    names: tuple[str, ...]
    lines_before: int | None


@dataclass(frozen=True)
class PlannedShard:
    """What goes into a shard of a split. first: number of its first document."""

    split: str
    number: int
    first: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ShardTask:
    """A shard to write from parts. bos, eos: ids to add to each document, or None."""

    shard: PlannedShard
    folder: Path
    dtype: str
    bos: int | None
    eos: int | None

    @property
    def base(self) -> Path:
        return self.folder / "shards" / f"{self.shard.split}-{self.shard.number:05d}"


# --- a unit to a part ---------------------------------------------------------------------------------------------


def write_part(task: UnitTask) -> dict[str, Any]:
    """Tokenise a unit; return what its .json holds. Holds a megabyte of text (or one longer text) and its ids."""
    base = part_path(task.folder, task.number, "")
    with (
        atomic_file(base.with_suffix(".ids")) as ids_path,
        atomic_file(base.with_suffix(".records")) as records_path,
        open(ids_path, "wb") as ids,
        open(records_path, "wb") as records,
    ):
        about = _encode_unit(task, write_ids=ids.write, write_records=records.write)
    with atomic_file(base.with_suffix(".json")) as path:
        path.write_text(json.dumps(about))
    return about


def read_part(folder: Path, number: int) -> dict[str, Any] | None:
    """What write_part returned, where the part is there in full; the ids may be gone once shards are being written."""
    try:
        return json.loads(part_path(folder, number, ".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def part_path(folder: Path, number: int, suffix: str) -> Path:
    return folder / "parts" / f"{number:06d}{suffix}"


def part_array(folder: Path, number: int, suffix: str, *, dtype: np.dtype) -> np.ndarray:
    """A file of a part as a memory map: (documents,) RECORD of `.records`, uint8 of `.keep`; (tokens,) of `.ids`."""
    path = part_path(folder, number, suffix)
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)


def _encode_unit(
    task: UnitTask, *, write_ids: Callable[[Any], Any], write_records: Callable[[Any], Any]
) -> dict[str, Any]:
    encode = _encoder(task.tokenizer, task.tokenizer_fingerprint)
    reader = _Reader(task)
    totals = Counter(documents=0, tokens=0)
    for batch in reader.batches():
        texts = [text for _, text in batch]
        encoded = encode(texts)
        records = np.zeros(len(batch), dtype=RECORD)
        for row, ((place, text), ids) in enumerate(zip(batch, encoded, strict=True)):
            written = text.encode()
            digest = np.frombuffer(hashlib.sha256(written).digest()[:16], dtype=">u8")
            records[row] = (digest, place, len(ids), len(written), len(text))
        flat = np.fromiter(chain.from_iterable(encoded), dtype=task.dtype, count=sum(map(len, encoded)))
        write_ids(flat.data)
        write_records(records.tobytes())
        totals.update(documents=len(batch), tokens=len(flat))
        workers.count(len(batch), reader.take_bytes(), len(flat))
    workers.count(0, reader.take_bytes(), 0)
    return {**totals, "lines": reader.lines, "left_out": dict(reader.left_out), "faults": reader.faults}


class _Reader:
    """The texts of a unit in batches, and counts of what it read by the way.

    lines: of a unit of records. left_out: by reason. faults: (line within the unit, reason), the
    first ones.
    """

    def __init__(self, task: UnitTask) -> None:
        self.task = task
        self.lines = 0
        self.left_out: Counter[str] = Counter()
        self.faults: list[tuple[int, str]] = []
        self._bytes = 0

    def batches(self) -> Iterator[list[tuple[int, str]]]:
        batch: list[tuple[int, str]] = []
        size = 0
        for place, text in read_unit(self.task.unit, text_field=self.task.text_field, advance=self._advance):
            self.lines = place + 1
            if text is None:
                continue
            if isinstance(text, Fault):
                self.left_out["malformed" if text.malformed else text.reason] += 1
                if text.malformed and len(self.faults) < FIRST_FAULTS:
                    self.faults.append((place, text.reason))
            elif not text:
                self.left_out["empty"] += 1
            else:
                batch.append((place, text))
                size += len(text)
                if size >= _BATCH_CHARACTERS:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _advance(self, count: int) -> None:
        self._bytes += count

    def take_bytes(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, fingerprint: str) -> Callable[[Sequence[str]], list[list[int]]]:
    """One per process. fingerprint: so that another tokenizer in the same folder is another one."""
    return text_encoder(load_tokenizer(tokenizer))


# --- parts to a shard ---------------------------------------------------------------------------------------------


def write_planned_shard(task: ShardTask) -> Shard:
    """Write a shard, and beside the parts what the index will hold of it; holds one document's ids at a time."""
    file = f"shard-{task.shard.number:05d}.tar"
    with atomic_file(task.folder / "data" / task.shard.split / file) as path:
        sha256, offsets, lengths = write_shard(path, _samples(task), first=task.shard.first)
        size = path.stat().st_size
    with atomic_file(task.base.with_suffix(".arrays")) as path:
        path.write_bytes(np.stack([offsets, lengths]).tobytes())
    shard = Shard(file, size, sha256, len(lengths), int(lengths.sum()))
    with atomic_file(task.base.with_suffix(".json")) as path:
        path.write_text(json.dumps(shard._asdict()))
    return shard


def read_planned_shard(task: ShardTask) -> Shard | None:
    """What write_planned_shard returned, where that was done."""
    try:
        return Shard(**json.loads(task.base.with_suffix(".json").read_bytes()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def shard_arrays(task: ShardTask) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of the documents of a written shard, (documents,) int64 each."""
    offsets, lengths = np.fromfile(task.base.with_suffix(".arrays"), dtype=np.int64).reshape(2, -1)
    return offsets, lengths


def _samples(task: ShardTask) -> Iterator[Sample]:
    dtype = np.dtype(task.dtype)
    begin, end = (np.array([] if one is None else [one], dtype=dtype) for one in (task.bos, task.eos))
    for span in task.shard.spans:
        records = part_array(task.folder, span.part, ".records", dtype=RECORD)[span.begin : span.end]
        keep = part_array(task.folder, span.part, ".keep", dtype=np.dtype(np.uint8))[span.begin : span.end]
        ids = part_array(task.folder, span.part, ".ids", dtype=dtype)
        firsts = span.first_id + np.cumsum(records["tokens"]) - records["tokens"]
        for row in np.flatnonzero(keep == KEEP[task.shard.split]).tolist():
            first, place = int(firsts[row]), int(records["place"][row])
            tokens = np.concatenate([begin, ids[first : first + int(records["tokens"][row])], end])
            lines_before = span.lines_before
            name = span.names[place] if lines_before is None else f"{span.names[0]}:{lines_before + place + 1}"
            yield Sample(name, int(records["bytes"][row]), tokens)
            workers.count(1, 0, len(tokens))
