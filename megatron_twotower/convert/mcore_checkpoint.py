"""The weights of Megatron's distributed checkpoints, read and written one parameter at a time.

This needs no model and no other ranks. Checkpoints of all layouts have the same tensor names, and
their metadata lists where the shards of each tensor are.
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
from megatron_twotower.common.progress import OnBytes
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert.hf_folder import raise_faults
from megatron_twotower.convert.tensors import LazyTensor
from megatron_twotower.model.parameter_map import (
    Entry,
    hf_from_parameter,
    hf_shapes,
    parameter_from_hf,
    stored_sections,
)

_WEIGHTS_FILE = "__0_0.distcp"
# What Megatron writes to `metadata.json`: the format of the tensors and of all other state. A
# checkpoint of weights has no other state.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _CachedReader(FileSystemReader):
    """A reader that reads the metadata once. `dcp.load` asks for it on every call."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


@dataclass
class CheckpointWeights:
    """The weights in a checkpoint, as complete parameters.

    The last parameter is cached, because several Hugging Face tensors may be made of it.

    Attributes:
        folder: The checkpoint.
        metadata: The metadata of each tensor, by its name in the checkpoint.
        reader: Reads the tensors.
    """

    folder: Path
    metadata: Mapping[str, TensorStorageMetadata]
    reader: FileSystemReader
    _last: tuple[str, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "CheckpointWeights":
        """Read the metadata of a checkpoint.

        Raises:
            UserError: The folder is not a distributed checkpoint.
        """
        try:
            reader = _CachedReader(folder)
            found = reader.read_metadata().state_dict_metadata
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise UserError(f"{folder}/.metadata: cannot be read ({error}), expected a complete checkpoint") from error
        tensors = {name: item for name, item in found.items() if isinstance(item, TensorStorageMetadata)}
        return cls(folder, tensors, reader)

    def check(self, entries: Sequence[Entry]) -> None:
        """Compare the tensors of the checkpoint with some entries.

        Raises:
            UserError: Tensors are missing, unknown, or of another shape. The error has one line
                with all faults.
        """
        expected = {name: shape for entry in entries for name, shape in stored_sections(entry)}
        prefixes = {name.partition(".")[0] for name in expected}
        # A checkpoint also has the state of the optimizer, under other prefixes.
        found = {name: tuple(item.size) for name, item in self.metadata.items() if name.partition(".")[0] in prefixes}
        shapes = [name for name, shape in expected.items() if found.get(name, shape) != shape]
        faults = [
            ("missing", [name for name in expected if name not in found]),
            ("of another shape", [f"{name} {found[name]} for {expected[name]}" for name in shapes]),
            ("without a place in the model", sorted(found.keys() - expected.keys())),
        ]
        raise_faults(self.folder, faults)

    def parameter(self, entry: Entry) -> Tensor:
        """Read a complete parameter, in Megatron's layout.

        Raises:
            UserError: The parameter cannot be read.
        """
        if self._last is not None and self._last[0] == entry.megatron_name:
            return self._last[1]
        self._last = None
        sections = {name: torch.empty(shape, dtype=self._dtype(name)) for name, shape in stored_sections(entry)}
        try:
            with warnings.catch_warnings():  # torch warns that there is only one process
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(sections, storage_reader=self.reader, no_dist=True)
        except (dcp.CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self.folder}: {entry.megatron_name} cannot be read ({reason[-1]})") from error
        values = list(sections.values())
        parameter = values[0] if len(values) == 1 else torch.cat(values, entry.split_dim or 0)
        self._last = (entry.megatron_name, parameter)
        return parameter

    def entry_tensors(self, entries: Iterable[Entry], model: ModelConfig) -> dict[str, LazyTensor]:
        """The Hugging Face tensors of some entries, by their names in the parameter map."""
        tensors: dict[str, LazyTensor] = {}
        for entry in entries:
            dtype = self._dtype(stored_sections(entry)[0][0])
            for i, (name, shape) in enumerate(hf_shapes([entry], model).items()):
                tensors[name] = LazyTensor(dtype, shape, self._pieces(entry, i, model))
        return tensors

    def _pieces(self, entry: Entry, index: int, model: ModelConfig) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            yield hf_from_parameter(entry, self.parameter(entry), model)[index].reshape(-1)

        return pieces

    def _dtype(self, name: str) -> torch.dtype:
        return self.metadata[name].properties.dtype


def checkpoint_tensors(
    tensors: Mapping[str, LazyTensor], entries: Iterable[Entry], model: ModelConfig
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint for some entries, by their names in the checkpoint.

    Args:
        tensors: The Hugging Face tensors of the entries, by their names in the parameter map.
        entries: The parameters of the checkpoint.
        model: The shapes of the model.
    """

    def parameter(entry: Entry) -> Tensor:
        return parameter_from_hf(entry, [tensors[name].read() for name in entry.hf_names], model)

    # The sections of a parameter are written one after the other.
    cached_parameter = functools.lru_cache(maxsize=1)(parameter)

    def section(entry: Entry, index: int) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            if entry.section_sizes:
                yield (
                    cached_parameter(entry)
                    .split(list(entry.section_sizes), dim=entry.split_dim or 0)[index]
                    .reshape(-1)
                )
            else:
                yield parameter(entry).reshape(-1)

        return pieces

    found: dict[str, LazyTensor] = {}
    for entry in entries:
        dtype = tensors[entry.hf_names[0]].dtype
        for i, (name, shape) in enumerate(stored_sections(entry)):
            found[name] = LazyTensor(dtype, shape, section(entry, i))
    return found


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], *, on_bytes: OnBytes) -> None:
    """Write a distributed checkpoint that has only weights into an empty folder.

    `torch.distributed.checkpoint.save` needs all tensors in memory, and in torch 2.13 keeps each
    until its file is closed. So this function writes the two files of the format, one tensor at a
    time. The weights file has the tensors one after the other, each as `torch.save` writes it. The
    metadata file has the offset of each.

    Args:
        folder: The folder.
        tensors: By their names in the checkpoint.
        on_bytes: Called with the size of each tensor that is written.
    """
    metadata = Metadata({}, storage_data={})
    with open(folder / _WEIGHTS_FILE, "wb") as file:
        for name, tensor in tensors.items():
            begin, origin, size = file.tell(), torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape)
            values = tensor.read()
            if values.untyped_storage().nbytes() > values.nbytes:
                values = values.clone()  # `torch.save` writes the storage of a view, not the view alone
            torch.save(values, file)
            chunks = [ChunkStorageMetadata(origin, size)]
            metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), size, chunks)
            index = MetadataIndex(name, origin)
            metadata.storage_data[index] = _StorageInfo(_WEIGHTS_FILE, begin, file.tell() - begin)
            on_bytes(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
