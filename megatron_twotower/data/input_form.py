"""What an input file is: text, JSON lines, one JSON array, or parquet.

The content decides, not the name alone. Records in a file of another name would become one document
of markup.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.data.record_formats import ARRAY, LINES, chunks, is_compressed, read_items

TEXT, PARQUET = "text", "parquet"  # the forms besides LINES and ARRAY

PARQUET_SUFFIX, JSON_SUFFIX = ".parquet", ".json"
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
PACKED_SUFFIXES = (".json.gz", ".json.zst")
RECORD_SUFFIXES = (*LINE_SUFFIXES, *PACKED_SUFFIXES, PARQUET_SUFFIX, JSON_SUFFIX)

# How files begin that are no text, and what was expected instead.
_NOT_TEXT = {
    b"\x1f\x8b": "gzip data, expected a name in .jsonl.gz or .json.gz",
    b"\x28\xb5\x2f\xfd": "zstd data, expected a name in .jsonl.zst or .json.zst",
    b"PAR1\x15": "parquet data, expected a name in .parquet",
    b"BZh91AY&SY": "bzip2 data, expected text, records (also in gzip or zstd) or parquet",
    b"\xfd7zXZ\x00": "xz data, expected text, records (also in gzip or zstd) or parquet",
    b"PK\x03\x04": "a zip file, expected text, records (also in gzip or zstd) or parquet",
}
_BEGIN_BYTES = 256
_FIRST_RECORDS = 8  # that are looked at to find a text


@dataclass(frozen=True)
class Unreadable:
    """Why a file has none of the forms."""

    reason: str


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether the name ends in one of `suffixes`, in upper or lower case."""
    return path.name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def form_of_name(path: Path) -> str:
    """The form that the name of a file says."""
    if has_suffix(path, [PARQUET_SUFFIX]):
        return PARQUET
    return LINES if has_suffix(path, RECORD_SUFFIXES) else TEXT


def find_form(path: Path, *, text_field: str) -> str | Unreadable:
    """TEXT, LINES, ARRAY or PARQUET.

    A file whose name says nothing is LINES if its first two lines are JSON objects, or its only
    line is one with a text; it is an ARRAY if it has objects with a text.

    Args:
        text_field: The field of a record with its text.

    Raises:
        UserError: The file cannot be read, or its compression is damaged.
    """
    if has_suffix(path, [PARQUET_SUFFIX]):
        return PARQUET
    named = has_suffix(path, RECORD_SUFFIXES)
    begin = _begin(path, unpack=named)
    for magic, found in _NOT_TEXT.items():
        if begin.startswith(magic):
            return Unreadable(f"found {found}")
    if has_suffix(path, LINE_SUFFIXES):
        return ARRAY if _begins_array(begin) else LINES
    if named:
        return _json_form(path, begin)
    return _other_form(path, begin, text_field)


def has_text(path: Path, form: str, *, text_field: str) -> bool:
    """Whether one of the first records of a file of LINES or an ARRAY has a text."""
    return has_record(path, form, lambda record: isinstance(record.get(text_field), str))


def has_record(path: Path, form: str, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether one of the first records of a file of LINES or an ARRAY is wanted."""
    values = _first(path, form, _FIRST_RECORDS)
    return any(isinstance(value, dict) and wanted(value) for value in values)


def _begin(path: Path, *, unpack: bool) -> bytes:
    """How a file begins, without a byte order mark and white space."""
    begin = b""
    for piece in chunks(path, unpack=unpack):
        begin += piece
        if len(begin) >= _BEGIN_BYTES:
            break
    return begin.removeprefix(codecs.BOM_UTF8).lstrip()


def _begins_array(begin: bytes) -> bool:
    """Whether it is the begin of an array that is empty or has an object first."""
    return begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b"]")


def _json_form(path: Path, begin: bytes) -> str | Unreadable:
    """The form of a file that its name says is JSON."""
    if _begins_array(begin):
        return ARRAY
    if not begin or any(isinstance(value, dict) for value in _first(path, LINES, 2)):
        return LINES
    kinds = {b"{": "one JSON object over several lines", b"[": "a JSON array of other values than objects"}
    found = kinds.get(begin[:1], "something else")
    return Unreadable(f"found {found}, expected JSON lines or one array of objects")


def _other_form(path: Path, begin: bytes, text_field: str) -> str:
    """The form of a file whose name does not say that it holds records."""
    if _begins_array(begin) and has_text(path, ARRAY, text_field=text_field):
        return ARRAY
    if begin[:1] == b"{":
        values = _first(path, LINES, 2)
        if all(isinstance(value, dict) for value in values) and (
            len(values) == 2 or has_text(path, LINES, text_field=text_field)
        ):
            return LINES
    return TEXT


def _first(path: Path, form: str, count: int) -> list[Any]:
    """The first values of a file of LINES or an ARRAY; None stands for what is not JSON."""
    if is_compressed(path) and not has_suffix(path, RECORD_SUFFIXES):
        return []
    if form == LINES:
        return [_value(line) for line in islice(filter(bytes.strip, read_items(path, LINES)), count)]
    try:
        return list(islice(read_items(path, ARRAY), count))
    except UserError:
        return [None]


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
