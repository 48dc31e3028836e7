"""The input of a corpus: text files and files of records, cut into units of work.

One worker reads a unit from its start to its end. Units and their order follow from the inputs
alone: held-out text files first, then files of records, then the other text files.
"""

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.data.input_form import (
    JSON_SUFFIX,
    PARQUET,
    RECORD_SUFFIXES,
    TEXT,
    Unreadable,
    find_form,
    form_of_name,
    has_record,
    has_suffix,
)
from megatron_twotower.data.installed_packages import Package, installed_packages
from megatron_twotower.data.record_formats import (
    ARRAY,
    Fault,
    checked_text,
    column_of_strings,
    is_compressed,
    open_parquet,
    read_column,
    read_items,
    read_rows,
    record_of_item,
    text_of_record,
)
from megatron_twotower.data.remote import input_path, store_faults

STANDARD_LIBRARY, INSTALLED_PACKAGES = "python-stdlib", "python-packages"
SUFFIXES = (".md", ".py", ".txt")
TRAIN, VALIDATION = "train", "validation"

# Whether an object of a JSON file is a record of the input.
IsRecord = Callable[[dict[str, Any]], bool]

_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
_FIRST_PASSED_OVER = 10


@dataclass(frozen=True)
class Document:
    """An input file: a text file, which is one document, or a file of records.

    Attributes:
        name: Its path relative to the input under which it was found, with `/`.
        form: What it is, see `input_form.find_form`; what its name says if left out.
    """

    name: str
    path: Path
    form: str = ""

    def __post_init__(self) -> None:
        if not self.form:
            object.__setattr__(self, "form", form_of_name(self.path))

    @property
    def is_records(self) -> bool:
        """Whether it is a file of records."""
        return self.form != TEXT


def printable(name: str) -> str:
    """A name with bytes that are not UTF-8, which a file may have, written as escapes."""
    return name.encode(errors="backslashreplace").decode()


@dataclass
class PassedOver:
    """What the folders of an input have besides its documents.

    Attributes:
        counts: By suffix of a file, or by another reason.
        first: The first names, with `/` after that of a folder.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count one, and keep its name if it is among the first."""
        self.counts[reason] += 1
        self.first = sorted([*self.first, name])[:_FIRST_PASSED_OVER]

    def __str__(self) -> str:
        """The counts, and the first names."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        others = ", ..." if self.counts.total() > len(self.first) else ""
        return printable(f"{counts} ({', '.join(self.first)}{others})")


@dataclass(frozen=True)
class Inputs:
    """The documents of all inputs, what was passed over in their folders, and the packages."""

    documents: list[Document]
    passed_over: PassedOver
    packages: list[Package]


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time.

    Attributes:
        files: Text files, or one file of records.
        split: The split of the text files; None for records, whose texts each have a split of their
            own.
        begin, end: Of plain JSON lines, the range of bytes in which the lines start; of parquet,
            the range of row groups; of other records, all bytes.
        size: Bytes of input.
    """

    files: tuple[Document, ...]
    split: str | None
    begin: int
    end: int
    size: int


# The index of the file, line or row within the unit; and its text, or None for a blank line.
Item = tuple[int, str | Fault | None]
# The same of a record.
RecordItem = tuple[int, dict[str, Any] | Fault | None]


# --- input files and their splits ---


def find_documents(
    inputs: Sequence[str], *, suffixes: Sequence[str] = SUFFIXES, text_field: str = "text"
) -> list[Document]:
    """The documents of `find_inputs`."""
    return find_inputs(inputs, suffixes=suffixes, text_field=text_field).documents


