"""Tensors on disk that are not read yet, and the safetensors format: read by its header, written piece by piece.

Nothing here holds more than a piece of a tensor at a time, unless a caller asks for a whole one.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_twotower.common.errors import UserError

# The allocator gives blocks of this size back and forth without asking the system; larger ones it
# maps each time.
PIECE_BYTES = 8 * 2**20
# Longer headers are refused by the safetensors library, too.
LONGEST_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# The tensor of a name.
TensorSource = Callable[[str], Tensor]
# Called with a number of bytes whenever so many more are done; and with how many there will be,
# before the first.
Report = Callable[[int], None]
Watch = Callable[[int], Report]


def silent(_: int) -> None:
    """The report of who does not watch."""


def unwatched(_: int) -> Report:
    return silent


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet.

    pieces: reads it anew, as flat pieces in the order of its elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same in another precision, converted as it is read."""
        if dtype == self.dtype:
            return self
        count = PIECE_BYTES // max(dtype.itemsize, self.dtype.itemsize)

        def pieces() -> Iterator[Tensor]:
            for piece in self.pieces():
                yield from (part.to(dtype) for part in piece.split(count))

        return LazyTensor(dtype, self.shape, pieces)

    def read(self) -> Tensor:
        """All of it, in memory."""
        count, done = math.prod(self.shape), 0
        whole = torch.empty(0, dtype=self.dtype)
        for piece in self.pieces():
            if piece.numel() == count:
                return piece.view(self.shape)
            if not done:
                whole = torch.empty(count, dtype=self.dtype)
            whole[done : done + piece.numel()] = piece
            done += piece.numel()
        assert done == count, f"{done} of {count} values"
        return whole.view(self.shape)


def stack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one shape as rows of a new one."""

    def pieces() -> Iterator[Tensor]:
        for tensor in tensors:
            yield from tensor.pieces()

    return LazyTensor(tensors[0].dtype, (len(tensors), *tensors[0].shape), pieces)


@dataclass(frozen=True)
class Span:
    """Where a tensor stands in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def row(self, number: int) -> "Span":
        """One row of the first dimension."""
        shape = self.shape[1:]
        return Span(self.path, self.offset + number * math.prod(shape) * self.dtype.itemsize, self.dtype, shape)

    def lazy(self) -> LazyTensor:
        return LazyTensor(self.dtype, self.shape, self._pieces)

    def read(self) -> Tensor:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            return self._next(file, math.prod(self.shape)).view(self.shape)

    def _pieces(self) -> Iterator[Tensor]:
        left, count = math.prod(self.shape), PIECE_BYTES // self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                yield self._next(file, min(left, count))
                left -= min(left, count)

    def _next(self, file: Any, count: int) -> Tensor:
        tensor = torch.empty(count, dtype=self.dtype)
        view = tensor.view(torch.uint8).numpy().data
        while view:
            read = file.readinto(view)
            if not read:
                raise UserError(f"{self.path}: ended while it was read, expected {len(view)} more bytes")
            view = view[read:]
        return tensor


def read_header(path: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors file are, by name.

    Raises:
        UserError: not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER_BYTES
            if length > min(size, LONGEST_HEADER_BYTES):
                raise ValueError("it is too short for its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = {name: _span(path, 8 + length, item) for name, item in header.items()}
        end = max((span.offset + span.nbytes for span in spans.values()), default=8 + length)
        if end != size:
            raise ValueError(f"{size} bytes, and its header counts {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return spans


def _span(path: Path, base: int, item: Mapping[str, Any]) -> Span:
    begin, end = item["data_offsets"]
    if item["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {item['dtype']}")
    span = Span(path, base + begin, DTYPES[item["dtype"]], tuple(item["shape"]))
    if span.nbytes != end - begin:
        raise ValueError("sizes in its header do not agree")
    return span


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], *, report: Report = silent) -> None:
    """Write one safetensors file: its header, then the bytes of one piece after another, flushed to the disk.

    The widest values come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            written = sum(_write(file, piece, report) for piece in tensor.pieces())
            assert written == tensor.nbytes, f"{name}: {written} of {tensor.nbytes} bytes"
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, piece: Tensor, report: Report) -> int:
    raw = piece.contiguous().view(-1).view(torch.uint8).numpy().data
    file.write(raw)
    report(len(raw))
    return len(raw)
