"""Export: a run's checkpoint, or a Hugging Face folder, as a Hugging Face folder. Tensor by tensor, in one process."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.config import hf_config
from megatron_twotower.config import recipes as settings
from megatron_twotower.config.hf_config import POINTER_FILE
from megatron_twotower.config.schema import ConditioningConfig, RunConfig
from megatron_twotower.convert import model_card
from megatron_twotower.convert.hf_folder import SHARD_BYTES, HfFolder, fingerprint, spell, write_folder
from megatron_twotower.convert.initial_weights import check_pointer
from megatron_twotower.convert.mcore_checkpoint import SavedWeights
from megatron_twotower.convert.tensors import LazyTensor, Watch, unwatched
from megatron_twotower.data.sources import tokenizer_folder
from megatron_twotower.hf import MODELING_FILE
from megatron_twotower.model.parameter_map import (
    SPELLINGS,
    Spelling,
    context_name,
    denoiser_entries,
    trained_backbone_entries,
)

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class ExportOptions:
    """What an export can be told.

    what: a key of `KINDS`; None for all there is.
    dtype: of the tensors (router biases stay float32); None for each as it is stored.
    style: a key of `SPELLINGS`, for a plain NemotronH; None for that of the folder it comes from,
    or "hub".
    step: of the checkpoint; None for the newest.
    backbone: the folder that a denoiser alone goes with; None for the one it points to.
    """

    what: str | None = None
    dtype: torch.dtype | None = None
    style: str | None = None
    step: int | None = None
    backbone: Path | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class ExportSource:
    """What can be exported. None of its tensors is read yet.

    backbone: the context tower, or the one tower of a plain NemotronH, by hub-style names.
    denoiser: with the time conditioning; empty where there is one tower.
    config: fields of its `config.json`. spelling: of its backbone.
    origin: the folder of the context tower, and its fingerprint.
    facts, recipe: for the model card.
    """

    backbone: Tensors
    denoiser: Tensors
    config: Mapping[str, Any]
    spelling: Spelling
    origin: tuple[Path, str] | None
    generation: Mapping[str, Any]
    tokenizer: list[Path]
    facts: Mapping[str, Any]
    recipe: str | None = None


def export(source: Path, output: Path, *, choices: ExportOptions = ExportOptions(), watch: Watch = unwatched) -> str:
    """Write a model as a Hugging Face folder.

    Args:
        source: output folder of a training run, or a Hugging Face folder.
        watch: told the bytes that will be written, gives the report of progress.

    Returns:
        which of `KINDS` it is.

    Raises:
        UserError: nothing to export, something in it is not as it should be, or `output` exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists, expected a folder that is not there yet")
    model = from_folder(source, choices) if (source / "config.json").is_file() else from_run(source, choices)
    what = choices.what or ("two_tower" if model.denoiser else "context")
    if what != "context" and not model.denoiser:
        raise UserError(f"{source}: found one tower, expected two to export {what}")
    kind = KINDS[what]
    tensors = {name: _precise(name, tensor, choices.dtype) for name, tensor in kind.tensors(model, choices).items()}
    card = model_card.Card(what, model.facts, recipe=model.recipe is not None)
    files = {
        "README.md": card.text(name=output.name),
        model_card.GENERATION_FILE: json.dumps(model.generation, indent=2),
        **kind.files(model, output),
    }
    if model.recipe is not None:
        files["training.yaml"] = model.recipe
    write_folder(
        output,
        tensors,
        config=kind.config(model.config, dtype=tensors["lm_head.weight"].dtype),
        files=files,
        copies=[*model.tokenizer, *kind.code],
        shard_bytes=choices.shard_bytes,
        watch=watch,
    )
    return what


def _precise(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)


# --- what is exported ---------------------------------------------------------------------------------------------


def from_run(run: Path, choices: ExportOptions) -> ExportSource:
    """A checkpoint of a run, and the backbone it was started from."""
    folder = _checkpoint(run, choices.step)
    state, config = checkpoint_files.read_state(folder), settings.load_recipe(str(run / run_folder.CONFIG_FILE))
    two, base = config.objective == "two_tower", config.init.backbone
    if two:
        _check_conditioning(config.conditioning)
    model, saved = config.model, SavedWeights.open(folder)
    entries = denoiser_entries(model, config.conditioning.frequencies) if two else trained_backbone_entries(model)
    saved.check(entries)
    trained = saved.lazy(entries, model)
    origin = (Path(base), fingerprint(base)) if base and two else None
    if origin and origin[1] != state.fingerprint:
        raise UserError(f"{base}: changed since the run, found sha256 {origin[1]}, expected {state.fingerprint}")
    source = HfFolder.open(base) if base else None
    if source and base:
        described = hf_config.read_hf_config(base)
    else:
        described = model_card.backbone_config_json(model, dtype=trained["lm_head.weight"].dtype)
    data = tokenizer_folder(config) if config.data.folder or config.data.blend else None
    provenance = run_folder.read_provenance(run)
    return ExportSource(
        backbone=_backbone(source, config) if two and source else trained,
        denoiser=trained if two else {},
        config=model_card.trained_config(described, config) if state.step else described,
        spelling=source.spelling if source and "backbone" in source.towers else SPELLINGS["hub"],
        origin=origin,
        generation=model_card.generation_config(source.path if source else None, described)
        | (model_card.block_defaults(config) if two and state.step else {}),
        tokenizer=model_card.tokenizer_files(data, source.path if source else None),
        facts=model_card.run_facts(config, provenance, step=state.step, cursor=state.cursor),
        recipe=(run / run_folder.CONFIG_FILE).read_text(),
    )


