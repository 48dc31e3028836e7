"""Import: a Hugging Face folder as a training run that has taken no step yet. Tensor by tensor, in one process."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_twotower import __version__
from megatron_twotower.checkpoint import files as checkpoint_files
from megatron_twotower.common import run_folder
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_folder
from megatron_twotower.config import recipes as settings
from megatron_twotower.config.schema import InitConfig, RunConfig, TrainConfig
from megatron_twotower.convert.hf_folder import HfFolder, fingerprint, refuse, short
from megatron_twotower.convert.initial_weights import check_pointer
from megatron_twotower.convert.mcore_checkpoint import stored_weights, write_weights
from megatron_twotower.convert.tensors import LazyTensor, Watch, unwatched
from megatron_twotower.model.parameter_map import Entry, denoiser_entries, trained_backbone_entries
from megatron_twotower.types import LogWindow


def import_folder(source: Path, run: Path, *, backbone: Path | None = None, watch: Watch = unwatched) -> RunConfig:
    """Write the output folder of a run that starts from the weights of a Hugging Face folder.

    A plain NemotronH becomes a run of the objective `ar`; a two-tower folder, or a denoiser alone,
    one of `two_tower`, whose context tower stays in its folder, as that of every run. Its
    `config.yaml` is a recipe to go on with; the checkpoint of step 0 holds each tensor in its own
    precision, so that an export gives the same bytes back.

    Args:
        backbone: the folder that a denoiser alone goes with; None for the one it points to.
        watch: told the bytes that will be written, gives the report of progress.

    Returns:
        the configuration of the run.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or precision, or `run` exists.
    """
    if run.exists():
        raise UserError(f"{run}: exists, expected a folder that is not there yet")
    folder = HfFolder.open(source)
    config = _configuration(folder, run, backbone)
    folder.check(config)
    home = config.init.backbone
    assert home is not None
    if HfFolder.open(home).towers == {"denoiser"}:
        raise UserError(f"{home}: found a denoiser alone, expected a folder with its backbone")
    origin = fingerprint(home)
    check_pointer(source, home, origin)
    model, two = config.model, config.objective == "two_tower"
    entries = denoiser_entries(model, config.conditioning.frequencies) if two else trained_backbone_entries(model)
    tensors = folder.lazy(entries, model)
    _check_fused(source, tensors, entries)
    stored = stored_weights(tensors, entries, model)
    size = sum(tensor.nbytes for tensor in stored.values())
    state = checkpoint_files.CheckpointState(
        step=0,
        cursor=0,
        updates=0,
        objective=config.objective,
        backbone=home,
        fingerprint=origin,
        model=dataclasses.asdict(model),
        window=LogWindow(),
        configuration=dataclasses.asdict(config),
    )
    with atomic_folder(run, size=size) as partial:
        start = run_folder.checkpoint_folder(partial, 0)
        start.mkdir(parents=True)
        write_weights(start, stored, report=watch(size))
        files = {file.name: checkpoint_files.checksum(file) for file in start.iterdir()}
        checkpoint_files.write_state(start, dataclasses.replace(state, files=files))
        facts = run_folder.provenance(
            __version__, seed=config.seed, ranks=1, backbone=config.init.backbone, fingerprint=origin
        )
        facts |= {"imported_from": str(source)}
        run_folder.write_start(partial, config=settings.to_yaml(config), facts=facts)
    return config


def _configuration(folder: HfFolder, run: Path, backbone: Path | None) -> RunConfig:
    """Of a run that has `folder` behind it: the checkpoint holds what trains, `init.backbone` the rest."""
    path, two = str(folder.path), "denoiser" in folder.towers
    if not two or "context" in folder.towers:
        init = InitConfig(backbone=path)
    else:
        init = InitConfig(backbone=str(backbone) if backbone else None, denoiser=path)
    head = folder.span("lm_head.weight").dtype
    config = settings.resolve(
        RunConfig(
            objective="two_tower" if two else "ar",
            output=str(run),
            init=init,
            train=TrainConfig(precision="bf16" if head == torch.bfloat16 else "fp32"),
        )
    )
    return dataclasses.replace(config, init=InitConfig(backbone=config.init.backbone))


def _check_fused(path: Path, tensors: Mapping[str, LazyTensor], entries: Sequence[Entry]) -> None:
    """Tensors that are one parameter in Megatron must agree in precision, or one of them would be converted."""
    mixed = [
        ", ".join(f"{name} {short(tensors[name].dtype)}" for name in entry.hf_names)
        for entry in entries
        if len({tensors[name].dtype for name in entry.hf_names}) > 1
    ]
    refuse(path, [("of mixed dtypes in one layer", mixed)])
