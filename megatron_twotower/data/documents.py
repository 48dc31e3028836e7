"""Where text comes from: text files, JSON lines (plain, gzip, zstd) and parquet, cut in units for worker processes.

A unit is read from its start to its end by one worker. Units and their order follow from the inputs
alone: files of text held out for validation, then files of records, then the other files of text.
"""

import codecs
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_twotower.common.errors import UserError

STANDARD_LIBRARY = "python-stdlib"
SUFFIXES = (".md", ".py", ".txt")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
RECORD_SUFFIXES = (*LINE_SUFFIXES, PARQUET_SUFFIX)
TRAIN, VALIDATION = "train", "validation"

_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
_COMPRESSED_BYTES_A_READ = 1 << 16
_SKIPPED_BYTES_A_READ = 1 << 16
_ROWS_A_READ = 256
_LARGEST_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


@dataclass(frozen=True)
class Document:
    """A file of text or of records. name: its path relative to the input it was found under, with `/`."""

    name: str
    path: Path

    @property
    def is_records(self) -> bool:
        return self.path.name.endswith(RECORD_SUFFIXES)


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time.

    files: whole files of text, all of `split`; or one file of records, whose split is decided text
    by text (None).
    begin, end: the bytes of a plain JSON lines file in which its lines start, or the row groups of
    a parquet file.
    size: bytes of input.
    """

    files: tuple[Document, ...]
    split: str | None
    begin: int
    end: int
    size: int


@dataclass(frozen=True)
class Fault:
    """A text that could not be had. malformed: a record that breaks its format, which is limited by a threshold."""

    reason: str
    malformed: bool = False


# File within a unit of text files, else line or row within the unit; and the text, None for a blank
# line.
Item = tuple[int, str | Fault | None]


# --- which files, and which of them are held out -------------------------------------------------------------------


def find_documents(inputs: Sequence[str], *, suffixes: Sequence[str] = SUFFIXES) -> list[Document]:
    """Files of each input: a file, a folder (its `suffixes` and files of records, at any depth), or `python-stdlib`.

    `python-stdlib` is the library source (.py) of the running interpreter. Hidden folders,
    byte-code caches and installed packages are passed over. Sorted by name within an input; a file
    reached twice counts once.

    Errors: `UserError` for an input that is not there or holds no such file.
    """
    found: dict[Path, Document] = {}
    for given in inputs:
        if given == STANDARD_LIBRARY:
            documents = _walk(Path(sysconfig.get_paths()["stdlib"]), suffixes=(".py",))
        elif Path(given).is_dir():
            documents = _walk(Path(given), suffixes=(*suffixes, *RECORD_SUFFIXES))
        elif Path(given).is_file():
            documents = [Document(Path(given).name, Path(given))]
        else:
            raise UserError(f"{given}: no such file or folder, expected a path or the word {STANDARD_LIBRARY}")
        if not documents:
            expected = ", ".join((*suffixes, *RECORD_SUFFIXES))
            raise UserError(f"{given}: no files found there, expected some of {expected}")
        for document in documents:
            found.setdefault(document.path.resolve(), document)
    if not found:
        raise UserError(f"no input given, expected files, folders or the word {STANDARD_LIBRARY}")
    return list(found.values())


def _walk(root: Path, *, suffixes: tuple[str, ...]) -> list[Document]:
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        paths = (Path(folder, name) for name in files if name.endswith(suffixes))
        # os.walk lists broken links and pipes among the files too.
        documents += [Document(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(documents, key=lambda document: document.name)


def read_text(document: Document) -> str | None:
    """The text of `document`, line breaks as they are, without a byte order mark; None when it is not UTF-8."""
    try:
        return document.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"{document.path}: cannot be read ({error.strerror})") from error


def split_documents(documents: Sequence[Document], *, holdout_fraction: float) -> dict[str, list[Document]]:
    """`documents` as {"train": ..., "validation": ...}, each in the order of the SHA-256 of the names.

    That order mixes the packages. A name is held out when its hash, read as a fraction, is below
    `holdout_fraction`, whatever other documents there are; of two names or more at least one is
    held out, and at least one is not.
    """
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"holdout_fraction {holdout_fraction}: expected at least 0 and less than 1")
    hashes = {document.name: _name_hash(document.name) for document in documents}
    names = sorted(hashes, key=lambda name: (hashes[name], name))
    held = sum(hashes[name] < holdout_fraction * 2.0**64 for name in names)
    if holdout_fraction > 0 and names:
        held = min(max(held, 1), len(names) - 1)
    # By name, not by file: one name found under two inputs never stands on both sides.
    place = {name: number for number, name in enumerate(names)}
    ordered = sorted(documents, key=lambda document: place[document.name])
    return {
        TRAIN: [document for document in ordered if place[document.name] >= held],
        VALIDATION: [document for document in ordered if place[document.name] < held],
    }


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


# --- units ---------------------------------------------------------------------------------------------------------


def cut_units(
    documents: Sequence[Document], *, holdout_fraction: float, text_field: str, unit_bytes: int
) -> list[Unit]:
    """The units of `documents`, in order: each about `unit_bytes` of input, or one larger file that cannot be cut.

    Of a repeated text the first copy stays. Files of text held out come first, and records before
    the other files, so that the copy that stays is always the held-out one (all copies among
    records are on one side: it is their text that decides).

    Errors: `UserError` for a parquet file that cannot be read or has no column of strings named
    `text_field`.
    """
    splits = split_documents(
        [document for document in documents if not document.is_records], holdout_fraction=holdout_fraction
    )
    units = list(_text_units(splits[VALIDATION], split=VALIDATION, unit_bytes=unit_bytes))
    for document in documents:
        if document.path.name.endswith(PARQUET_SUFFIX):
            units += _parquet_units(document, text_field=text_field, unit_bytes=unit_bytes)
        elif document.is_records:
            units += _line_units(document, unit_bytes=unit_bytes)
    return [*units, *_text_units(splits[TRAIN], split=TRAIN, unit_bytes=unit_bytes)]


def _text_units(documents: Sequence[Document], *, split: str, unit_bytes: int) -> Iterator[Unit]:
    files: list[Document] = []
    held = 0
    for document in documents:
        size = document.path.stat().st_size
        if files and held + size > unit_bytes:
            yield Unit(tuple(files), split, 0, 0, held)
            files, held = [], 0
        files.append(document)
        held += size
    if files:
        yield Unit(tuple(files), split, 0, 0, held)


def _line_units(document: Document, *, unit_bytes: int) -> Iterator[Unit]:
    size = document.path.stat().st_size
    if document.path.suffix in (".gz", ".zst"):  # read from the start or not at all
        yield Unit((document,), None, 0, size, size)
        return
    for begin in range(0, size, unit_bytes):
        end = min(begin + unit_bytes, size)
        yield Unit((document,), None, begin, end, end - begin)


def _parquet_units(document: Document, *, text_field: str, unit_bytes: int) -> Iterator[Unit]:
    with _open_parquet(document) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if text_field not in schema.names:
            raise UserError(f"{document.path}: no column {text_field!r}, found {', '.join(schema.names)}")
        kind = str(schema.field(text_field).type)
        if "string" not in kind or "list" in kind or "struct" in kind:
            raise UserError(f"{document.path}: column {text_field!r} holds {kind}, expected strings")
        begin = held = 0
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        for number, size in enumerate(sizes):
            if number > begin and held + size > unit_bytes:
                yield Unit((document,), None, begin, number, held)
                begin, held = number, 0
            held += size
        if sizes:
            yield Unit((document,), None, begin, len(sizes), held)


# --- reading -------------------------------------------------------------------------------------------------------


def read_unit(unit: Unit, *, text_field: str, advance: Callable[[int], None]) -> Iterator[Item]:
    """Every line, row or file of a unit; `advance` is called with bytes of input as they go by.

    Holds one line, one file, or a few hundred rows at a time.
    Errors: `UserError` naming a file that cannot be read, or whose compression is damaged.
    """
    if unit.split is not None:
        for number, document in enumerate(unit.files):
            text = read_text(document)
            yield number, Fault("not_utf8") if text is None else text
            advance(document.path.stat().st_size)
    elif unit.files[0].path.name.endswith(PARQUET_SUFFIX):
        for number, value in enumerate(_parquet_values(unit, text_field=text_field, advance=advance)):
            yield number, _checked(value, f"column {text_field!r}")
    else:
        for number, line in enumerate(_lines(unit, advance=advance)):
            line = line.removeprefix(codecs.BOM_UTF8)  # of a file, or of one that was appended to it
            yield number, _text_of_line(line, text_field=text_field) if line.strip() else None


def training_texts(documents: Sequence[Document], *, holdout_fraction: float, text_field: str) -> Iterator[str]:
    """The texts of `documents` that are not held out, in the order of `cut_units`; what has no text is passed over."""
    for unit in cut_units(documents, holdout_fraction=holdout_fraction, text_field=text_field, unit_bytes=1 << 30):
        if unit.split != VALIDATION:
            for _, text in read_unit(unit, text_field=text_field, advance=lambda _: None):
                if isinstance(text, str) and (unit.split is not None or not held_out(text, holdout_fraction)):
                    yield text


def held_out(text: str, holdout_fraction: float) -> bool:
    """Whether a record is held out: it goes by its text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < holdout_fraction * 2.0**64