def find_inputs(
    inputs: Sequence[str],
    *,
    suffixes: Sequence[str] = SUFFIXES,
    text_field: str = "text",
    is_record: IsRecord | None = None,
) -> Inputs:
    """The files of all inputs, sorted by name within each input, and what was passed over.

    An input is a file, a folder, the URL of one (`remote.input_path`), `python-stdlib`, the library
    source (.py) of the running interpreter, or `python-packages`, that of installed packages
    (`installed_packages`). A folder gives its files with `suffixes` and its files of records, at
    any depth; of its .json files, those of records with a text. Hidden folders, byte-code caches,
    installed packages and links to folders are skipped. A file that is found twice counts once.

    Args:
        text_field: The field of a record with its text.
        is_record: What a record is instead, such as a conversation. Then text files are no input.

    Raises:
        UserError: An input does not exist, has no such file, or is neither text nor records.
    """
    suffixes = suffixes if is_record is None else ()
    found: dict[Path, Document] = {}
    passed_over, packages = PassedOver(), installed_packages() if INSTALLED_PACKAGES in inputs else []
    words = {STANDARD_LIBRARY: _library, INSTALLED_PACKAGES: lambda: _modules(packages)}
    for given in inputs:
        if given in words:
            documents = words[given]() if is_record is None else []
        else:
            path = input_path(given)
            with store_faults(path):
                documents = _found_at(path, given, suffixes, text_field, passed_over, is_record)
        if not documents:
            expected = ", ".join((*suffixes, *RECORD_SUFFIXES))
            others = f"; passed over: {passed_over}" if passed_over.counts else ""
            raise UserError(f"{given}: no files found there, expected some of {expected}{others}")
        for document in documents:
            found.setdefault(document.path.resolve(), document)
    if not found:
        raise UserError(f"no input given, expected files, folders, {STANDARD_LIBRARY} or {INSTALLED_PACKAGES}")
    return Inputs(list(found.values()), passed_over, packages)


def _found_at(
    path: Path,
    given: str,
    suffixes: Sequence[str],
    text_field: str,
    passed_over: PassedOver,
    is_record: IsRecord | None,
) -> list[Document]:
    """The documents of one input of `find_inputs`."""
    if path.is_dir():
        wanted = is_record or (lambda record: isinstance(record.get(text_field), str))
        return _walk(path, tuple(suffixes), text_field, passed_over, wanted)
    if not path.is_file():
        raise UserError(f"{given}: no such file or folder, expected a path, {STANDARD_LIBRARY} or {INSTALLED_PACKAGES}")
    if isinstance(form := find_form(path, text_field=text_field), Unreadable):
        raise UserError(f"{path}: {form.reason}")
    if is_record is not None and form == TEXT:
        raise UserError(f"{path}: found text, expected JSON lines, a JSON array or parquet of conversations")
    return [Document(path.name, path, form)]


def _library() -> list[Document]:
    found = _walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), "text", PassedOver(), lambda record: False)
    return [document for document in found if document.form == TEXT]  # records there are data of tests


def _modules(packages: Sequence[Package]) -> list[Document]:
    return [Document(name, path) for package in packages for name, path in sorted(package.files.items())]


def _walk(
    root: Any, suffixes: tuple[str, ...], text_field: str, passed_over: PassedOver, is_record: IsRecord
) -> list[Document]:
    documents = []
    walked = os.walk(root) if isinstance(root, Path) else root.walk()
    for given, subfolders, files in walked:
        folder: Any = Path(given) if isinstance(root, Path) else given
        for name in list(subfolders):
            if reason := _skipped_folder(folder, name):
                subfolders.remove(name)
                passed_over.add(f"{(folder / name).relative_to(root).as_posix()}/", reason)
        for name in files:
            path = folder / name
            relative = path.relative_to(root).as_posix()
            form = _form_in_folder(path, suffixes, text_field, is_record)
            if isinstance(form, Unreadable):
                passed_over.add(relative, form.reason)
            else:
                documents.append(Document(relative, path, form))
    return sorted(documents, key=lambda document: document.name)


def _skipped_folder(folder: Path, name: str) -> str | None:
    """Why a folder in an input is not read; None if it is."""
    if name in _SKIPPED_FOLDERS:
        return name
    if name.startswith("."):
        return "hidden folder"
    return "link to a folder" if (folder / name).is_symlink() else None


