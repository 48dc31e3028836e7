"""Hugging Face model folders: read by name, checked as a whole, and written in one step."""

import hashlib
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
from megatron_twotower.common.files import atomic_folder
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.convert.tensors import (
    LazyTensor,
    Span,
    TensorSource,
    Watch,
    read_header,
    stack,
    unwatched,
    write_safetensors,
)
from megatron_twotower.model.parameter_map import (
    Entry,
    Spelling,
    backbone_entries,
    context_name,
    folder_entries,
    hf_shapes,
    spelled_shapes,
)

SHARD_BYTES = 4 * 2**30
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
INDEX_FILE = "model.safetensors.index.json"
# Names that an error lists of each kind.
_LISTED = 3
# The tower that names with such a beginning belong to.
_TOWERS = {"backbone": "backbone", "model": "backbone", "context_tower": "context", "denoiser_tower": "denoiser"}
_STACKED = re.compile(r"\.mixer\.experts\.(up_proj|down_proj)$")


@dataclass(frozen=True)
class HfFolder:
    """The tensors of a Hugging Face folder by the names of the table, read one at a time.

    Reads hub-style NemotronH (`backbone.`, a tensor per expert), the style of `transformers`
    (`model.`, experts stacked in one tensor), two-tower folders, and denoisers alone.

    tensors: by the folder's own names. towers: which it has, of "backbone", "context" and
    "denoiser".
    """

    path: Path
    tensors: Mapping[str, Span]
    spelling: Spelling
    towers: frozenset[str]

    @classmethod
    def open(cls, path: str | Path) -> "HfFolder":
        """
        Raises: UserError: no weights, an index that does not agree with its files, or a file that
            is not whole.
        """
        folder = Path(path)
        wanted = _indexed(folder)
        files = sorted(set(wanted.values())) or sorted(file.name for file in folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors found, expected a Hugging Face model folder")
        found: dict[str, Span] = {}
        for file in files:
            spans = read_header(folder / file)
            twice = found.keys() & spans.keys()
            if twice:
                raise UserError(f"{folder / file}: found {min(twice)} in another file too, expected it once")
            found |= spans
        lost = [name for name, file in wanted.items() if name not in found or found[name].path.name != file]
        if lost:
            raise UserError(f"{folder / wanted[lost[0]]}: {listed(lost)} not found, expected as in {INDEX_FILE}")
        tops = {name.partition(".")[0] for name in found}
        prefix = "model." if "model" in tops else "backbone."
        spelling = Spelling(prefix, any(_STACKED.search(name) for name in found))
        return cls(folder, found, spelling, frozenset(_TOWERS[top] for top in tops & _TOWERS.keys()))

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name of the table.

        Raises:
            UserError: the folder has no such tensor.
        """
        return self.span(name).read()

    def span(self, name: str) -> Span:
        """Where the tensor of that name stands. Raises `UserError` as a call does."""
        key, row = self.spelling.key(name)
        if key not in self.tensors:
            raise UserError(f"{self.path}: tensor {key} not found, expected it in a NemotronH folder")
        return self.tensors[key] if row is None else self.tensors[key].row(row)

    def lazy(self, entries: Iterable[Entry], model: ModelConfig) -> dict[str, LazyTensor]:
        """The tensors of some entries by their names of the table, none of them read."""
        return {name: self.span(name).lazy() for name in hf_shapes(entries, model)}

    def backbone_names(self, model: ModelConfig) -> dict[str, str]:
        """The name in this folder of each tensor of its backbone, by its hub-style name.

        Raises:
            UserError: a denoiser alone.
        """
        if self.towers == {"denoiser"}:
            raise UserError(f"{self.path}: found a denoiser alone, expected a folder with its backbone")
        own = context_name if "context" in self.towers else str
        return {name: own(name) for name in hf_shapes(backbone_entries(model), model)}

    def check(self, config: RunConfig) -> None:
        """Compare all tensors with those of the towers that the folder has, in the shape that the run has.

        Raises: UserError: one that lists what is missing, of another shape or precision, or without
            a place in the model.
        """
        model = config.model
        entries = folder_entries(self.towers or {"backbone"}, model, config.conditioning.frequencies)
        expected = spelled_shapes(entries, model, self.spelling)
        shared = [name for name in expected if name in self.tensors]
        shapes = [name for name in shared if self.tensors[name].shape != expected[name]]
        kinds = [name for name in shared if self.tensors[name].dtype not in PRECISIONS]
        faults = [
            ("missing", [name for name in expected if name not in self.tensors]),
            ("of another shape", [f"{name} {self.tensors[name].shape} for {expected[name]}" for name in shapes]),
            ("of another dtype", [f"{name} {short(self.tensors[name].dtype)}" for name in kinds]),
            ("without a place in the model", sorted(self.tensors.keys() - expected.keys())),
        ]
        refuse(self.path, faults)


def _indexed(folder: Path) -> dict[str, str]:
    """The file of each tensor by the folder's index; empty where it has none."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        return {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error}), expected a weight_map") from error


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def refuse(path: Path, faults: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise one `UserError` that lists the faulty tensors of each kind, if there are any."""
    lines = [f"{len(names)} {kind} ({listed(names)})" for kind, names in faults if names]
    if lines:
        raise UserError(f"{path}: tensors {'; '.join(lines)}; expected those of its config.json")


def lazy_tensors(
    source: TensorSource, entries: Iterable[Entry], model: ModelConfig, *, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of some entries by name, each made by `source` when it is written."""

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
    shard_bytes: int = SHARD_BYTES,
    watch: Watch = unwatched,
) -> None:
    """Write a Hugging Face folder: safetensors shards with an index, `config.json` and what goes with them.

    All of it is written beside `output` first and renamed at the end: a folder is whole or not
    there.

    Args:
        files: further text files by name.
        copies: files to copy in.
        watch: told the bytes of all tensors, gives the report of progress.

    Raises:
        UserError: `output` exists, or the disk is full.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(output, size=size) as partial:
        shards, report = _shards(tensors, shard_bytes), watch(size)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(partial / file, {name: tensors[name] for name in names}, report=report)
            weight_map |= dict.fromkeys(names, file)
        for path in copies:
            shutil.copyfile(path, partial / path.name)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        texts = {**files, INDEX_FILE: json.dumps(index, indent=1, sort_keys=True)}
        texts["config.json"] = json.dumps(config, indent=2, sort_keys=True)
        for name, text in texts.items():
            (partial / name).write_text(text if text.endswith("\n") else text + "\n")


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file: as many as fit into `shard_bytes`, at least one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def spell(tensors: Mapping[str, LazyTensor], spelling: Spelling) -> dict[str, LazyTensor]:
    """Tensors by the names of the table -> tensors as a folder spells them."""
    spelled: dict[str, LazyTensor] = {}
    rows: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        key, row = spelling.key(name)
        if row is not None:
            rows.setdefault(key, []).append(tensor)
            tensor = stack(rows[key])
        spelled[key] = tensor
    return spelled


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a folder's configuration and weights: what it was started from."""
    digest = hashlib.sha256()
    for path in sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()
