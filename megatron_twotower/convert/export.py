"""Export of a run's checkpoint, or of a Hugging Face folder, as a Hugging Face folder.

It runs in one process and reads one tensor at a time.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import BytesProgress, silent_bytes
from megatron_twotower.config import hf_config, overrides, recipes
from megatron_twotower.config.hf_config import POINTER_FILE
from megatron_twotower.config.schema import ConditioningConfig, ModelConfig, RunConfig
from megatron_twotower.config.special_tokens import SpecialTokens, read_special_tokens
from megatron_twotower.convert import model_card, vocabulary
from megatron_twotower.convert.hf_folder import HfFolder, fingerprint, rename_tensors, write_folder
from megatron_twotower.convert.initial_weights import check_pointer, untrained_denoiser
from megatron_twotower.convert.mcore_checkpoint import CheckpointWeights
from megatron_twotower.convert.tensors import LazyTensor, mean
from megatron_twotower.data.sources import tokenizer_folder, turn_ends
from megatron_twotower.data.tokenizer import TOKENIZER_FILE, check_same_ids, load_tokenizer
from megatron_twotower.hf import MODELING_FILE
from megatron_twotower.model.parameter_map import (
    TENSOR_NAMINGS,
    Entry,
    TensorNaming,
    context_name,
    denoiser_entries,
    trained_backbone_entries,
)

LazyTensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class ExportOptions:
    """The choices of an export.

    Attributes:
        what: A key of `FOLDER_KINDS`; `None` for all towers of the source. Two towers of a plain
            NemotronH are with an untrained denoiser.
        dtype: The dtype of all tensors but the selection biases of routers, which stay float32;
            `None` for the dtype that each tensor is stored in.
        style: A key of `TENSOR_NAMINGS`, for a plain NemotronH; `None` for the style of the
            backbone's folder, or "hub".
        step: The optimizer step of the checkpoint; `None` for the newest.
        average: The number of checkpoints up to that one whose trained weights are averaged.
        backbone: The folder of the backbone of a run or of a denoiser alone; `None` for the folder
            in the configuration of the run, or in the pointer file of the denoiser. Of a folder
            with two towers: another context tower for its denoiser; `None` for its own.
        tokenizer: The folder of the tokenizer whose entries the model keeps, all of which it has;
            `None` for its own.
    """

    what: str | None = None
    dtype: torch.dtype | None = None
    style: str | None = None
    step: int | None = None
    average: int = 1
    backbone: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class ExportableModel:
    """A model that can be exported. Its tensors are not read yet.

    Attributes:
        backbone: The context tower, or the tower of a plain NemotronH, under the names of the style
            "hub".
        denoiser: The denoiser with the time conditioning; empty for a plain NemotronH.
        config: The content of the source's `config.json`.
        naming: How the folder of the backbone names its tensors.
        origin: The folder of the context tower, and its fingerprint; `None` if a run has none.
        generation: The defaults of generation.
        tokenizer: The files of the tokenizer.
        facts: The facts of the model card.
        recipe: The text of the run's recipe; `None` if the source is a Hugging Face folder.
    """

    backbone: LazyTensors
    denoiser: LazyTensors
    config: Mapping[str, Any]
    naming: TensorNaming
    origin: tuple[Path, str] | None
    generation: Mapping[str, Any]
    tokenizer: list[Path]
    facts: Mapping[str, Any]
    recipe: str | None = None


def export(
    source: Path, output: Path, *, options: ExportOptions = ExportOptions(), progress: BytesProgress = silent_bytes
) -> str:
    """Write a model as a Hugging Face folder.

    Args:
        source: The output folder of a training run, or a Hugging Face folder.
        output: The new folder.
        options: What to write, and how.
        progress: Counts the bytes of the tensors.

    Returns:
        The key in `FOLDER_KINDS` of what was written.

    Raises:
        UserError: There is nothing to export, the source has faults, or `output` exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists, expected a folder that is not there yet")
    model = _open_folder(source, options) if (source / "config.json").is_file() else _open_run(source, options)
    what = options.what or ("two_tower" if model.denoiser else "context")
    if options.tokenizer is not None:
        if what == "denoiser":
            raise UserError(
                f"--tokenizer: found {options.tokenizer} to export a denoiser alone, expected its backbone too"
            )
        model = _with_vocabulary(model, options.tokenizer, source=source)
    if what == "two_tower" and not model.denoiser:
        model = _with_untrained_denoiser(model)
    if what == "denoiser" and not model.denoiser:
        raise UserError(f"{source}: found one tower, expected two to export {what}")
    if what != "context" and options.style is not None:
        raise UserError(f"--style: found {options.style} to export {what}, expected it for a plain NemotronH")
    kind = FOLDER_KINDS[what]
    tensors = {name: _converted(name, tensor, options.dtype) for name, tensor in kind.tensors(model, options).items()}
    card = model_card.ModelCard(what, model.facts, recipe=model.recipe is not None)
    files = {
        "README.md": card.text(name=output.name),
        model_card.GENERATION_FILE: json.dumps(model.generation, indent=2),
        **model_card.exact_tokenizer_config(model.tokenizer),
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
        progress=progress,
    )
    return what


