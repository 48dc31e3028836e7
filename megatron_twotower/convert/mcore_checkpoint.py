"""The weights of Megatron's distributed checkpoints, read and written tensor by tensor, without a model or ranks.

A checkpoint of any layout has the same names, and says of each tensor where the pieces are that
ranks have written.
"""

import functools
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert.hf_folder import refuse
from megatron_twotower.convert.tensors import LazyTensor, Report
from megatron_twotower.model.parameter_map import (
    Entry,
    hf_from_parameter,
    hf_shapes,
    parameter_from_hf,
    stored_sections,
)

_WEIGHTS_FILE = "__0_0.distcp"
# What Megatron writes beside the tensors: which format they are in, and what is not a tensor
# (nothing, of weights).
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _Reader(FileSystemReader):
    """Reads the metadata once, however many tensors are loaded."""

    _held: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._held is None:
            self._held = super().read_metadata(*args, **kwargs)
        return self._held


@dataclass
class SavedWeights:
    """The weights in a checkpoint, as whole parameters.

    The last one read is kept, because several Hugging Face tensors may be made of it.
    """

    folder: Path
    stored: Mapping[str, TensorStorageMetadata]
    reader: FileSystemReader
    _last: tuple[str, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "SavedWeights":
        """
        Raises:
            UserError: not a distributed checkpoint.
        """
        try:
            reader = _Reader(folder)
            found = reader.read_metadata().state_dict_metadata
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise UserError(f"{folder}/.metadata: cannot be read ({error}), expected a whole checkpoint") from error
        stored = {name: item for name, item in found.items() if isinstance(item, TensorStorageMetadata)}
        return cls(folder, stored, reader)

    def check(self, entries: Sequence[Entry]) -> None:
        """Compare what is stored with what some entries are.

        Raises: UserError: one that lists what is missing, of another shape, or without a place in
            the model.
        """
        expected = {name: shape for entry in entries for name, shape in stored_sections(entry)}
        tops = {name.partition(".")[0] for name in expected}
        weights = {name: tuple(item.size) for name, item in self.stored.items() if name.partition(".")[0] in tops}
        shapes = [name for name, shape in expected.items() if weights.get(name, shape) != shape]
        faults = [
            ("missing", [name for name in expected if name not in weights]),
            ("of another shape", [f"{name} {weights[name]} for {expected[name]}" for name in shapes]),
            ("without a place in the model", sorted(weights.keys() - expected.keys())),
        ]
        refuse(self.folder, faults)

    def parameter(self, entry: Entry) -> Tensor:
        """A whole parameter, in Megatron's layout.

        Raises:
            UserError: its bytes cannot be read.
        """
        if self._last is not None and self._last[0] == entry.megatron_name:
            return self._last[1]
        self._last = None
        parts = {name: torch.empty(shape, dtype=self._dtype(name)) for name, shape in stored_sections(entry)}
        try:
            with warnings.catch_warnings():  # that there is one process
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(parts, storage_reader=self.reader, no_dist=True)
        except (dcp.CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self.folder}: {entry.megatron_name} cannot be read ({reason[-1]})") from error
        whole = next(iter(parts.values())) if len(parts) == 1 else torch.cat(list(parts.values()), entry.split_dim or 0)
        self._last = (entry.megatron_name, whole)
        return whole

    def lazy(self, entries: Iterable[Entry], model: ModelConfig) -> dict[str, LazyTensor]:
        """The Hugging Face tensors of some entries by their names of the table, none of them read."""
        tensors: dict[str, LazyTensor] = {}
        for entry in entries:
            dtype = self._dtype(stored_sections(entry)[0][0])
            for i, (name, shape) in enumerate(hf_shapes([entry], model).items()):
                tensors[name] = LazyTensor(dtype, shape, self._pieces(entry, i, model))
        return tensors

    def _pieces(self, entry: Entry, number: int, model: ModelConfig) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            yield hf_from_parameter(entry, self.parameter(entry), model)[number].reshape(-1)

        return pieces

    def _dtype(self, name: str) -> torch.dtype:
        return self.stored[name].properties.dtype


def stored_weights(
    tensors: Mapping[str, LazyTensor], entries: Iterable[Entry], model: ModelConfig
) -> dict[str, LazyTensor]:
    """What a checkpoint holds of some entries, by its own names, made of Hugging Face tensors of the table's names."""

    def parameter(entry: Entry) -> Tensor:
        return parameter_from_hf(entry, [tensors[name].read() for name in entry.hf_names], model)

    kept = functools.lru_cache(maxsize=1)(parameter)  # several parts are made of one

    def part(entry: Entry, number: int) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            if entry.section_sizes:
                yield kept(entry).split(list(entry.section_sizes), dim=entry.split_dim or 0)[number].reshape(-1)
            else:
                yield parameter(entry).reshape(-1)

        return pieces

    stored: dict[str, LazyTensor] = {}
    for entry in entries:
        dtype = tensors[entry.hf_names[0]].dtype
        for i, (name, shape) in enumerate(stored_sections(entry)):
            stored[name] = LazyTensor(dtype, shape, part(entry, i))
    return stored


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], *, report: Report) -> None:
    """Write a distributed checkpoint of weights alone into an empty folder, one tensor at a time.

    `torch.distributed.checkpoint.save` wants all of them in memory (and in torch 2.13 keeps each
    until its file is closed), so the two files of the format are written here: every tensor as
    `torch.save` writes it, one behind another, and where each begins.
    """
    metadata = Metadata({}, storage_data={})
    with open(folder / _WEIGHTS_FILE, "wb") as file:
        for name, tensor in tensors.items():
            begin, origin, size = file.tell(), torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape)
            torch.save(tensor.read(), file)
            chunks = [ChunkStorageMetadata(origin, size)]
            metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), size, chunks)
            index = MetadataIndex(name, origin)
            metadata.storage_data[index] = _StorageInfo(_WEIGHTS_FILE, begin, file.tell() - begin)
            report(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