def _form_in_folder(path: Path, suffixes: tuple[str, ...], text_field: str, is_record: IsRecord) -> str | Unreadable:
    """The form of a file of a folder, or why it is passed over."""
    as_text = has_suffix(path, suffixes)
    if not as_text and not has_suffix(path, RECORD_SUFFIXES):
        return Unreadable(path.suffix.lower() or "without suffix")
    if not path.is_file():  # os.walk also lists broken links and pipes as files
        return Unreadable("no file")
    form = find_form(path, text_field=text_field)
    if has_suffix(path, [JSON_SUFFIX]):  # any folder may have such files that are no records
        if isinstance(form, str) and has_record(path, form, is_record):
            return form
        return TEXT if as_text else Unreadable(f"{JSON_SUFFIX} without records with {text_field!r}")
    if isinstance(form, Unreadable):
        if not as_text:
            raise UserError(f"{path}: {form.reason}")
        return Unreadable(f"{path.suffix.lower()} of {form.reason.removeprefix('found ').partition(',')[0]}")
    return form


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
        raise UserError(f"{document.path}: cannot be read ({error.strerror or error})") from error


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
    documents: Sequence[Document],
    *,
    holdout_fraction: float,
    text_field: str,
    unit_bytes: int,
    is_record: IsRecord | None = None,
) -> list[Unit]:
    """The units of `documents`, in order: about `unit_bytes` of input each, or one larger file.

    Of a repeated text, the first copy stays. It must be the held-out copy if there is one. So
    held-out text files come first, and records before the other text files. (All copies among
    records have the same split, because their text decides it.)

    Args:
        is_record: As in `find_inputs`.

    Raises:
        UserError: a parquet file cannot be read or has no column of strings named `text_field`, or
            not the columns of a record.
    """
    splits = split_documents(
        [document for document in documents if not document.is_records], holdout_fraction=holdout_fraction
    )
    units = list(_text_units(splits[VALIDATION], split=VALIDATION, unit_bytes=unit_bytes))
    for document in documents:
        with store_faults(document.path):
            if document.form == PARQUET:
                units += _parquet_units(document, text_field=text_field, unit_bytes=unit_bytes, is_record=is_record)
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
    if document.form == ARRAY or is_compressed(document.path):  # can only be read from the start
        yield Unit((document,), None, 0, size, size)
        return
    for begin in range(0, size, unit_bytes):
        end = min(begin + unit_bytes, size)
        yield Unit((document,), None, begin, end, end - begin)


def _parquet_units(
    document: Document, *, text_field: str, unit_bytes: int, is_record: IsRecord | None
) -> Iterator[Unit]:
    with open_parquet(document.path) as file:
        if is_record is None:
            column_of_strings(document.path, file.schema_arrow, text_field)
        elif not is_record({name: [] for name in file.schema_arrow.names}):
            found = ", ".join(file.schema_arrow.names)
            raise UserError(f"{document.path}: found the columns {found}, expected those of conversations")
        metadata = file.metadata
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
    """Yields every line, value, row or file of a unit.

    One line, value or file, or a few hundred rows, are in memory at a time.

    Args:
        advance: Receives the numbers of bytes of input, as they are read.

    Raises:
        UserError: a file cannot be read, or its compression or array is damaged.
    """
    with store_faults(unit.files[0].path):
        yield from _items(unit, text_field=text_field, advance=advance)


def _items(unit: Unit, *, text_field: str, advance: Callable[[int], None]) -> Iterator[Item]:
    first = unit.files[0].path
    if unit.split is not None:
        for number, document in enumerate(unit.files):
            text = read_text(document)
            yield number, Fault("not_utf8") if text is None else text
            advance(document.path.stat().st_size)
    elif unit.files[0].form == PARQUET:
        values = read_column(first, text_field, range(unit.begin, unit.end), size=unit.size, advance=advance)
        for number, value in enumerate(values):
            yield number, checked_text(value, f"column {text_field!r}")
    else:
        items = read_items(first, unit.files[0].form, unit.begin, unit.end, advance=advance)
        for number, item in enumerate(items):
            yield number, text_of_record(item, text_field=text_field)


def read_records(unit: Unit, *, fields: Collection[str], advance: Callable[[int], None]) -> Iterator[RecordItem]:
    """Yields every record of a unit of records; see `read_unit`.

    Args:
        fields: Columns of a parquet file that are read, as far as there are any.
        advance: As in `read_unit`.
    """
    first = unit.files[0].path
    with store_faults(first):
        if unit.files[0].form == PARQUET:
            with open_parquet(first) as file:
                names = [name for name in file.schema_arrow.names if name in fields]
            groups = range(unit.begin, unit.end)
            yield from enumerate(read_rows(first, names, groups, size=unit.size, advance=advance))
        else:
            items = read_items(first, unit.files[0].form, unit.begin, unit.end, advance=advance)
            for number, item in enumerate(items):
                yield number, record_of_item(item)


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
