"""Tokenises a unit of input into a part: files that keep its documents until shards are written.

parts/000007.ids       the ids of its documents, one after another, nothing added
parts/000007.records   one `RECORD` per document
parts/000007.json      its counts, written last: a part is complete or absent
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

from megatron_twotower.common import workers
from megatron_twotower.common.files import atomic_file, write_file
from megatron_twotower.data.documents import TRAIN, VALIDATION, Unit, read_unit
from megatron_twotower.data.record_formats import Fault
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder

# digest: the first 16 bytes of the SHA-256 of the text; place: index of the line, row or file
# within the unit; bytes, characters: the size of the text.
RECORD = np.dtype([("digest", "<u8", 2), ("place", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("characters", "<i8")])
KEEP = {TRAIN: 1, VALIDATION: 2}  # the splits, in the files of `selection`
FIRST_FAULTS = 10  # malformed records that are named

_BATCH_CHARACTERS = 1 << 20  # text that the tokenizer gets at a time: enough for all its threads


@dataclass(frozen=True)
class UnitTask:
    """A unit to tokenise into part `number`."""

    number: int
    unit: Unit
    folder: Path
    tokenizer: Path
    tokenizer_fingerprint: str
    text_field: str
    dtype: str


def write_part(task: UnitTask) -> dict[str, Any]:
    """Tokenise a unit and write its part.

    A megabyte of text (or one longer text) and its ids are in memory at a time.

    Returns:
        The counts, which are also the content of the .json file: documents; tokens; lines (rows,
        files); left_out, by reason; and faults, (line within the unit, reason) of the first
        malformed records.
    """
    base = part_path(task.folder, task.number, "")
    with (
        atomic_file(base.with_suffix(".ids")) as ids_path,
        atomic_file(base.with_suffix(".records")) as records_path,
        open(ids_path, "wb") as ids,
        open(records_path, "wb") as records,
    ):
        counts = _encode_unit(task, write_ids=ids.write, write_records=records.write)
    write_file(base.with_suffix(".json"), json.dumps(counts))
    return counts


def read_part(folder: Path, number: int) -> dict[str, Any] | None:
    """What `write_part` returned, or None if the part is absent.

    The ids of a part that exists may have been removed, once its shards are written.
    """
    try:
        return json.loads(part_path(folder, number, ".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def part_path(folder: Path, number: int, suffix: str) -> Path:
    """The path of a file of a part."""
    return folder / "parts" / f"{number:06d}{suffix}"


def part_array(folder: Path, number: int, suffix: str, *, dtype: np.dtype) -> np.ndarray:
    """A file of a part as a memory map.

    Returns:
        (documents,) RECORD of `.records`, or (tokens,) of `.ids`.
    """
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
            utf8 = text.encode()
            digest = np.frombuffer(hashlib.sha256(utf8).digest()[:16], dtype=">u8")
            records[row] = (digest, place, len(ids), len(utf8), len(text))
        flat = np.fromiter(chain.from_iterable(encoded), dtype=task.dtype, count=sum(map(len, encoded)))
        write_ids(flat.data)
        write_records(records.tobytes())
        totals.update(documents=len(batch), tokens=len(flat))
        workers.count(len(batch), reader.take_bytes(), len(flat))
    workers.count(0, reader.take_bytes(), 0)
    return {**totals, "lines": reader.lines, "left_out": dict(reader.left_out), "faults": reader.faults}


class _Reader:
    """The texts of a unit in batches, and counts of what was read.

    Attributes:
        lines: Lines, rows or files read.
        left_out: Texts left out, by reason.
        faults: (line within the unit, reason) of the first malformed records.
    """

    def __init__(self, task: UnitTask) -> None:
        self.task = task
        self.lines = 0
        self.left_out: Counter[str] = Counter()
        self.faults: list[tuple[int, str]] = []
        self._bytes = 0

    def batches(self) -> Iterator[list[tuple[int, str]]]:
        """Yields lists of (place within the unit, text)."""
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
        """The number of bytes of input read since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, fingerprint: str) -> Callable[[Sequence[str]], list[list[int]]]:
    """The encoder of this process.

    Args:
        fingerprint: Part of the cache key, because a folder may get another tokenizer.
    """
    return text_encoder(load_tokenizer(tokenizer))
