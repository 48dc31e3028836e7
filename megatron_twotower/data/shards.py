"""Tokenised WebDataset shards with a side index, and random access to them.

A prepared folder:

    tokenizer/             the tokenizer of the ids
    train/index.json       totals; for each shard: file, bytes, checksum, documents, tokens
    train/starts.npy       (documents + 1,) int64: where each document begins in all ids
    train/offsets.npy      (documents,) int64: the byte of its shard at which its ids begin
    train/shard-00000.tar  one `KEY.tokens.npy` (ids) and one `KEY.json` per document
                           conversations: also one `KEY.scored.npy` (bool, one per id)
    train/scored.npy       conversations: (documents,) int64: the byte at which that begins
    validation/...         held-out documents, in the same form
    summary.json           what `prepare` returned
    provenance.json        what it was prepared from, and by which versions

Plain `webdataset` streams the shards. `Corpus` reads any window of tokens without unpacking them.
To open a corpus costs as much as to read the table of shards: the arrays are memory maps, so
neither time nor memory grows with the number of documents.
"""

import contextlib
import functools
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_twotower.common.errors import UserError
from megatron_twotower.data import remote

INDEX_FILE = "index.json"
STARTS_FILE, OFFSETS_FILE, SCORED_FILE = "starts.npy", "offsets.npy", "scored.npy"
INDEX_VERSION = 2
# Programs that do not know what is scored of conversations refuse their version.
CONVERSATIONS_VERSION = 3
CACHED_SHARDS = 64  # of each remote corpus, on disk

TOKENS_SUFFIX, SCORED_SUFFIX = "tokens.npy", "scored.npy"
_BLOCK = tarfile.BLOCKSIZE
_OPEN_SHARDS = 64  # memory maps that a corpus keeps open, one file descriptor each
_OPENED_AT_ONCE = 16  # shards that threads fetch and check at the same time


# --- writing ---


class Sample(NamedTuple):
    """A document of a shard.

    Attributes:
        bytes: The size of its text in UTF-8.
        tokens: (n,) ids, with BOS and EOS.
        scored: (n,) bool, the ids of a conversation that are scored; None of a text.
    """

    name: str
    bytes: int
    tokens: np.ndarray
    scored: np.ndarray | None = None


class Shard(NamedTuple):
    """A row of the index.

    Attributes:
        file: The name of a file next to the index, or a URL.
    """

    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


class ShardArrays(NamedTuple):
    """Where the documents of a shard are: (documents,) int64 each.

    Attributes:
        offsets: The byte at which the ids of each document begin.
        lengths: Of each document, in tokens.
        scored: The byte at which begins what is scored of each conversation; None of texts.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    scored: np.ndarray | None = None


def ids_dtype(vocab_size: int) -> str:
    """The smallest dtype of ids that holds a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(path: Path, samples: Iterable[Sample], *, first: int) -> tuple[str, ShardArrays]:
    """Write one tar; its members are named by document number, from `first` on.

    The bytes are those of `webdataset.TarWriter`, which takes a millisecond for each document.

    Returns:
        The SHA-256 of the file, and where its documents are.
    """
    digest, at = hashlib.sha256(), 0
    lengths: list[int] = []
    offsets: dict[str, list[int]] = {TOKENS_SUFFIX: [], SCORED_SUFFIX: []}
    with open(path, "wb") as stream:
        for number, sample in enumerate(samples, start=first):
            about = {"name": sample.name, "tokens": len(sample.tokens), "bytes": sample.bytes}
            arrays = {TOKENS_SUFFIX: sample.tokens}
            if sample.scored is not None:
                arrays[SCORED_SUFFIX] = sample.scored
            members = {"json": json.dumps(about).encode(), **{suffix: _npy(arrays[suffix]) for suffix in arrays}}
            pieces = []
            for suffix, content in sorted(members.items()):
                pieces += [_tar_header(f"{number:09d}.{suffix}", len(content)), content, bytes(-len(content) % _BLOCK)]
                if suffix in arrays:
                    offsets[suffix].append(at + _BLOCK + len(content) - arrays[suffix].nbytes)
                at += sum(map(len, pieces[-3:]))
            block = b"".join(pieces)
            digest.update(block)
            stream.write(block)
            lengths.append(len(sample.tokens))
        end = bytes(2 * _BLOCK + -(at + 2 * _BLOCK) % tarfile.RECORDSIZE)
        digest.update(end)
        stream.write(end)
    scored = np.array(offsets[SCORED_SUFFIX], dtype=np.int64) if offsets[SCORED_SUFFIX] else None
    found = ShardArrays(np.array(offsets[TOKENS_SUFFIX], dtype=np.int64), np.array(lengths, dtype=np.int64), scored)
    return digest.hexdigest(), found