def _with_untrained_denoiser(model: ExportableModel) -> ExportableModel:
    """The model with the denoiser that a run would start from."""
    shape = hf_config.model_from_hf(dict(model.config), source="config.json")
    denoiser = untrained_denoiser(shape, model.backbone)
    return dataclasses.replace(model, denoiser=denoiser, facts={**model.facts, "denoiser": "untrained"})


def _with_vocabulary(model: ExportableModel, tokenizer: Path, *, source: Path) -> ExportableModel:
    """The model with the entries of another tokenizer (see `vocabulary`)."""
    if not model.tokenizer:
        raise UserError(f"{source}: found no tokenizer, expected one for --tokenizer")
    rows = vocabulary.rows_of_entries(tokenizer, model.tokenizer[0].parent)
    return dataclasses.replace(
        model,
        backbone=vocabulary.with_rows(model.backbone, rows),
        denoiser=vocabulary.with_rows(model.denoiser, rows),
        config=vocabulary.with_new_ids(model.config, rows, source=f"{source}/config.json") | {"vocab_size": len(rows)},
        generation=vocabulary.with_new_ids(model.generation, rows, source=f"{source}: generation"),
        tokenizer=model_card.tokenizer_files(tokenizer),
        facts={**model.facts, "entries of": tokenizer.name},
    )


def _converted(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)


# --- sources ---


def _open_run(run: Path, options: ExportOptions) -> ExportableModel:
    """A checkpoint of a run, and the backbone that the run started from."""
    checkpoints = _find_checkpoints(run, options)
    checkpoint = checkpoints[-1]
    state = checkpoint_files.read_state(checkpoint)
    config = recipes.load_recipe(str(run / run_folder.CONFIG_FILE), _moved_backbone(run, state.backbone, options))
    model, two_tower, backbone_path = config.model, config.objective == "two_tower", config.init.backbone
    if two_tower:
        _check_conditioning(config.conditioning)
    entries = denoiser_entries(model, config.conditioning.frequencies) if two_tower else trained_backbone_entries(model)
    trained = _trained_tensors(checkpoints, entries, model)
    origin = (Path(backbone_path), fingerprint(backbone_path)) if backbone_path and two_tower else None
    if origin and origin[1] != state.fingerprint:
        raise UserError(
            f"{backbone_path}: changed since the run, found sha256 {origin[1]}, expected {state.fingerprint}"
        )
    data = config.data.blend or config.data.folder
    data_tokenizer = tokenizer_folder(config) if data and Path(data).exists() else None
    said = read_special_tokens(data_tokenizer) if data_tokenizer else SpecialTokens()
    if data_tokenizer:  # answers of conversations end otherwise than texts
        said = dataclasses.replace(said, eos_token_ids=tuple(dict.fromkeys((*said.eos_token_ids, *turn_ends(config)))))
    if backbone_path:
        backbone = HfFolder.open(backbone_path)
        config_json = hf_config.read_hf_config(backbone_path)
    else:
        backbone = None
        config_json = model_card.backbone_config_json(model, dtype=trained["lm_head.weight"].dtype)
        config_json |= _special_ids(data_tokenizer)
    backbone_folder = backbone.path if backbone else None
    return ExportableModel(
        backbone=backbone.backbone_tensors(model) if two_tower and backbone else trained,
        denoiser=trained if two_tower else {},
        config=model_card.with_token_shift(
            model_card.trained_config(config_json, config) if state.step else config_json, config
        ),
        naming=backbone.naming if backbone and "backbone" in backbone.towers else TENSOR_NAMINGS["hub"],
        origin=origin,
        generation=model_card.with_special_tokens(model_card.generation_config(backbone_folder, config_json), said)
        | (model_card.block_defaults(config, cursor=state.cursor) if two_tower else {}),
        tokenizer=model_card.tokenizer_files(data_tokenizer, backbone_folder),
        facts=model_card.run_facts(config, run_folder.read_provenance(run), step=state.step, cursor=state.cursor)
        | ({"averaged steps": ", ".join(map(str, map(_step_of, checkpoints)))} if options.average > 1 else {}),
        recipe=(run / run_folder.CONFIG_FILE).read_text(),
    )


