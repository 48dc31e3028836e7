"""The formats of records: JSON lines or an array (plain, gzip, zstd), columns of parquet files."""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.text import is_unicode

_BYTES_A_READ = 1 << 16
_SKIPPED_BYTES_A_READ = 1 << 16
_BYTES_OF_A_BUFFER = 1 << 20
_ROWS_A_READ = 256
_LARGEST_ZSTD_WINDOW = 1 << 31  # that of `zstd --long=31`
_WHITESPACE = " \t\r\n"  # between the values of JSON
_LARGEST_CUT = 16  # characters: so near the end of what was read, a value may be cut

LINES, ARRAY = "lines", "array"  # the forms of JSON records


@dataclass(frozen=True)
class Fault:
    """Why a text cannot be read.

    Attributes:
        malformed: a record has the wrong format. A threshold limits the number of such records.
    """

    reason: str
    malformed: bool = False


def json_reason(error: ValueError | RecursionError) -> str:
    """Why a line is not JSON, in a few words."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def record_of_item(item: Any) -> dict[str, Any] | Fault | None:
    """The object of an item of `read_items`; None for a blank line."""
    if isinstance(item, bytes):
        if not item.strip():
            return None
        try:
            item = json.loads(item.decode("utf-8"))
        except UnicodeDecodeError:
            return Fault("not UTF-8", malformed=True)
        except (ValueError, RecursionError) as error:
            return Fault(f"not JSON ({json_reason(error)})", malformed=True)
    if not isinstance(item, dict):
        return Fault(f"a JSON {type(item).__name__}, expected an object", malformed=True)
    return item


def text_of_record(item: Any, *, text_field: str) -> str | Fault | None:
    """The text of an item of `read_items`; None for a blank line."""
    record = record_of_item(item)
    if not isinstance(record, dict):
        return record
    if text_field not in record:
        return Fault(f"no field {text_field!r}", malformed=True)
    return checked_text(record[text_field], f"field {text_field!r}")


def checked_text(value: Any, where: str) -> str | Fault:
    """A value as text, if it is a string that UTF-8 can encode.

    Args:
        where: The field or column of the value, for the reason of the fault.
    """
    if not isinstance(value, str):
        return Fault(f"{where} holds {type(value).__name__}, expected a string", malformed=True)
    if not is_unicode(value):
        return Fault(f"{where} holds an unpaired surrogate", malformed=True)
    return value


def read_items(
    path: Path, form: str, begin: int = 0, end: int | None = None, *, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Any]:
    """Yields the lines of a file as bytes, without byte order marks, or the values of its array.

    A byte order mark may be at the start of the file, or of a file that was appended to it.

    Args:
        form: LINES or ARRAY.
        begin, end: Of plain LINES, the range of bytes in which the lines start; None is the end of
            the file.
        advance: Receives the numbers of bytes of input, as they are read.

    Raises:
        UserError: The file cannot be read, its compression is damaged, a package is missing, or its
            array is not valid JSON.
    """
    with _file_faults(path):
        if form == ARRAY:
            yield from _array_values(path, advance)
        elif _compression(path) == ".gz":
            with open_bytes(path) as raw:
                lines = _counted(gzip.GzipFile(fileobj=raw), raw, advance)
                yield from (line.removeprefix(codecs.BOM_UTF8) for line in lines)
        elif _compression(path) == ".zst":
            yield from (line.removeprefix(codecs.BOM_UTF8) for line in _split_lines(chunks(path, advance)))
        else:
            with open_bytes(path) as raw:
                stop = path.stat().st_size if end is None else end
                for line in _lines_between(raw, begin, stop, advance):
                    yield line.removeprefix(codecs.BOM_UTF8)


def chunks(path: Path, advance: Callable[[int], None] = lambda _: None, *, unpack: bool = True) -> Iterator[bytes]:
    """Yields the content of a file in pieces, decompressed if its name ends in .gz or .zst.

    Args:
        unpack: False yields the content as it is.
        advance: Receives the numbers of bytes of the file, as they are read.

    Raises:
        UserError: The file cannot be read, its compression is damaged, or a package is missing.
    """
    with _file_faults(path), open_bytes(path) as raw:
        if unpack and _compression(path) == ".gz":
            unpacked = gzip.GzipFile(fileobj=raw)
            yield from _counted(iter(lambda: unpacked.read1(_BYTES_A_READ), b""), raw, advance)
        elif unpack and _compression(path) == ".zst":
            yield from _counted(_zstd_chunks(raw, path), raw, advance)
        else:
            yield from _counted(iter(lambda: raw.read(_BYTES_A_READ), b""), raw, advance)


def open_bytes(path: Path) -> IO[bytes]:
    """A file; of a store with a buffer before it: files of fsspec have no `readline(size)`."""
    stream = path.open("rb")
    return stream if isinstance(path, Path) else io.BufferedReader(cast(io.RawIOBase, stream), _BYTES_OF_A_BUFFER)


def is_compressed(path: Path) -> bool:
    """Whether the name says gzip or zstd: such a file can only be read from its start."""
    return _compression(path) in (".gz", ".zst")


def _compression(path: Path) -> str:
    return path.suffix.lower()


@contextlib.contextmanager
def _file_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


class _ArrayReader:
    """Reads the values of a file that is one JSON array, one after another.

    In memory are one value and a piece of the file, or two pieces as long as the value.

    Attributes:
        text: What was read and is not yet consumed, from character `at` on.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at, self._decoder = pieces, "", 0, json.JSONDecoder()

    def read_more(self) -> bool:
        """Read as much again as is there; returns whether there was anything."""
        rest, size = len(self.text) - self.at, 0
        parts: list[str] = []
        while size <= rest and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        if parts:
            self.text, self.at = "".join([self.text[self.at :], *parts]), 0
        return bool(parts)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _WHITESPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_more():
                return ""

    def take(self, expected: str) -> str:
        """The next character that is not white space.

        Raises:
            ValueError: It is not one of `expected`.
        """
        found = self.peek()
        if not found or found not in expected:
            raise ValueError(f"found {found!r}, expected {' or '.join(expected)}" if found else "it ends")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value.

        Raises:
            ValueError: It is not JSON.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                may_be_cut = error.msg.startswith("Unterminated") or error.pos + _LARGEST_CUT > len(self.text)
                if not (may_be_cut and self.read_more()):
                    raise ValueError(error.msg) from error
                continue
            if end + _LARGEST_CUT > len(self.text) and self.read_more():
                continue  # a number may go on: the begin of 1.5e-7 is a number too
            self.at = end
            return value


