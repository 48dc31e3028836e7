"""Tokenises a unit of input into a part: files that keep its documents until shards are written.

parts/000007.ids       the ids of its documents, one after another, nothing added
parts/000007.scored    of conversations: one byte per id, 1 where it is scored
parts/000007.records   one `RECORD` per document
parts/000007.json      its counts, written last: a part is complete or absent
"""

import contextlib
import functools
import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_twotower.common import workers
from megatron_twotower.common.files import atomic_file, write_file
from megatron_twotower.data.conversations import (
    FIELDS,
    Conversation,
    Pieces,
    Template,
    conversation_of_record,
    open_template,
    render,
)
from megatron_twotower.data.documents import TRAIN, VALIDATION, Unit, read_records, read_unit
from megatron_twotower.data.record_formats import Fault
from megatron_twotower.data.tokenizer import load_tokenizer, text_encoder

# digest: the first 16 bytes of the SHA-256 of the text; place: index of the line, row or file
# within the unit; bytes, characters: the size of the text.
RECORD = np.dtype([("digest", "<u8", 2), ("place", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("characters", "<i8")])
KEEP = {TRAIN: 1, VALIDATION: 2}  # the splits, in the files of `selection`
FIRST_FAULTS = 10  # malformed records that are named

# Text that the tokenizer gets at a time: enough for all its threads; or, without threads, so little
# that what it returns stays in the caches of the processor.
BATCH_CHARACTERS, ONE_THREAD_CHARACTERS = 1 << 20, 1 << 14


@dataclass(frozen=True)
class UnitTask:
    """A unit to tokenise into part `number`.

    Attributes:
        conversations: Whether its records are conversations.
        chat_template: The template that renders them, in place of that of the tokenizer.
    """

    number: int
    unit: Unit
    folder: Path
    tokenizer: Path
    tokenizer_fingerprint: str
    text_field: str
    dtype: str
    conversations: bool = False
    chat_template: str | None = None


def write_part(task: UnitTask) -> dict[str, Any]:
    """Tokenise a unit and write its part.

    A megabyte of text (or one longer text) and its ids are in memory at a time.

    Returns:
        The counts, which are also the content of the .json file: documents; tokens; lines (rows,
        files); left_out, by reason; faults, (line within the unit, reason) of the first malformed
        records; and turn_ends, the ids that end the scored turns of conversations.
    """
    base = part_path(task.folder, task.number, "")
    with contextlib.ExitStack() as files:
        suffixes = (".ids", ".records", *((".scored",) if task.conversations else ()))
        paths = {suffix: files.enter_context(atomic_file(base.with_suffix(suffix))) for suffix in suffixes}
        streams = {suffix: files.enter_context(open(path, "wb")) for suffix, path in paths.items()}
        counts = _encode_unit(task, {suffix: stream.write for suffix, stream in streams.items()})
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


def remove_ids(folder: Path, number: int) -> None:
    """Remove the ids of a part, and what is scored of them."""
    for suffix in (".ids", ".scored"):
        part_path(folder, number, suffix).unlink(missing_ok=True)


def part_array(folder: Path, number: int, suffix: str, *, dtype: np.dtype) -> np.ndarray:
    """A file of a part, mapped into memory.

    Returns:
        (documents,) RECORD of `.records`, (tokens,) of `.ids`, or (tokens,) bool of `.scored`.
    """
    path = part_path(folder, number, suffix)
    if not path.stat().st_size:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # slices of a `memmap` take ten times as long


def _encode_unit(task: UnitTask, write: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Encode the documents of a unit.

    Args:
        task: The unit.
        write: By suffix, the function that writes to a file of the part.
    """
    key = task.tokenizer, task.tokenizer_fingerprint, task.chat_template
    template = _template(*key) if task.conversations else None
    special = template.special if template else frozenset()
    encode = _encoder(task.tokenizer, task.tokenizer_fingerprint, special)
    reader = _Reader(task, template)
    totals, turn_ends = Counter(documents=0, tokens=0), set[int]()
    for batch in reader.batches():
        texts = [text for _, pieces in batch for text, _ in pieces]
        # Without threads one text at a time: what the tokenizer returns is freed before the next.
        encoded = encode(texts) if _has_threads() else [ids for text in texts for ids in encode([text])]
        scored = [is_scored for _, pieces in batch for _, is_scored in pieces]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        records, at = np.zeros(len(batch), dtype=RECORD), 0
        for row, (place, pieces) in enumerate(batch):
            text, tokens = "".join(text for text, _ in pieces), int(lengths[at : at + len(pieces)].sum())
            utf8, at = text.encode(), at + len(pieces)
            digest = np.frombuffer(hashlib.sha256(utf8).digest()[:16], dtype=">u8")
            records[row] = (digest, place, tokens, len(utf8), len(text))
        write[".ids"](b"".join(_packed(ids, task.dtype) for ids in encoded))
        write[".records"](records.tobytes())
        if template:
            write[".scored"](np.repeat(np.array(scored, dtype=bool), lengths).data)
            turn_ends.update(ids[-1] for ids, is_scored in zip(encoded, scored, strict=True) if is_scored)
        count = int(lengths.sum())
        totals.update(documents=len(batch), tokens=count)
        workers.count(len(batch), reader.take_bytes(), count)
    workers.count(0, reader.take_bytes(), 0)
    counts = {**totals, "lines": reader.lines, "left_out": dict(reader.left_out), "faults": reader.faults}
    return counts | ({"turn_ends": sorted(turn_ends)} if template else {})


def _packed(ids: Sequence[int], dtype: str) -> bytes:
    """Ids as bytes. numpy takes three times as long to make an array of them."""
    return struct.pack(f"{len(ids)}{np.dtype(dtype).char}", *ids)


class _Reader:
    """The texts of a unit in batches, and counts of what was read.

    Attributes:
        lines: Lines, rows or files read.
        left_out: Texts left out, by reason.
        faults: (line within the unit, reason) of the first malformed records.
    """

    def __init__(self, task: UnitTask, template: Template | None) -> None:
        self.task, self.template = task, template
        self.lines = 0
        self.left_out: Counter[str] = Counter()
        self.faults: list[tuple[int, str]] = []
        self._bytes = 0

    def batches(self) -> Iterator[list[tuple[int, Pieces]]]:
        """Yields lists of (place within the unit, the pieces of a document)."""
        batch: list[tuple[int, Pieces]] = []
        size, limit = 0, BATCH_CHARACTERS if _has_threads() else ONE_THREAD_CHARACTERS
        for place, found in self._documents():
            self.lines = place + 1
            if found is None:
                continue
            if isinstance(found, Fault):
                self.left_out["malformed" if found.malformed else found.reason] += 1
                if found.malformed and len(self.faults) < FIRST_FAULTS:
                    self.faults.append((place, found.reason))
                continue
            batch.append((place, found))
            size += sum(len(text) for text, _ in found)
            if size >= limit:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _documents(self) -> Iterator[tuple[int, Pieces | Fault | None]]:
        """Yields the place and the pieces of every document: a text is one piece."""
        if self.template is None:
            for place, text in read_unit(self.task.unit, text_field=self.task.text_field, advance=self._advance):
                if isinstance(text, str):
                    yield place, ((text, True),) if text else Fault("empty")
                else:
                    yield place, text
            return
        for place, record in read_records(self.task.unit, fields=FIELDS, advance=self._advance):
            conversation = conversation_of_record(record) if isinstance(record, dict) else record
            yield place, render(self.template, conversation) if isinstance(conversation, Conversation) else conversation

    def _advance(self, count: int) -> None:
        self._bytes += count

    def take_bytes(self) -> int:
        """The number of bytes of input read since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken


def _has_threads() -> bool:
    """Whether the tokenizer of this process has threads; it has none in a worker of several."""
    return os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in ("false", "0", "off", "no")


@functools.lru_cache(maxsize=1)
def _encoder(
    tokenizer: Path, fingerprint: str, recognised: frozenset[str]
) -> Callable[[Sequence[str]], list[list[int]]]:
    """The encoder of this process.

    Args:
        tokenizer: The folder of the tokenizer.
        fingerprint: Part of the cache key, because a folder may get another tokenizer.
        recognised: As in `text_encoder`.
    """
    return text_encoder(load_tokenizer(tokenizer), recognised=recognised)


@functools.lru_cache(maxsize=1)
def _template(tokenizer: Path, fingerprint: str, chat_template: str | None) -> Template:
    """The chat template of this process; `fingerprint` as in `_encoder`."""
    return open_template(tokenizer, chat_template)