def _tar_header(name: str, size: int) -> bytes:
    """The block before a member of a tar."""
    block = bytearray(_header_without_name())
    block[: len(name)] = name.encode()
    block[124:135] = b"%011o" % size
    block[148:155] = b"%06o\0" % sum(block)  # of the block with eight spaces here
    return bytes(block)


@functools.cache
def _header_without_name() -> bytes:
    info = tarfile.TarInfo()
    info.mode, info.uname, info.gname = 0o444, "bigdata", "bigdata"
    block = bytearray(info.tobuf())
    block[148:156] = b" " * 8
    return bytes(block)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0))
    return stream.getvalue()


def array_members(path: Path, suffix: str = TOKENS_SUFFIX) -> Iterator[tuple[str, int, tuple[int, np.dtype]]]:
    """Yields (key, offset in bytes, (tokens, dtype)) of the arrays of one suffix.

    Only the tar is read, not the index.

    Raises:
        ValueError, tarfile.TarError: The shard is not a tar of token arrays.
    """
    with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.name.endswith("." + suffix):
                stream.seek(member.offset_data)
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                yield member.name.removesuffix("." + suffix), stream.tell(), (int(np.prod(shape)), dtype)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(
    folder: Path, *, header: dict[str, Any], shards: Sequence[Shard], arrays: Iterable[ShardArrays]
) -> None:
    """Write the index of a split folder.

    Args:
        header: What `Corpus` needs in addition to the shards. With `conversations` in it, the index
            has the places of what is scored.
        arrays: Of each shard, in order. Those of one shard are in memory at a time.
    """
    documents = sum(shard.documents for shard in shards)
    files = {STARTS_FILE: documents + 1, OFFSETS_FILE: documents}
    if "conversations" in header:
        files[SCORED_FILE] = documents
    # Plain writes: with a memory map, a full disk is not an error, but kills the process (SIGBUS).
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(open(folder / name, "wb")) for name in files}
        for name, size in files.items():
            header_1_0 = {"descr": "<i8", "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(streams[name], header_1_0)
        end = 0
        streams[STARTS_FILE].write(np.zeros(1, dtype="<i8").tobytes())
        for found in arrays:
            ends = end + np.cumsum(found.lengths)
            streams[STARTS_FILE].write(ends.astype("<i8").tobytes())
            streams[OFFSETS_FILE].write(found.offsets.astype("<i8").tobytes())
            if found.scored is not None:
                streams[SCORED_FILE].write(found.scored.astype("<i8").tobytes())
            end += int(found.lengths.sum())
    index = {**header, "arrays": {name: checksum(folder / name) for name in files}}
    rows = ",\n  ".join(json.dumps(shard._asdict(), separators=(",", ":")) for shard in shards)
    head = json.dumps(index, indent=1).removesuffix("\n}")
    (folder / INDEX_FILE).write_text(f'{head},\n "shards": [\n  {rows}\n ]\n}}\n')


# --- reading ---


@dataclass(frozen=True)
class Corpus:
    """An opened split: the ids of all its documents as one stream, in memory-mapped shards.

    Several threads may use one corpus.

    Attributes:
        folder: a path, or a URL (str).
        exact_ids: Whether the ids of the text are known to be those of its tokenizer.json. Data
            prepared by older versions says nothing about it (`tokenizer.rebuilt_class`).
        total_bytes, total_characters: Of the text of the ids (UTF-8), without BOS and EOS.
        bos_token_id, eos_token_id: The first and last id of each document; None if nothing was
            added.
        arrays: Checksums of the array files, by name.
        offsets: (documents,) int64 bytes in the shard, a memory map.
        starts: (documents + 1,) int64 positions in the stream, a memory map.
        scored_offsets: (documents,) int64 bytes in the shard, a memory map; None if the documents
            are texts, all of which is scored.
        turn_ends: The ids that end the scored turns of conversations.
        first_documents: (shards + 1,) int64, the first document of each shard.
        first_tokens: (shards + 1,) int64, the position of the first token of each shard.
        verify_shards: Compare the checksum of a local shard at its first read.
        cache: Where copies of remote files are.
    """

    folder: Path | str
    vocab_size: int
    tokenizer_fingerprint: str
    exact_ids: bool
    total_tokens: int
    total_bytes: int
    total_characters: int
    bos_token_id: int | None
    eos_token_id: int | None
    dtype: np.dtype
    arrays: dict[str, str]
    shards: tuple[Shard, ...] = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    first_documents: np.ndarray = field(repr=False)
    first_tokens: np.ndarray = field(repr=False)
    verify_shards: bool
    cache: Path
    scored_offsets: np.ndarray | None = field(default=None, repr=False)
    turn_ends: tuple[int, ...] = ()
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _problems: dict[int, str | None] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _shard_locks: tuple[threading.RLock, ...] = field(
        default_factory=lambda: tuple(threading.RLock() for _ in range(_OPENED_AT_ONCE)), repr=False, compare=False
    )

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        damaged: Literal["stop", "skip"] = "stop",
        verify_shards: bool = False,
        examine: bool = True,
    ) -> "Corpus":
        """Open a split folder, or its URL (`remote.join` says how file names become part of it).

        Remote shards are copied into `remote.cache_folder()` at their first read, at most
        `CACHED_SHARDS` of them, and their checksums are always compared.

        Args:
            damaged: With "stop", every local shard must exist and have its size. With "skip", no
                shard is examined before it is read.
            verify_shards: Compare the checksum of a local shard at its first read.
            examine: Whether "stop" examines the shards now. If another process does so, this one
                need not: it still compares the size of each shard that it reads.

        Raises:
            UserError: The index or a shard is missing or wrong; the message names it, what was
                found and what was expected.
        """
        corpus = _open_corpus(folder, verify_shards=verify_shards)
        if examine and damaged == "stop":
            for number in range(len(corpus.shards)):
                if problem := corpus._size_problem(number):
                    raise UserError(problem)
        return corpus

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.offsets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all shard checksums: equal for the same documents in the same shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 ids from position `start` of the stream on, over documents and shards."""
        return self._window(start, count, self.offsets, self.dtype, into=np.int64)

    def scored(self, start: int, count: int) -> np.ndarray | None:
        """(count,) bool, which of the same positions are scored; None if all are."""
        if self.scored_offsets is None:
            return None
        return self._window(start, count, self.scored_offsets, np.dtype(bool), into=bool)

    def _window(self, start: int, count: int, places: np.ndarray, dtype: np.dtype, *, into: Any) -> np.ndarray:
        """(count,) values of arrays that have one value for each token.

        Args:
            places: (documents,) int64 bytes in the shard at which the array of each document
                begins.
            dtype: Of the arrays.
            into: The dtype of the result.
        """
        assert 0 <= start <= start + count <= self.total_tokens, (start, count, self.total_tokens)
        result = np.empty(count, dtype=into)
        if count == 0:
            return result
        first = int(self.starts.searchsorted(start, side="right")) - 1
        last = int(self.starts.searchsorted(start + count, side="left"))
        offsets = places[first:last].tolist()
        starts = self.starts[first : last + 1].tolist()
        shards = (self.first_documents.searchsorted(np.arange(first, last), side="right") - 1).tolist()
        for number, offset, begin, end in zip(shards, offsets, starts, starts[1:], strict=False):
            low, high = max(begin, start), min(end, start + count)
            found = self._values(number, offset, end - begin, dtype)
            result[low - start : high - start] = found[low - begin : high - begin]
        return result

    def document(self, number: int) -> np.ndarray:
        """(tokens,) `dtype` ids of a document, with BOS and EOS: a read-only view of its shard."""
        length = int(self.starts[number + 1] - self.starts[number])
        return self._values(self._shard_of_document(number), int(self.offsets[number]), length, self.dtype)

    def scored_document(self, number: int) -> np.ndarray | None:
        """(tokens,) bool, what is scored of a document: a read-only view; None if all is."""
        if self.scored_offsets is None:
            return None
        length = int(self.starts[number + 1] - self.starts[number])
        place = int(self.scored_offsets[number])
        return self._values(self._shard_of_document(number), place, length, np.dtype(bool))

    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every scored turn of all conversations, (turns,) int64 each in the stream.

        They are where its conversation begins, where it begins, and where it ends. All masks are
        read, a byte for each token.
        """
        begins, ends = [], []
        for number in range(self.documents):
            scored = self.scored_document(number)
            assert scored is not None, "answers are those of conversations"
            edges = np.flatnonzero(np.diff(np.pad(scored, 1).astype(np.int8))) + int(self.starts[number])
            begins.append(edges[::2])
            ends.append(edges[1::2])
        counts = [len(each) for each in begins]
        return np.repeat(self.starts[:-1], counts), np.concatenate(begins), np.concatenate(ends)

    def shard_of(self, position: int) -> int:
        """The number of the shard with a position of the stream."""
        assert 0 <= position < self.total_tokens, (position, self.total_tokens)
        return self._shard_of_document(int(self.starts.searchsorted(position, side="right")) - 1)

    def check_shard(self, number: int) -> str | None:
        """One line that says what is wrong with a shard, or None.

        Size and checksum are compared once; the result is remembered.
        """
        with self._shard_locks[number % _OPENED_AT_ONCE]:
            if number not in self._problems:
                self._problems[number] = self._problem(number)
            return self._problems[number]

    def local_shard(self, number: int) -> Path:
        """The file of a shard; a remote shard is fetched first.

        Raises:
            UserError: It cannot be fetched.
        """
        shard = self.shards[number]
        if isinstance(self.folder, Path) and not remote.is_url(shard.file):
            return self.folder / shard.file
        folder = self.cache / "shards" / self.fingerprint[:16]
        path = remote.fetch(remote.join(str(self.folder), shard.file), sha256=shard.sha256, folder=folder)
        remote.trim(folder, keep=CACHED_SHARDS)
        return path

    def _shard_of_document(self, number: int) -> int:
        return int(self.first_documents.searchsorted(number, side="right")) - 1

    def _values(self, shard: int, offset: int, length: int, dtype: np.dtype) -> np.ndarray:
        data = self._maps.get(shard)
        if data is None:
            data = self._map(shard)
        size = length * dtype.itemsize
        if not 0 <= offset <= offset + size <= len(data):
            file = SCORED_FILE if dtype.kind == "b" else OFFSETS_FILE
            raise UserError(
                f"{self.folder}/{file}: found values at {offset} to {offset + size} of {self.shards[shard].file}, "
                f"expected at most {len(data)}"
            )
        return data[offset : offset + size].view(dtype)

    def _map(self, number: int) -> np.ndarray:
        # A lock for each shard (or few): fetching and checking are slow, and must not keep a thread
        # waiting that reads another shard.
        with self._shard_locks[number % _OPENED_AT_ONCE]:
            if (data := self._maps.get(number)) is not None:
                return data
            if problem := self.check_shard(number) if self.verify_shards else self._size_problem(number):
                raise UserError(problem)
            try:
                data = np.memmap(self.local_shard(number), dtype=np.uint8, mode="r").view(np.ndarray)
            except FileNotFoundError:  # another process has just removed it from the cache
                data = np.memmap(self.local_shard(number), dtype=np.uint8, mode="r").view(np.ndarray)
            with self._lock:
                while len(self._maps) >= _OPEN_SHARDS:
                    del self._maps[next(iter(self._maps))]  # the oldest
                self._maps[number] = data
            return data

    def _size_problem(self, number: int) -> str | None:
        """What is wrong with the size of a local shard, or with the index about it."""
        shard = self.shards[number]
        ends = self.first_documents[number : number + 2]
        if not np.array_equal(self.starts[ends], self.first_tokens[number : number + 2]):
            return f"{self.folder}/{STARTS_FILE}: does not agree with {INDEX_FILE} about {shard.file}"
        if not isinstance(self.folder, Path) or remote.is_url(shard.file):
            return None
        path = self.folder / shard.file
        try:
            found = path.stat().st_size
        except OSError:
            return f"{path}: found no such file, expected a shard of {shard.bytes} bytes"
        return None if found == shard.bytes else f"{path}: found {found} bytes, expected {shard.bytes}"

    def _problem(self, number: int) -> str | None:
        if problem := self._size_problem(number):
            return problem
        try:
            path = self.local_shard(number)
        except UserError as error:
            return str(error)
        if isinstance(self.folder, Path) and (digest := checksum(path)) != self.shards[number].sha256:
            return f"{path}: found sha256 {digest}, expected {self.shards[number].sha256}"
        return None