def _text_of_line(line: bytes, *, text_field: str) -> str | Fault:
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
    return _checked(record[text_field], f"field {text_field!r}")


def _checked(value: Any, where: str) -> str | Fault:
    if not isinstance(value, str):
        return Fault(f"{where} holds {type(value).__name__}, expected a string", malformed=True)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
        return Fault(f"{where} holds an unpaired surrogate", malformed=True)
    return value


def _lines(unit: Unit, *, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The lines that start in a unit of JSON lines."""
    path = unit.files[0].path
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield from _counted(gzip.GzipFile(fileobj=raw), raw, advance)
            elif path.suffix == ".zst":
                yield from _counted(_split_lines(_zstd_chunks(raw, path)), raw, advance)
            else:
                yield from _lines_between(raw, unit.begin, unit.end, advance)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines_between(stream: IO[bytes], begin: int, end: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    at = begin
    if begin > 0:  # a line that starts before `begin` belongs to the unit before
        stream.seek(begin - 1)
        at, skipped = begin - 1, b""
        while at < end and not skipped.endswith(b"\n") and (skipped := stream.readline(_SKIPPED_BYTES_A_READ)):
            at += len(skipped)
    while at < end and (line := stream.readline()):
        yield line
        at += len(line)
        advance(len(line))


def _counted(stream: Iterable[bytes], raw: IO[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    """The lines of a decompressed stream, progress counted in bytes of the compressed one."""
    before = 0
    for line in stream:
        yield line
        if (at := raw.tell()) > before:
            advance(at - before)
            before = at


def _zstd_chunks(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """zstandard's own stream reader takes a file that was cut off for a whole one (0.25); this one tells."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: zstd needs the package zstandard (pip install 'megatron-twotower[data]')") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
    frame = None
    try:
        while chunk := raw.read(_COMPRESSED_BYTES_A_READ):
            while chunk:  # frames may follow each other
                if frame is None or frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstd file ({error})") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{path}: damaged zstd file (it ends within a frame)")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # of a line that has not ended yet
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if any(begun):
        yield b"".join(begun)


def _open_parquet(document: Document) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{document.path}: parquet needs the package pyarrow (pip install 'megatron-twotower[data]')"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(document.path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{document.path}: cannot be read as parquet ({_one_line(error)})") from error


def _parquet_values(unit: Unit, *, text_field: str, advance: Callable[[int], None]) -> Iterator[Any]:
    import pyarrow

    document = unit.files[0]
    with _open_parquet(document) as file:
        rows = sum(file.metadata.row_group(number).num_rows for number in range(unit.begin, unit.end))
        groups = list(range(unit.begin, unit.end))
        try:
            for batch in file.iter_batches(_ROWS_A_READ, row_groups=groups, columns=[text_field], use_threads=False):
                yield from map(_python_value, batch.column(0))
                advance(unit.size * len(batch) // max(rows, 1))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{document.path}: cannot be read as parquet ({_one_line(error)})") from error


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""  # bytes are not a string, and counted as such


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
