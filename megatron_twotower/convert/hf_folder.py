"""Hugging Face model folders: reading by name, checking all tensors, and writing in one step."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_folder, contents_sha256
from megatron_twotower.common.progress import BytesProgress, silent_bytes
from megatron_twotower.config.hf_config import read_object
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.convert.tensors import (
    FileTensor,
    LazyTensor,
    TensorSource,
    file_tensors,
    stack,
    write_safetensors,
)
from megatron_twotower.model.parameter_map import (
    Entry,
    TensorNaming,
    backbone_entries,
    context_name,
    folder_entries,
    folder_shapes,
    hf_shapes,
)

# The largest size of a written safetensors file, unless one tensor is larger.
SHARD_BYTES = 4 * 2**30
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
INDEX_FILE = "model.safetensors.index.json"
# How many names an error quotes.
_QUOTED_NAMES = 3
# Prefixes of tensor names, and the towers that they belong to.
_TOWERS = {"backbone": "backbone", "model": "backbone", "context_tower": "context", "denoiser_tower": "denoiser"}
_STACKED_EXPERTS = re.compile(r"\.mixer\.experts\.(up_proj|down_proj)$")


@dataclass(frozen=True)
class HfFolder:
    """The tensors of a Hugging Face folder, by the names of the parameter map.

    It is a `TensorSource`: a call with a name reads that tensor. Folders may have the NemotronH of
    the hub (prefix `backbone.`, one tensor per expert), that of `transformers` (prefix `model.`,
    the experts of a layer stacked in one tensor), two towers, or a denoiser alone.

    Attributes:
        path: The folder.
        tensors: All tensors, by the names in the folder.
        naming: How the folder names the tensors of its backbone.
        towers: The towers in the folder, of "backbone", "context" and "denoiser".
    """

    path: Path
    tensors: Mapping[str, FileTensor]
    naming: TensorNaming
    towers: frozenset[str]

    @classmethod
    def open(cls, path: str | Path) -> "HfFolder":
        """Read the index and the headers of all safetensors files.

        Raises:
            UserError: The folder has no weights, its index does not agree with its files, a file is
                not complete, or the weights are quantised.
        """
        folder = Path(path)
        if "quantization_config" in read_object(folder / "config.json"):
            raise UserError(f"{folder}/config.json: found quantization_config, expected weights that are not quantised")
        file_of = _read_index(folder)
        files = sorted(set(file_of.values())) or sorted(file.name for file in folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors found, expected a Hugging Face model folder")
        tensors: dict[str, FileTensor] = {}
        for file in files:
            found = file_tensors(folder / file)
            duplicates = tensors.keys() & found.keys()
            if duplicates:
                raise UserError(f"{folder / file}: found {min(duplicates)} in another file too, expected it once")
            tensors |= found
        absent = [name for name, file in file_of.items() if name not in tensors or tensors[name].path.name != file]
        if absent:
            file = file_of[absent[0]]
            raise UserError(f"{folder / file}: {quote_names(absent)} not found, expected as in {INDEX_FILE}")
        prefixes = {name.partition(".")[0] for name in tensors}
        naming = TensorNaming(
            "model." if "model" in prefixes else "backbone.", any(_STACKED_EXPERTS.search(name) for name in tensors)
        )
        return cls(folder, tensors, naming, frozenset(_TOWERS[prefix] for prefix in prefixes & _TOWERS.keys()))

    def __call__(self, name: str) -> Tensor:
        """Read a tensor by its name in the parameter map.

        Raises:
            UserError: The folder has no such tensor.
        """
        return self.tensor(name).read()

    def tensor(self, name: str) -> FileTensor:
        """A tensor by its name in the parameter map, not read yet.

        Raises:
            UserError: The folder has no such tensor.
        """
        key, row = self.naming.locate(name)
        if key not in self.tensors:
            raise UserError(f"{self.path}: tensor {key} not found, expected it in a NemotronH folder")
        return self.tensors[key] if row is None else self.tensors[key].at(row)

    def entry_tensors(self, entries: Iterable[Entry], model: ModelConfig) -> dict[str, LazyTensor]:
        """The tensors of some entries, by their names in the parameter map."""
        return {name: self.tensor(name).lazy() for name in hf_shapes(entries, model)}

    def backbone_tensors(self, model: ModelConfig) -> dict[str, LazyTensor]:
        """The tensors of the backbone, by their names on the hub."""
        return {hub: self.tensor(name).lazy() for hub, name in self.backbone_names(model).items()}

    def backbone_names(self, model: ModelConfig) -> dict[str, str]:
        """The names of the backbone's tensors on the hub, and their names in the parameter map.

        Raises:
            UserError: The folder has a denoiser alone.
        """
        if self.towers == {"denoiser"}:
            raise UserError(f"{self.path}: found a denoiser alone, expected a folder with its backbone")
        rename = context_name if "context" in self.towers else str
        return {name: rename(name) for name in hf_shapes(backbone_entries(model), model)}

    def check(self, config: RunConfig) -> None:
        """Compare all tensors with those of the folder's towers in the model of a run.

        Raises:
            UserError: Tensors are missing, unknown, or of another shape or dtype. The error has
                one line with all faults.
        """
        model = config.model
        entries = folder_entries(self.towers or {"backbone"}, model, config.conditioning.frequencies)
        expected = folder_shapes(entries, model, self.naming)
        shared = [name for name in expected if name in self.tensors]
        shapes = [name for name in shared if self.tensors[name].shape != expected[name]]
        dtypes = [name for name in shared if self.tensors[name].dtype not in PRECISIONS]
        faults = [
            ("missing", [name for name in expected if name not in self.tensors]),
            ("of another shape", [f"{name} {self.tensors[name].shape} for {expected[name]}" for name in shapes]),
            ("of another dtype", [f"{name} {dtype_name(self.tensors[name].dtype)}" for name in dtypes]),
            ("without a place in the model", sorted(self.tensors.keys() - expected.keys())),
        ]
        raise_faults(self.path, faults)


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor by the folder's index; empty if the folder has no index."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        return {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error}), expected a weight_map") from error


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`, as in `config.json`."""
    return str(dtype).removeprefix("torch.")


