"""Tensors on disk that are not read yet, and files in the safetensors format.

No function here keeps more than one tensor in memory. Reading is done by the safetensors library.
Writing is done here, because the library has no function that writes a file piece by piece: its
`save_file` needs all tensors of the file in memory.
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import OnBytes

# The size of the largest piece. Memory allocators reuse blocks of this size; they map and unmap
# larger ones each time.
PIECE_BYTES = 8 * 2**20

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
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

# Called with the name of a tensor, returns the tensor.
TensorSource = Callable[[str], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet.

    Attributes:
        dtype: The dtype of the pieces.
        shape: The shape of the complete tensor.
        pieces: Reads the tensor on every call. Yields flat pieces in the order of the elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same tensor in another dtype. Each piece is converted when it is read."""
        if dtype == self.dtype:
            return self
        count = PIECE_BYTES // max(dtype.itemsize, self.dtype.itemsize)

        def pieces() -> Iterator[Tensor]:
            for piece in self.pieces():
                yield from (part.to(dtype) for part in piece.split(count))

        return LazyTensor(dtype, self.shape, pieces)

    def read(self) -> Tensor:
        """Read the complete tensor."""
        count, pieces = math.prod(self.shape), self.pieces()
        first = next(pieces, torch.empty(0, dtype=self.dtype))
        if first.numel() == count:
            return first.view(self.shape)
        values, done = torch.empty(count, dtype=self.dtype), 0
        for piece in itertools.chain([first], pieces):
            values[done : done + piece.numel()] = piece
            done += piece.numel()
        assert done == count, f"{done} of {count} values"
        return values.view(self.shape)


def stack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one shape as the rows of one tensor."""

    def pieces() -> Iterator[Tensor]:
        for tensor in tensors:
            yield from tensor.pieces()

    return LazyTensor(tensors[0].dtype, (len(tensors), *tensors[0].shape), pieces)


def mean(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The mean of tensors of one shape, in the dtype of the first.

    It is summed in float64 in the order given, divided once and rounded once.
    """

    def pieces() -> Iterator[Tensor]:
        total = torch.zeros(tensors[0].shape, dtype=torch.float64)
        for tensor in tensors:
            total += tensor.read()
        yield (total / len(tensors)).to(tensors[0].dtype).flatten()

    return LazyTensor(tensors[0].dtype, tensors[0].shape, pieces)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file, or one row of it.

    Attributes:
        path: The file.
        name: The name in the file.
        dtype: The dtype in the file.
        shape: The shape of the tensor, or of the row.
        row: The index of the row along the first dimension; `None` for the complete tensor.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row: int | None = None

    def at(self, row: int) -> "FileTensor":
        """One row of the first dimension."""
        return FileTensor(self.path, self.name, self.dtype, self.shape[1:], row)

    def lazy(self) -> LazyTensor:
        """The same as a `LazyTensor`."""
        return LazyTensor(self.dtype, self.shape, self._pieces)

    def read(self) -> Tensor:
        """The values, in memory that is mapped to the file.

        The library maps the complete file. Pages that were read count as resident memory until the
        last tensor of the mapping is freed. So the file is opened again for each tensor.

        Raises:
            UserError: The file is gone, or has changed and is not complete any more.
        """
        file = _open(self.path)
        return file.get_tensor(self.name) if self.row is None else file.get_slice(self.name)[self.row]

    def _pieces(self) -> Iterator[Tensor]:
        yield from self.read().reshape(-1).split(PIECE_BYTES // self.dtype.itemsize)


def file_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: The file is not a complete safetensors file, or has a dtype that torch lacks.
    """
    file = _open(path)
    tensors = {}
    for name in sorted(file.keys()):
        stored = file.get_slice(name)
        code, shape = stored.get_dtype(), tuple(stored.get_shape())
        if code not in DTYPES:
            raise UserError(f"{path}: not a complete safetensors file ({name} has the unknown dtype {code})")
        tensors[name] = FileTensor(path, name, DTYPES[code], shape)
    return tensors


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], *, on_bytes: OnBytes) -> None:
    """Write a safetensors file piece by piece, and flush it to the disk.

    The tensors with the widest values come first, so that every tensor is aligned.

    Args:
        on_bytes: Called with the size of each piece that is written.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            written = sum(_write(file, piece, on_bytes) for piece in tensor.pieces())
            assert written == tensor.nbytes, f"{name}: {written} of {tensor.nbytes} bytes"
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, piece: Tensor, on_bytes: OnBytes) -> int:
    raw = piece.contiguous().view(-1).view(torch.uint8).numpy().data
    file.write(raw)
    on_bytes(len(raw))
    return len(raw)
