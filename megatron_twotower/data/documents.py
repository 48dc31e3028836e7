"""The input of a corpus: text files, JSON lines and parquet files, cut into units of work.

One worker reads a unit from its start to its end. Units and their order follow from the inputs
alone: held-out text files first, then files of records, then the other text files.
"""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_twotower.common.errors import UserError
from megatron_twotower.data.record_formats import (
    Fault,
    checked_text,
    open_parquet,
    read_column,
    read_lines,
    text_of_line,
)

STANDARD_LIBRARY = "python-stdlib"
SUFFIXES = (".md", ".py", ".txt")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
RECORD_SUFFIXES = (*LINE_SUFFIXES, PARQUET_SUFFIX)
TRAIN, VALIDATION = "train", "validation"

_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})


@dataclass(frozen=True)
class Document:
    """An input file: a text file, which is one document, or a file of records.

    Attributes:
        name: Its path relative to the input under which it was found, with `/`.
    """

    name: str
    path: Path

    @property
    def is_records(self) -> bool:
        """Whether it is a file of records."""
        return self.path.name.endswith(RECORD_SUFFIXES)


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time.

    Attributes:
        files: Text files, or one file of records.
        split: The split of the text files; None for records, whose texts each have a split of their
            own.
        begin, end: Of plain JSON lines, the range of bytes in which the lines start; of parquet,
            the range of row groups.
        size: Bytes of input.
    """

    files: tuple[Document, ...]
    split: str | None
    begin: int
    end: int
    size: int


# The index of the file, line or row within the unit; and its text, or None for a blank line.
Item = tuple[int, str | Fault | None]


# --- input files and their splits ---


def find_documents(inputs: Sequence[str], *, suffixes: Sequence[str] = SUFFIXES) -> list[Document]:
    """The files of all inputs, sorted by name within each input.

    An input is a file, a folder, or `python-stdlib`, the library source (.py) of the running
    interpreter. A folder gives its files with `suffixes` and its files of records, at any depth.
    Hidden folders, byte-code caches and installed packages are skipped. A file that is found twice
    counts once.

    Raises:
        UserError: An input does not exist or has no such file.
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
        # os.walk also lists broken links and pipes as files.
        documents += [Document(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(documents, key=lambda document: document.name)


def read_text(document: Document) -> str | None:
    """The text of a text file, without a byte order mark; None if it is not UTF-8.

    Line breaks stay as they are.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return document.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"{document.path}: cannot be read ({error.strerror})") from error


def split_documents(documents: Sequence[Document], *, holdout_fraction: float) -> dict[str, list[Document]]:
    """Text files by split, each split in the order of the SHA-256 of the names.

    That order mixes the packages. A name is held out if its hash, as a fraction of the largest
    hash, is below `holdout_fraction`; other files do not matter. Of two names or more, at least one
    is held out and at least one is not.

    Raises:
        UserError: `holdout_fraction` is not in [0, 1).
    """
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"holdout_fraction {holdout_fraction}: expected at least 0 and less than 1")
    hashes = {document.name: _name_hash(document.name) for document in documents}
    names = sorted(hashes, key=lambda name: (hashes[name], name))
    held = sum(hashes[name] < holdout_fraction * 2.0**64 for name in names)
    if holdout_fraction > 0 and names:
        held = min(max(held, 1), len(names) - 1)
    # By name, not by file: a name that is found under two inputs is never in both splits.
    place = {name: number for number, name in enumerate(names)}
    ordered = sorted(documents, key=lambda document: place[document.name])
    return {
        TRAIN: [document for document in ordered if place[document.name] >= held],
        VALIDATION: [document for document in ordered if place[document.name] < held],
    }


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


# --- units ---


def cut_units(
    documents: Sequence[Document], *, holdout_fraction: float, text_field: str, unit_bytes: int
) -> list[Unit]:
    """The units of `documents`, in order: about `unit_bytes` of input each, or one larger file.

    Of a repeated text, the first copy stays. It must be the held-out copy if there is one. So
    held-out text files come first, and records before the other text files. (All copies among
    records have the same split, because their text decides it.)

    Raises:
        UserError: a parquet file cannot be read or has no column of strings named `text_field`.
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
    total = 0
    for document in documents:
        size = document.path.stat().st_size
        if files and total + size > unit_bytes:
            yield Unit(tuple(files), split, 0, 0, total)
            files, total = [], 0
        files.append(document)
        total += size
    if files:
        yield Unit(tuple(files), split, 0, 0, total)


def _line_units(document: Document, *, unit_bytes: int) -> Iterator[Unit]:
    size = document.path.stat().st_size
    if document.path.suffix in (".gz", ".zst"):  # can only be read from the start
        yield Unit((document,), None, 0, size, size)
        return
    for begin in range(0, size, unit_bytes):
        end = min(begin + unit_bytes, size)
        yield Unit((document,), None, begin, end, end - begin)


def _parquet_units(document: Document, *, text_field: str, unit_bytes: int) -> Iterator[Unit]:
    with open_parquet(document.path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if text_field not in schema.names:
            raise UserError(f"{document.path}: no column {text_field!r}, found {', '.join(schema.names)}")
        kind = str(schema.field(text_field).type)
        if "string" not in kind or "list" in kind or "struct" in kind:
            raise UserError(f"{document.path}: column {text_field!r} holds {kind}, expected strings")
        begin = total = 0
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        for number, size in enumerate(sizes):
            if number > begin and total + size > unit_bytes:
                yield Unit((document,), None, begin, number, total)
                begin, total = number, 0
            total += size
        if sizes:
            yield Unit((document,), None, begin, len(sizes), total)


# --- reading ---


def read_unit(unit: Unit, *, text_field: str, advance: Callable[[int], None]) -> Iterator[Item]:
    """Yields every line, row or file of a unit.

    One line, one file or a few hundred rows are in memory at a time.

    Args:
        advance: Receives the numbers of bytes of input, as they are read.

    Raises:
        UserError: a file cannot be read, or its compression is damaged.
    """
    first = unit.files[0].path
    if unit.split is not None:
        for number, document in enumerate(unit.files):
            text = read_text(document)
            yield number, Fault("not_utf8") if text is None else text
            advance(document.path.stat().st_size)
    elif first.name.endswith(PARQUET_SUFFIX):
        values = read_column(first, text_field, range(unit.begin, unit.end), size=unit.size, advance=advance)
        for number, value in enumerate(values):
            yield number, checked_text(value, f"column {text_field!r}")
    else:
        for number, line in enumerate(read_lines(first, unit.begin, unit.end, advance=advance)):
            line = line.removeprefix(codecs.BOM_UTF8)  # at the start of the file, or of a file appended to it
            yield number, text_of_line(line, text_field=text_field) if line.strip() else None


def training_texts(documents: Sequence[Document], *, holdout_fraction: float, text_field: str) -> Iterator[str]:
    """Yields the texts of `documents` that are not held out, in the order of `cut_units`.

    Whatever has no readable text is skipped.
    """
    for unit in cut_units(documents, holdout_fraction=holdout_fraction, text_field=text_field, unit_bytes=1 << 30):
        if unit.split != VALIDATION:
            for _, text in read_unit(unit, text_field=text_field, advance=lambda _: None):
                if isinstance(text, str) and (unit.split is not None or not held_out(text, holdout_fraction)):
                    yield text


def held_out(text: str, holdout_fraction: float) -> bool:
    """Whether a record with this text is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < holdout_fraction * 2.0**64