def _special_ids(tokenizer: Path | None) -> dict[str, int]:
    """The special tokens that `config.json` of a model from random weights takes from its data."""
    if tokenizer is None or not (tokenizer / TOKENIZER_FILE).is_file():
        return {}
    opened = load_tokenizer(tokenizer)
    ids = {"bos_token_id": opened.bos_token_id, "eos_token_id": opened.eos_token_id}
    return {key: value for key, value in ids.items() if value is not None}


def _moved_backbone(run: Path, recorded: str | None, options: ExportOptions) -> list[str]:
    """The override of a run's configuration that names the folder of a backbone that moved."""
    if options.backbone is None:
        if recorded is not None and not Path(recorded).is_dir():
            raise UserError(
                f"{recorded}: not found, expected the backbone of {run} (if it moved, name it with --backbone)"
            )
        return []
    if recorded is None:
        raise UserError(f"--backbone: found {options.backbone}, but {run} started from random weights")
    return [f"init.backbone={overrides.quoted(str(options.backbone))}"]


def _open_folder(path: Path, options: ExportOptions) -> ExportableModel:
    """A Hugging Face folder, and the folder of its context tower if that is another one."""
    folder, config_json = HfFolder.open(path), hf_config.read_hf_config(path)
    for flag, value, unset in (("--step", options.step, None), ("--average", options.average, 1)):
        if value != unset:
            raise UserError(f"{flag}: found {value}, but {path} is no training run and has no checkpoints")
    if options.backbone is not None and "denoiser" not in folder.towers:
        raise UserError(f"--backbone: found {options.backbone}, but {path} has no denoiser")
    config = RunConfig(model=hf_config.model_from_hf(config_json, source=f"{path}/config.json"))
    folder.check(config)
    backbone, sha256 = folder, fingerprint(path)
    facts = {"converted from": path.name, "sha256": sha256}
    denoiser: LazyTensors = {}
    if "denoiser" in folder.towers:
        entries = denoiser_entries(config.model, config.conditioning.frequencies)
        denoiser = folder.entry_tensors(entries, config.model)
        if "context" not in folder.towers or options.backbone is not None:
            backbone = HfFolder.open(_backbone_of(path, options))
            backbone.check(config)
            sha256 = fingerprint(backbone.path)
            check_pointer(path, backbone.path, sha256)
            check_same_ids(backbone.path, path)
            facts |= {"backbone": backbone.path.name, "backbone_sha256": sha256}
    generation = model_card.with_special_tokens(
        model_card.generation_config(path, config_json), read_special_tokens(path)
    )
    # A context tower that takes the place of another one brings its tokenizer, with its template.
    tokenizers = (path, backbone.path)
    if "context" in folder.towers and backbone is not folder:
        generation = model_card.with_special_tokens(generation, read_special_tokens(backbone.path))
        tokenizers = (backbone.path, path)
    return ExportableModel(
        backbone=backbone.backbone_tensors(config.model),
        denoiser=denoiser,
        config=config_json,
        naming=backbone.naming if "backbone" in backbone.towers else TENSOR_NAMINGS["hub"],
        origin=(backbone.path, sha256),
        generation=generation,
        tokenizer=model_card.tokenizer_files(*tokenizers),
        facts=facts,
    )


