"""Text files -> tokenised WebDataset shards with a side index, and random access to them.

A prepared folder:

    tokenizer/            the tokenizer the ids belong to
    train/index.json      what the shards hold and where each document's ids lie in them
    train/shard-00000.tar one `KEY.tokens.npy` (ids, end-of-text id last) and one `KEY.json` per document
    validation/...        documents held out by name, the same form
    summary.json          what `prepare` returned

Plain `webdataset` streams the shards; `Corpus` reads any stretch of tokens without unpacking them.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import sysconfig
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from megatron_twotower.records import UserError
from megatron_twotower.tokenizer import TOKENIZER_FILE, load_tokenizer, text_encoder, tokenizer_fingerprint

STANDARD_LIBRARY = "python-stdlib"
SUFFIXES = (".md", ".py", ".txt")
TRAIN, VALIDATION = "train", "validation"
INDEX_FILE = "index.json"
INDEX_VERSION = 1

_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TOKENS_SUFFIX = "tokens.npy"
_ENCODE_CHARACTERS = 4 << 20  # text handed to the tokenizer at a time: enough for all its threads, little to hold
_OPEN_SHARDS = 64  # memory maps a corpus keeps, each of which holds a file descriptor


@dataclass(frozen=True)
class Document:
    """A text file. name: its path relative to the input it was found under, with `/`: the same on every machine."""

    name: str
    path: Path


# --- which documents, and which of them are held out --------------------------------------------------------------


def find_documents(inputs: Sequence[str]) -> list[Document]:
    """Text files of each input: a file, a folder (its .py, .txt and .md files, at any depth), or `python-stdlib`.

    `python-stdlib` is the library source (.py) of the running interpreter. Hidden folders, byte-code caches and
    installed packages are passed over. Sorted by name within an input; a file reached twice counts once.

    Errors: `UserError` for an input that is not there or holds no such file.
    """
    found: dict[Path, Document] = {}
    for given in inputs:
        if given == STANDARD_LIBRARY:
            documents = _walk(Path(sysconfig.get_paths()["stdlib"]), suffixes=(".py",))
        elif Path(given).is_dir():
            documents = _walk(Path(given), suffixes=SUFFIXES)
        elif Path(given).is_file():
            documents = [Document(Path(given).name, Path(given))]
        else:
            raise UserError(f"{given}: no such file or folder, expected a path or the word {STANDARD_LIBRARY}")
        if not documents:
            raise UserError(f"{given}: no files found there, expected some of {', '.join(SUFFIXES)}")
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
    """The text of `document`, line breaks as they are; None when it is not UTF-8."""
    try:
        return document.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"{document.path}: cannot be read ({error.strerror})") from error


def split_documents(documents: Sequence[Document], *, holdout_fraction: float) -> dict[str, list[Document]]:
    """`documents` as {"train": ..., "validation": ...}, each in the order of the SHA-256 of the names.

    That order mixes the packages. A name is held out when its hash, read as a fraction, is below `holdout_fraction`,
    whatever other documents there are; of two names or more at least one is held out, and at least one is not.
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


# --- preparing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    name: str
    bytes: int
    characters: int
    tokens: np.ndarray