def from_folder(path: Path, choices: ExportOptions) -> ExportSource:
    """A Hugging Face folder; a denoiser alone together with the backbone it goes with."""
    folder, described = HfFolder.open(path), hf_config.read_hf_config(path)
    config = RunConfig(model=hf_config.model_from_hf(described, source=f"{path}/config.json"))
    folder.check(config)
    home, sha256 = folder, fingerprint(path)
    facts = {"converted from": path.name, "sha256": sha256}
    denoiser: Tensors = {}
    if "denoiser" in folder.towers:
        denoiser = folder.lazy(denoiser_entries(config.model, config.conditioning.frequencies), config.model)
        if "context" not in folder.towers:
            home = HfFolder.open(_home(path, choices))
            home.check(config)
            sha256 = fingerprint(home.path)
            check_pointer(path, home.path, sha256)
            facts |= {"backbone": home.path.name, "backbone_sha256": sha256}
    return ExportSource(
        backbone=_backbone(home, config),
        denoiser=denoiser,
        config=described,
        spelling=home.spelling if "backbone" in home.towers else SPELLINGS["hub"],
        origin=(home.path, sha256),
        generation=model_card.generation_config(path, described),
        tokenizer=model_card.tokenizer_files(path, home.path),
        facts=facts,
    )


def _checkpoint(run: Path, step: int | None) -> Path:
    found = checkpoint_files.find_checkpoints(run)
    if not found:
        raise UserError(f"{run}: no checkpoint found, expected the output of a training run, or a Hugging Face folder")
    if step is None:
        return found[-1]
    wanted = run_folder.checkpoint_folder(run, step)
    if wanted not in found:
        steps = ", ".join(str(checkpoint_files.read_state(folder).step) for folder in found)
        raise UserError(f"{run}: found no checkpoint of step {step}, expected one of {steps}")
    return wanted


def _home(denoiser: Path, choices: ExportOptions) -> Path:
    """The folder of a denoiser's context tower."""
    pointer = hf_config.read_pointer(denoiser)
    if choices.backbone is None and pointer is None:
        raise UserError(f"{denoiser}: found a denoiser without {POINTER_FILE}, expected --backbone")
    home = choices.backbone or Path((pointer or {})["backbone"])
    if not home.is_dir():
        raise UserError(f"{home}: not found, expected the backbone of {denoiser} (--backbone names it where it moved)")
    return home


def _backbone(folder: HfFolder, config: RunConfig) -> Tensors:
    return {hub: folder.span(own).lazy() for hub, own in folder.backbone_names(config.model).items()}


def _check_conditioning(found: ConditioningConfig) -> None:
    """The released format has no key for these: a model that needs others could not be read back."""
    released = ConditioningConfig()
    for key in ("frequencies", "period", "time_scale"):
        if getattr(found, key) != getattr(released, key):
            raise UserError(
                f"conditioning.{key}: found {getattr(found, key)}, expected {getattr(released, key)} for an export"
            )


# --- as what ------------------------------------------------------------------------------------------------------


def _context(model: ExportSource, choices: ExportOptions) -> Tensors:
    return spell(model.backbone, SPELLINGS[choices.style] if choices.style else model.spelling)


def _denoiser(model: ExportSource, _: ExportOptions) -> Tensors:
    return model.denoiser


def _two_tower(model: ExportSource, _: ExportOptions) -> Tensors:
    return {context_name(name): tensor for name, tensor in model.backbone.items()} | dict(model.denoiser)


def _pointer(model: ExportSource, output: Path) -> dict[str, str]:
    assert model.origin is not None
    folder, sha256 = model.origin
    pointer = {"backbone": os.path.relpath(folder.resolve(), output.resolve()), "sha256": sha256}
    return {POINTER_FILE: json.dumps(pointer, indent=2)}


def _nothing(_: ExportSource, __: Path) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Kind:
    """One kind of folder: its tensors, its `config.json`, and what else stands in it."""

    tensors: Callable[[ExportSource, ExportOptions], Tensors]
    config: Callable[..., dict[str, Any]]
    files: Callable[[ExportSource, Path], dict[str, str]]
    code: tuple[Path, ...]


KINDS = {
    "two_tower": Kind(_two_tower, model_card.two_tower_config, _nothing, (MODELING_FILE,)),
    "context": Kind(_context, model_card.plain_config, _nothing, ()),
    "denoiser": Kind(_denoiser, model_card.two_tower_config, _pointer, (MODELING_FILE,)),
}