def quote_names(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    others = len(names) - _QUOTED_NAMES
    return ", ".join(names[:_QUOTED_NAMES]) + (f" and {others} more" if others > 0 else "")


def raise_faults(path: Path, faults: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Do nothing if no tensor has a fault.

    Args:
        path: The folder that has the tensors.
        faults: Pairs of a fault and the names of the tensors that have it.

    Raises:
        UserError: Tensors have faults. The error has one line with all of them.
    """
    lines = [f"{len(names)} {fault} ({quote_names(names)})" for fault, names in faults if names]
    if lines:
        raise UserError(f"{path}: tensors {'; '.join(lines)}; expected those of its config.json")


def lazy_tensors(
    source: TensorSource, entries: Iterable[Entry], model: ModelConfig, *, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of some entries by name. Each calls `source` when it is written."""

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(dtype, shape, lambda: iter((source(name).to(dtype).flatten(),)))

    return {name: lazy(name, shape) for name, shape in hf_shapes(entries, model).items()}


def write_folder(
    output: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    config: Mapping[str, Any],
    files: Mapping[str, str],
    copies: Sequence[Path],
    progress: BytesProgress = silent_bytes,
) -> None:
    """Write a Hugging Face folder: safetensors files with an index, `config.json` and other files.

    The folder is written under another name next to `output` and renamed at the end. So `output` is
    complete, or it does not exist.

    Args:
        output: The new folder.
        tensors: By their names in the folder.
        config: The content of `config.json`.
        files: The text of other files, by file name.
        copies: Files to copy into the folder.
        progress: Counts the bytes of the tensors.

    Raises:
        UserError: `output` exists, or the disk is full.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(output, size=size) as partial:
        shards, on_bytes = _shards(tensors), progress(size)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(partial / file, {name: tensors[name] for name in names}, on_bytes=on_bytes)
            weight_map |= dict.fromkeys(names, file)
        for path in copies:
            shutil.copyfile(path, partial / path.name)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        texts = {**files, INDEX_FILE: json.dumps(index, indent=1, sort_keys=True)}
        texts["config.json"] = json.dumps(config, indent=2, sort_keys=True)
        for name, text in texts.items():
            (partial / name).write_text(text if text.endswith("\n") else text + "\n")


def _shards(tensors: Mapping[str, LazyTensor]) -> list[list[str]]:
    """The tensor names of each file: as many tensors as fit into `SHARD_BYTES`, at least one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def rename_tensors(tensors: Mapping[str, LazyTensor], naming: TensorNaming) -> dict[str, LazyTensor]:
    """Tensors by their names in the parameter map -> tensors by their names in a folder."""
    renamed: dict[str, LazyTensor] = {}
    rows: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        key, row = naming.locate(name)
        if row is not None:
            rows.setdefault(key, []).append(tensor)
            tensor = stack(rows[key])
        renamed[key] = tensor
    return renamed


def fingerprint(folder: str | Path) -> str:
    """SHA-256, in hex, of the names and contents of `config.json` and all safetensors files."""
    return contents_sha256(sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")]))
