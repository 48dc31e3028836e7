"""The formats of records: lines of JSON (plain, gzip, zstd) and columns of parquet files."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_twotower.common.errors import UserError

_COMPRESSED_BYTES_A_READ = 1 << 16
_SKIPPED_BYTES_A_READ = 1 << 16
_ROWS_A_READ = 256
_LARGEST_ZSTD_WINDOW = 1 << 31  # that of `zstd --long=31`


@dataclass(frozen=True)
class Fault:
    """Why a text cannot be read.

    Attributes:
        malformed: a record has the wrong format. A threshold limits the number of such records.
    """

    reason: str
    malformed: bool = False


def text_of_line(line: bytes, *, text_field: str) -> str | Fault:
    """The text of a record, one JSON object."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Fault("not UTF-8", malformed=True)
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON ({error})", malformed=True)
    if not isinstance(record, dict):
        return Fault(f"a JSON {type(record).__name__}, expected an object", malformed=True)
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
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        return Fault(f"{where} holds an unpaired surrogate", malformed=True)
    return value


def read_lines(path: Path, begin: int, end: int, *, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yields the lines that start at bytes `begin` to `end` of a file, or all of a compressed file.

    Args:
        advance: Receives the numbers of bytes of input, as they are read.

    Raises:
        UserError: The file cannot be read, its compression is damaged, or a package is missing.
    """
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield from _counted(gzip.GzipFile(fileobj=raw), raw, advance)
            elif path.suffix == ".zst":
                yield from _counted(_split_lines(_zstd_chunks(raw, path)), raw, advance)
            else:
                yield from _lines_between(raw, begin, end, advance)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


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
        while chunk := raw.read(_COMPRESSED_BYTES_A_READ):
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
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({_one_line(error)})") from error


def read_column(
    path: Path, name: str, row_groups: Sequence[int], *, size: int, advance: Callable[[int], None]
) -> Iterator[Any]:
    """Yields the values of a column in some row groups of a parquet file.

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
            for batch in file.iter_batches(_ROWS_A_READ, row_groups=groups, columns=[name], use_threads=False):
                yield from map(_python_value, batch.column(0))
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