def _open_corpus(folder: Path | str, *, verify_shards: bool) -> Corpus:
    cache = remote.cache_folder()
    folder = folder if remote.is_url(folder) else Path(folder)
    name = remote.join(folder, INDEX_FILE) if isinstance(folder, str) else str(folder / INDEX_FILE)
    try:
        index = json.loads(_index_bytes(folder, name))
        version = index["version"]
        if version not in (INDEX_VERSION, CONVERSATIONS_VERSION):
            known = f"{INDEX_VERSION} or {CONVERSATIONS_VERSION}"
            raise UserError(f"{name}: version {version}, expected {known}; prepare the data again")
        shards = tuple(Shard(**row) for row in index["shards"])
        conversations = index.get("conversations")
        files = (STARTS_FILE, OFFSETS_FILE, *((SCORED_FILE,) if conversations else ()))
        starts, offsets, *scored = (_open_array(folder, file, index["arrays"][file], cache) for file in files)
        corpus = Corpus(
            folder=folder,
            vocab_size=index["vocab_size"],
            tokenizer_fingerprint=index["tokenizer_fingerprint"],
            exact_ids=index.get("exact_ids", False),
            total_tokens=index["tokens"],
            total_bytes=index["bytes"],
            total_characters=index["characters"],
            bos_token_id=index["bos_token_id"],
            eos_token_id=index["eos_token_id"],
            dtype=np.dtype(index["dtype"]).newbyteorder("<"),
            arrays=index["arrays"],
            shards=shards,
            offsets=offsets,
            starts=starts,
            first_documents=np.cumsum([0, *(shard.documents for shard in shards)]),
            first_tokens=np.cumsum([0, *(shard.tokens for shard in shards)]),
            verify_shards=verify_shards,
            cache=cache,
            scored_offsets=scored[0] if scored else None,
            turn_ends=tuple(conversations["turn_ends"]) if conversations else (),
        )
        sizes = (len(starts) - 1, len(offsets), *map(len, scored), int(corpus.first_documents[-1]), index["documents"])
        totals = (int(starts[-1]), int(corpus.first_tokens[-1]), corpus.total_tokens)
        if len(set(sizes)) != 1 or len(set(totals)) != 1:
            raise ValueError("its arrays and shards do not agree with its totals")
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{name}: not a valid index ({reason}); prepare the data again") from error
    return corpus


def _index_bytes(folder: Path | str, name: str) -> bytes:
    if isinstance(folder, str):
        return remote.read(name)
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{name}: not found, expected the index of a prepared split (twotower data prepare)")
    return (folder / INDEX_FILE).read_bytes()


def _open_array(folder: Path | str, file: str, sha256: str, cache: Path) -> np.ndarray:
    """(n,) int64, a memory map as a plain ndarray: slicing a `np.memmap` costs microseconds."""
    if isinstance(folder, Path):
        path = folder / file
    else:
        path = remote.fetch(remote.join(folder, file), sha256=sha256, folder=cache / "arrays")
    try:
        array = np.load(path, mmap_mode="r").view(np.ndarray)
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected an array of the index") from error
    if array.dtype != np.int64 or array.ndim != 1:
        raise UserError(f"{path}: found {array.ndim}-dimensional {array.dtype}, expected int64 in one dimension")
    return array