def _find_checkpoints(run: Path, options: ExportOptions) -> list[Path]:
    """The checkpoint that is exported, after those that are averaged with it."""
    checkpoints = checkpoint_files.find_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run}: no checkpoint found, expected the output of a training run, or a Hugging Face folder")
    wanted = checkpoints[-1] if options.step is None else run_folder.checkpoint_folder(run, options.step)
    steps = ", ".join(map(str, map(_step_of, checkpoints)))
    if wanted not in checkpoints:
        raise UserError(f"{run}: found no checkpoint of step {options.step}, expected one of {steps}")
    found = checkpoints[: checkpoints.index(wanted) + 1]
    if options.average > len(found):
        raise UserError(
            f"--average: found {options.average}, expected at most the {len(found)} checkpoints of {run} up to step "
            f"{_step_of(wanted)} (there are {steps}; train.keep_checkpoints keeps more)"
        )
    return found[-options.average :]


def _step_of(checkpoint: Path) -> int:
    return checkpoint_files.read_state(checkpoint).step


def _trained_tensors(checkpoints: Sequence[Path], entries: list[Entry], model: ModelConfig) -> dict[str, LazyTensor]:
    """The trained tensors of a checkpoint, or their means over several."""
    opened = [CheckpointWeights.open(checkpoint) for checkpoint in checkpoints]
    for weights in opened:
        weights.check(entries)
    tensors = [weights.entry_tensors(entries, model) for weights in opened]
    if len(tensors) == 1:
        return tensors[0]
    return {name: mean([each[name] for each in tensors]) for name in tensors[0]}


def _backbone_of(denoiser: Path, options: ExportOptions) -> Path:
    """The folder of the backbone of a denoiser alone."""
    pointer = hf_config.read_pointer(denoiser)
    if options.backbone is None and pointer is None:
        raise UserError(f"{denoiser}: found a denoiser without {POINTER_FILE}, expected --backbone")
    backbone = options.backbone or Path((pointer or {})["backbone"])
    if not backbone.is_dir():
        raise UserError(
            f"{backbone}: not found, expected the backbone of {denoiser} (if it moved, name it with --backbone)"
        )
    return backbone


def _check_conditioning(config: ConditioningConfig) -> None:
    """Refuse a conditioning that the released format has no keys for."""
    released = ConditioningConfig()
    for key in ("frequencies", "period", "time_scale", "without"):
        found, expected = getattr(config, key), getattr(released, key)
        if found != expected:
            raise UserError(f"conditioning.{key}: found {found}, expected {expected} for an export")


# --- kinds of folders ---


def _context_tensors(model: ExportableModel, options: ExportOptions) -> LazyTensors:
    return rename_tensors(model.backbone, TENSOR_NAMINGS[options.style] if options.style else model.naming)


def _denoiser_tensors(model: ExportableModel, _: ExportOptions) -> LazyTensors:
    return model.denoiser


def _two_tower_tensors(model: ExportableModel, _: ExportOptions) -> LazyTensors:
    return {context_name(name): tensor for name, tensor in model.backbone.items()} | dict(model.denoiser)


def _pointer_file(model: ExportableModel, output: Path) -> dict[str, str]:
    assert model.origin is not None
    folder, sha256 = model.origin
    pointer = {"backbone": os.path.relpath(folder.resolve(), output.resolve()), "sha256": sha256}
    return {POINTER_FILE: json.dumps(pointer, indent=2)}


def _no_files(_: ExportableModel, __: Path) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class FolderKind:
    """The content of one kind of folder.

    Attributes:
        tensors: Returns the tensors, by their names in the folder.
        config: Returns the content of `config.json` for the source's `config.json` and a dtype.
        files: Returns the text of other files, by file name.
        code: Files of code to copy.
    """

    tensors: Callable[[ExportableModel, ExportOptions], LazyTensors]
    config: Callable[..., dict[str, Any]]
    files: Callable[[ExportableModel, Path], dict[str, str]]
    code: tuple[Path, ...]


FOLDER_KINDS = {
    "two_tower": FolderKind(_two_tower_tensors, model_card.two_tower_config, _no_files, (MODELING_FILE,)),
    "context": FolderKind(_context_tensors, model_card.plain_config, _no_files, ()),
    "denoiser": FolderKind(_denoiser_tensors, model_card.two_tower_config, _pointer_file, (MODELING_FILE,)),
}
