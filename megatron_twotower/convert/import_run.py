"""Import of a Hugging Face folder as a training run at step 0, tensor by tensor, in one process."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_twotower import __version__
from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_folder
from megatron_twotower.common.progress import BytesProgress, silent_bytes
from megatron_twotower.config import recipes
from megatron_twotower.config.hf_config import read_token_shift
from megatron_twotower.config.schema import FROM_FOLDER, InitConfig, NoiseConfig, RunConfig, TrainConfig
from megatron_twotower.convert.hf_folder import HfFolder, dtype_name, fingerprint, raise_faults
from megatron_twotower.convert.initial_weights import check_pointer
from megatron_twotower.convert.mcore_checkpoint import checkpoint_tensors, write_weights
from megatron_twotower.convert.tensors import LazyTensor
from megatron_twotower.model.parameter_map import Entry, denoiser_entries, trained_backbone_entries
from megatron_twotower.types import LogWindow


def import_folder(
    source: Path, run: Path, *, backbone: Path | None = None, progress: BytesProgress = silent_bytes
) -> RunConfig:
    """Write the run folder of a run that starts from the weights of a Hugging Face folder.

    A plain NemotronH becomes a run of the objective `ar`. A two-tower folder, or a denoiser alone,
    becomes a run of the objective `two_tower`. Its context tower stays in its folder, as in every
    run. The `config.yaml` of the run is a recipe to continue training with. The checkpoint of step
    0 has each tensor in its own dtype, so that an export gives the same bytes.

    Args:
        source: The Hugging Face folder.
        run: The new run folder.
        backbone: The folder of the backbone, if `source` has a denoiser alone; `None` for the
            folder in its pointer file.
        progress: Counts the bytes of the tensors.

    Returns:
        The configuration of the run.

    Raises:
        UserError: A tensor is missing, unknown, or of another shape or dtype, or `run` exists.
    """
    if run.exists():
        raise UserError(f"{run}: exists, expected a folder that is not there yet")
    folder = HfFolder.open(source)
    if backbone is not None and folder.towers != {"denoiser"}:
        raise UserError(f"--backbone: found {backbone}, but {source} has its own context tower")
    config = _run_config(folder, run, backbone)
    folder.check(config)
    backbone_path = config.init.backbone
    assert backbone_path is not None
    if HfFolder.open(backbone_path).towers == {"denoiser"}:
        raise UserError(f"{backbone_path}: found a denoiser alone, expected a folder with its backbone")
    sha256 = fingerprint(backbone_path)
    check_pointer(source, backbone_path, sha256)
    model, two_tower = config.model, config.objective == "two_tower"
    entries = denoiser_entries(model, config.conditioning.frequencies) if two_tower else trained_backbone_entries(model)
    tensors = folder.entry_tensors(entries, model)
    _check_fused(source, tensors, entries)
    weights = checkpoint_tensors(tensors, entries, model)
    size = sum(tensor.nbytes for tensor in weights.values())
    state = checkpoint_files.CheckpointState(
        step=0,
        cursor=0,
        updates=0,
        objective=config.objective,
        backbone=backbone_path,
        fingerprint=sha256,
        model=dataclasses.asdict(model),
        window=LogWindow(),
        configuration=dataclasses.asdict(config),
    )
    with atomic_folder(run, size=size) as partial:
        checkpoint = run_folder.checkpoint_folder(partial, 0)
        checkpoint.mkdir(parents=True)
        write_weights(checkpoint, weights, on_bytes=progress(size))
        files = {file.name: checkpoint_files.checksum(file) for file in checkpoint.iterdir()}
        checkpoint_files.write_state(checkpoint, dataclasses.replace(state, files=files))
        facts = run_folder.provenance(
            __version__, seed=config.seed, ranks=1, backbone=config.init.backbone, fingerprint=sha256
        )
        facts |= {"imported_from": str(source)}
        run_folder.write_start(partial, config=recipes.to_yaml(config), facts=facts)
    return config


def _run_config(folder: HfFolder, run: Path, backbone: Path | None) -> RunConfig:
    """The configuration of a run whose checkpoint has the trained weights of a folder.

    `init.backbone` has the other weights. `init.denoiser` is `None`, because the denoiser is in the
    checkpoint.
    """
    path, two_tower = str(folder.path), "denoiser" in folder.towers
    if not two_tower or "context" in folder.towers:
        init = InitConfig(backbone=path)
    else:
        init = InitConfig(backbone=str(backbone) if backbone else None, denoiser=path)
    dtype = folder.tensor("lm_head.weight").dtype
    shift = two_tower and read_token_shift(path)
    config = recipes.resolve(
        RunConfig(
            objective="two_tower" if two_tower else "ar",
            output=str(run),
            init=init,
            noise=NoiseConfig(block_size_tokens=FROM_FOLDER, mask_token_id=FROM_FOLDER, token_shift=shift),
            train=TrainConfig(precision="bf16" if dtype == torch.bfloat16 else "fp32"),
        )
    )
    return dataclasses.replace(config, init=InitConfig(backbone=config.init.backbone))


def _check_fused(path: Path, tensors: Mapping[str, LazyTensor], entries: Sequence[Entry]) -> None:
    """Refuse tensors of different dtypes that are one parameter in Megatron.

    A parameter has one dtype, so an import would have to convert some of them.
    """
    mixed = [
        ", ".join(f"{name} {dtype_name(tensors[name].dtype)}" for name in entry.hf_names)
        for entry in entries
        if len({tensors[name].dtype for name in entry.hf_names}) > 1
    ]
    raise_faults(path, [("of mixed dtypes in one layer", mixed)])