def _array_values(path: Path, advance: Callable[[int], None]) -> Iterator[Any]:
    reader, count = _ArrayReader(codecs.iterdecode(chunks(path, advance), "utf-8-sig")), 0
    try:
        reader.take("[")
        if reader.peek() == "]":
            reader.take("]")
        else:
            while not count or reader.take(",]") == ",":
                value = reader.value()
                count += 1
                yield value
        if reader.peek():
            raise ValueError(f"found {reader.peek()!r} after its end")
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: not a JSON array (after {count} values: {reason})") from error


def _lines_between(stream: IO[bytes], begin: int, end: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    at = begin
    if begin > 0:  # a line that starts before `begin` belongs to the previous unit
        stream.seek(begin - 1)
        at, skipped = begin - 1, b""
        while at < end and not skipped.endswith(b"\n") and (skipped := stream.readline(_SKIPPED_BYTES_A_READ)):
            at += len(skipped)
    while at < end and (line := stream.readline()):
        yield line
        at += len(line)
        advance(len(line))


def _counted(stream: Iterable[bytes], raw: IO[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yields the lines of a decompressed stream; `advance` receives bytes of the compressed one."""
    before = 0
    for line in stream:
        yield line
        if (at := raw.tell()) > before:
            advance(at - before)
            before = at


def _zstd_chunks(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yields the decompressed content in pieces.

    The stream reader of zstandard 0.25 accepts a truncated file without an error. This function
    does not.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: zstd needs the package zstandard (pip install 'megatron-twotower[data]')") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
    frame = None
    try:
        while chunk := raw.read(_BYTES_A_READ):
            while chunk:  # a file may have several frames
                if frame is None or frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstd file ({error})") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{path}: damaged zstd file (it ends within a frame)")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # the pieces of a line whose end has not come yet
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if any(begun):
        yield b"".join(begun)


def column_of_strings(path: Path, schema: Any, name: str) -> None:
    """Refuse a parquet file that does not have one column of strings of this name.

    Raises:
        UserError: There is none, more than one, or one of another type.
    """
    from pyarrow import types

    found = [field.type for field in schema if field.name == name]
    if not found:
        raise UserError(f"{path}: no column {name!r}, found {', '.join(schema.names)}")
    if len(found) > 1:
        raise UserError(f"{path}: found {len(found)} columns {name!r}, expected one")
    kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
    if not (types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"):
        raise UserError(f"{path}: column {name!r} holds {found[0]}, expected strings")


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: The file cannot be read as parquet, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet needs the package pyarrow (pip install 'megatron-twotower[data]')") from error
    try:
        return pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb"), pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({_one_line(error)})") from error


def read_column(
    path: Path, name: str, row_groups: Sequence[int], *, size: int, advance: Callable[[int], None]
) -> Iterator[Any]:
    """Yields the values of a column in some row groups of a parquet file; see `read_rows`."""
    for row in read_rows(path, [name], row_groups, size=size, advance=advance):
        yield row[name]


def read_rows(
    path: Path, names: Sequence[str], row_groups: Sequence[int], *, size: int, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of some row groups of a parquet file, each with the columns `names`.

    Args:
        size: Bytes of the row groups. `advance` receives them in parts, as rows are read.

    Raises:
        UserError: The file cannot be read as parquet, or pyarrow is missing.
    """
    with open_parquet(path) as file:
        import pyarrow

        groups = list(row_groups)
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        try:
            for batch in file.iter_batches(_ROWS_A_READ, row_groups=groups, columns=list(names), use_threads=False):
                for row in zip(*(map(_python_value, batch.column(name)) for name in names), strict=True):
                    yield dict(zip(names, row, strict=True))
                advance(size * len(batch) // max(rows, 1))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({_one_line(error)})") from error


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""  # not a string, so the record counts as malformed


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