def prepare(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    output: Path,
    holdout_fraction: float = 0.05,
    shard_tokens: int = 1_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Tokenise `inputs` into the folder `output` (see the head of this module) and return its summary.

    Each document's ids end with the tokenizer's end-of-text id. A document that is not UTF-8, is empty, or repeats the
    text of another is left out and counted; the held-out copy of a repeated text is the one that stays. A shard
    takes documents up to `shard_tokens` tokens, or one longer document. The same documents give the same bytes.
    `progress` is called with (documents done, documents).

    Errors: `UserError` for a missing input or tokenizer, text-less inputs, a value out of range, or an `output` that
    exists; with `overwrite` an earlier prepared folder is replaced, and nothing else ever is. After any error
    `output` is as it was.
    """
    output = Path(output)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens {shard_tokens}: expected at least 1")
    _check_output(output, overwrite=overwrite)
    opened = load_tokenizer(tokenizer)
    if opened.eos_token_id is None:
        raise UserError(f"{tokenizer}: names no end-of-text token, expected eos_token in tokenizer_config.json")
    splits = split_documents(find_documents(inputs), holdout_fraction=holdout_fraction)
    total = sum(map(len, splits.values()))
    vocab_size = max(opened.get_vocab().values()) + 1
    header = {
        "version": INDEX_VERSION,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "holdout_fraction": holdout_fraction,
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
    }
    with _replacing(output) as partial:
        totals = _write_splits(
            partial,
            splits,
            header=header,
            encode=text_encoder(opened),
            end=opened.eos_token_id,
            shard_tokens=shard_tokens,
            progress=progress,
        )
        if TRAIN not in totals or totals[TRAIN]["documents"] == 0:
            raise UserError(f"{' '.join(inputs)}: none of {total} files left to train on, expected UTF-8 text")
        _copy_tokenizer(Path(tokenizer), partial / "tokenizer")
        summary = {**header, "splits": totals}
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already, expected a folder that does not (or overwrite)")
    if not (output / TRAIN / INDEX_FILE).is_file():
        raise UserError(f"{output}: holds no {TRAIN}/{INDEX_FILE}, expected an earlier prepared folder to overwrite")


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A folder beside `output` to fill; it takes the place of `output` at the end, or vanishes on an error."""
    partial, old = (output.with_name(output.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            output.replace(old)
        partial.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _texts(
    documents: Sequence[Document], *, seen: set[bytes], left_out: Counter[str], advance: Callable[[], None]
) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents to keep; adds the digests of their texts to `seen`, counts the others."""
    for document in documents:
        text = read_text(document)
        digest = hashlib.sha256((text or "").encode()).digest()[:16]
        if not text:
            left_out["not_utf8" if text is None else "empty"] += 1
        elif digest in seen:
            left_out["repeated"] += 1
        else:
            seen.add(digest)
            yield document.name, text
        advance()


def _encode(
    texts: Iterator[tuple[str, str]], *, encode: Callable[[Sequence[str]], list[list[int]]], end: int, dtype: np.dtype
) -> Iterator[_Encoded]:
    while batch := _take(texts):
        for (name, text), ids in zip(batch, encode([text for _, text in batch]), strict=True):
            yield _Encoded(name, len(text.encode()), len(text), np.array([*ids, end], dtype=dtype))


def _take(texts: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """The next texts, enough to keep the tokenizer busy."""
    taken: list[tuple[str, str]] = []
    size = 0
    while size < _ENCODE_CHARACTERS and (item := next(texts, None)) is not None:
        taken.append(item)
        size += len(item[1])
    return taken


def _write_splits(
    folder: Path,
    splits: dict[str, list[Document]],
    *,
    header: dict[str, Any],
    encode: Callable[[Sequence[str]], list[list[int]]],
    end: int,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write every split that has documents; return the totals by split."""
    total, numbers = sum(map(len, splits.values())), itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(numbers), total)

    totals: dict[str, Any] = {}
    seen: set[bytes] = set()
    # The held-out split first: of a repeated text, the first copy is the one that stays.
    for split in (split for split in (VALIDATION, TRAIN) if splits[split]):
        left_out: Counter[str] = Counter()
        texts = _texts(splits[split], seen=seen, left_out=left_out, advance=advance)
        documents = _encode(texts, encode=encode, end=end, dtype=np.dtype(header["dtype"]))
        totals[split] = _write_split(
            folder / split, documents, header=header, left_out=left_out, shard_tokens=shard_tokens
        )
    return totals


def _write_split(
    folder: Path,
    documents: Iterator[_Encoded],
    *,
    header: dict[str, Any],
    left_out: Counter[str],
    shard_tokens: int,
) -> dict[str, Any]:
    """Write the shards and the index of one split; return its totals."""
    folder.mkdir()
    totals = Counter(documents=0, tokens=0, bytes=0, characters=0)
    shards: list[dict[str, Any]] = []
    for group in _grouped(documents, shard_tokens):
        shards.append(_write_shard(folder / f"shard-{len(shards):05d}.tar", group, first=totals["documents"]))
        for one in group:
            totals.update(documents=1, tokens=len(one.tokens), bytes=one.bytes, characters=one.characters)
    summary = {**totals, "left_out": dict(sorted(left_out.items()))}  # counted while the shards were written
    index = {**header, **summary, "shards": shards}
    (folder / INDEX_FILE).write_text(json.dumps(index, separators=(",", ":")) + "\n")
    return {**summary, "shards": len(shards)}


def _grouped(documents: Iterator[_Encoded], shard_tokens: int) -> Iterator[list[_Encoded]]:
    group: list[_Encoded] = []
    held = 0
    for document in documents:
        if group and held + len(document.tokens) > shard_tokens:
            yield group
            group, held = [], 0
        group.append(document)
        held += len(document.tokens)
    if group:
        yield group


def _write_shard(path: Path, group: Sequence[_Encoded], *, first: int) -> dict[str, Any]:
    """Write one tar and return its entry in the index; members are named by document number from `first`."""
    with open(path, "wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        for number, document in enumerate(group, start=first):
            array = io.BytesIO()
            np.lib.format.write_array(array, document.tokens, version=(1, 0))
            about = {"name": document.name, "tokens": len(document.tokens), "bytes": document.bytes}
            writer.write(
                {"__key__": f"{number:09d}", "json": json.dumps(about).encode(), _TOKENS_SUFFIX: array.getvalue()}
            )
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _checksum(path),
        "offsets": _array_offsets(path),
        "tokens": [len(document.tokens) for document in group],
    }


def _array_offsets(path: Path) -> list[int]:
    """Where in the tar the ids of each document begin, past the tar and NumPy headers."""
    offsets = []
    with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        members = [member for member in tar if member.name.endswith("." + _TOKENS_SUFFIX)]
        for member in members:
            stream.seek(member.offset_data)
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)
            offsets.append(stream.tell())
    return offsets


def _checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """An opened split: the ids of all its documents as one stream, read from memory-mapped shards.

    total_bytes, total_characters: of the text the ids came from (UTF-8), without end-of-text marks.
    offsets: (documents,) int64 bytes into its shard; starts: (documents + 1,) int64 position in the stream;
    shard_numbers: (documents,) int64 index into `shards`.
    """

    folder: Path
    vocab_size: int
    tokenizer_fingerprint: str
    total_tokens: int
    total_bytes: int
    total_characters: int
    dtype: np.dtype
    shards: tuple[Path, ...]
    offsets: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    shard_numbers: np.ndarray = field(repr=False)
    _maps: dict[int, np.memmap] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "Corpus":
        """Open a split folder; every shard must be there in full, and with `verify` have the indexed checksum.

        Errors: `UserError` naming the index or the shard, what was found and what was expected.
        """
        return _open_corpus(Path(folder), verify=verify)

    @property
    def documents(self) -> int:
        return len(self.offsets)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 ids from position `start` of the stream, across documents and shards."""
        assert 0 <= start <= start + count <= self.total_tokens, (start, count, self.total_tokens)
        result = np.empty(count, dtype=np.int64)
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < count:
            skip = start + filled - int(self.starts[document])
            piece = self.document(document)[skip : skip + count - filled]
            result[filled : filled + len(piece)] = piece
            filled += len(piece)
            document += 1
        return result

    def document(self, number: int) -> np.ndarray:
        """(tokens,) ids of one document, its end-of-text id last: a read-only view of its shard, in `dtype`."""
        offset, length = int(self.offsets[number]), int(self.starts[number + 1] - self.starts[number])
        data = self._shard(int(self.shard_numbers[number]))[offset : offset + length * self.dtype.itemsize]
        return data.view(np.ndarray).view(self.dtype)

    def _shard(self, number: int) -> np.memmap:
        if number not in self._maps:
            while len(self._maps) >= _OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]  # the oldest
            self._maps[number] = np.memmap(self.shards[number], dtype=np.uint8, mode="r")
        return self._maps[number]


def _open_corpus(folder: Path, *, verify: bool) -> Corpus:
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        raise UserError(f"{index_file}: not found, expected the index of a prepared split (twotower data prepare)")
    try:
        index = json.loads(index_file.read_text())
        version = index["version"]
        if version != INDEX_VERSION:
            raise UserError(f"{index_file}: version {version}, expected {INDEX_VERSION}; prepare the data again")
        for shard in index["shards"]:
            _check_shard(folder / shard["file"], size=shard["bytes"], sha256=shard["sha256"] if verify else None)
        shards = index["shards"]
        counts = [len(shard["tokens"]) for shard in shards]
        lengths = [length for shard in shards for length in shard["tokens"]]
        offsets = [offset for shard in shards for offset in shard["offsets"]]
        corpus = Corpus(
            folder=folder,
            vocab_size=index["vocab_size"],
            tokenizer_fingerprint=index["tokenizer_fingerprint"],
            total_tokens=index["tokens"],
            total_bytes=index["bytes"],
            total_characters=index["characters"],
            dtype=np.dtype(index["dtype"]).newbyteorder("<"),
            shards=tuple(folder / shard["file"] for shard in shards),
            offsets=np.array(offsets, dtype=np.int64),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            shard_numbers=np.repeat(np.arange(len(counts)), np.array(counts, dtype=np.int64)),
        )
        sizes = np.array([shard["bytes"] for shard in shards], dtype=np.int64)
        ends = corpus.offsets + np.diff(corpus.starts) * corpus.dtype.itemsize
        if int(corpus.starts[-1]) != corpus.total_tokens or (ends > sizes[corpus.shard_numbers]).any():
            raise ValueError("its arrays do not agree with its totals")
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{index_file}: not a valid index ({reason}); prepare the data again") from error
    return corpus


def _check_shard(path: Path, *, size: int, sha256: str | None) -> None:
    if not path.is_file():
        raise UserError(f"{path}: found no such file, expected a shard of {size} bytes")
    found = path.stat().st_size
    if found != size:
        raise UserError(f"{path}: found {found} bytes, expected {size}")
    if sha256 is not None and (digest := _checksum(path)) != sha256:
        raise UserError(f"{path}: found sha256 {digest}, expected {sha256}")
