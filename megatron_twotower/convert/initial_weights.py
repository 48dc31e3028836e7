"""The initial weights of a run: random numbers, a backbone's folder, or towers trained before."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.keyed_random import keyed_uniform
from megatron_twotower.config.hf_config import read_pointer
from megatron_twotower.config.schema import ConditioningConfig, ModelConfig, RunConfig
from megatron_twotower.convert.hf_folder import HfFolder
from megatron_twotower.convert.tensors import LazyTensor, TensorSource
from megatron_twotower.model.adaln import identity_state
from megatron_twotower.model.parameter_map import backbone_entries, denoiser_entries, hf_shapes


def _uniform(name: str, shape: tuple[int, ...], *, seed: int, stream: int = 0) -> Tensor:
    """Uniform float64 numbers in [0, 1), a function of the tensor's name and the seed."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return keyed_uniform(seed, key, stream, torch.arange(math.prod(shape))).reshape(shape)


def _normal(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Normal float64 numbers by the Box-Muller transform, a function of name and seed."""
    radius = (-2 * (1 - _uniform(name, shape, seed=seed)).log()).sqrt()
    return radius * (2 * math.pi * _uniform(name, shape, seed=seed, stream=1)).cos()


def random_backbone(model: ModelConfig, *, seed: int) -> TensorSource:
    """A randomly initialised NemotronH, by names on the hub.

    Every tensor is a function of its name and the seed, so it is the same on every layout. Matrices
    are normal with the standard deviation `initializer_range`. Matrices that write to the residual
    stream are divided by sqrt(layers). Mamba's other tensors are initialised as in `transformers`.
    """
    shapes = hf_shapes(backbone_entries(model), model)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("A_log"):
            return torch.arange(1, shape[0] + 1).float().log()
        if name.endswith("dt_bias"):
            low, high = math.log(model.time_step_min), math.log(model.time_step_max)
            dt = (low + _uniform(name, shape, seed=seed) * (high - low)).exp().clamp(min=model.time_step_floor)
            return (dt + (-torch.expm1(-dt)).log()).float()
        if name.endswith(("conv1d.weight", "conv1d.bias")):
            bound = model.conv_kernel**-0.5
            return ((2 * _uniform(name, shape, seed=seed) - 1) * bound).float()
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        residual = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
        scale = model.initializer_range / (math.sqrt(model.num_layers) if residual else 1.0)
        return (_normal(name, shape, seed=seed) * scale).float()

    return source


def fresh_conditioning(model: ModelConfig, config: ConditioningConfig, *, seed: int) -> TensorSource:
    """The initial time conditioning, by the released names.

    `conditioning.initialisation` `identity` sets gate 1, shift 0 and scale 0, so that the denoiser
    starts as the backbone. `released` draws the scale-shift tables from a normal distribution with
    the standard deviation 1 / sqrt(hidden), as in the released model. Other matrices have the
    standard deviation `initializer_range`, and biases are 0.
    """
    hidden = model.hidden_size
    fixed = identity_state(hidden, model.num_layers, config) if config.initialisation == "identity" else {}

    def source(name: str) -> Tensor:
        if name in fixed:
            return fixed[name]
        if name.endswith("bias"):
            return torch.zeros(3 * hidden if name.startswith("t_block") else hidden)
        rows = 3 if name.startswith("scale_shift") else 3 * hidden if name.startswith("t_block") else hidden
        shape = (rows, config.frequencies if name == "t_embedder.mlp.0.weight" else hidden)
        scale = hidden**-0.5 if name.startswith("scale_shift") else model.initializer_range
        return _normal(name, shape, seed=seed).float() * scale

    return source


def backbone_source(config: RunConfig) -> TensorSource:
    """The tensors of the backbone by names on the hub: of `init.backbone`, or random.

    Raises:
        UserError: The folder has another model than its configuration describes, or no backbone.
    """
    backbone, model = config.init.backbone, config.model
    if backbone is None:
        return random_backbone(model, seed=config.seed)
    folder = HfFolder.open(backbone)
    folder.check(config)
    names = folder.backbone_names(model)
    return lambda name: folder(names[name])


def denoiser_source(config: RunConfig, backbone: TensorSource, *, fingerprint: str | None) -> TensorSource:
    """The initial tensors of the denoiser, by the released names.

    They are those of `init.denoiser`. If it is `None`, they are copies of the backbone and a fresh
    time conditioning.

    Args:
        config: The configuration of the run.
        backbone: The tensors of the backbone.
        fingerprint: The fingerprint of the backbone's folder; `None` if the backbone is random.

    Raises:
        UserError: The folder has no denoiser, another model, or its backbone has changed.
    """
    if config.init.denoiser is None:
        return _copied(config.model, backbone, fresh_conditioning(config.model, config.conditioning, seed=config.seed))
    folder = HfFolder.open(config.init.denoiser)
    if "denoiser" not in folder.towers:
        raise UserError(f"{folder.path}: no denoiser_tower found, expected a two-tower folder or a denoiser")
    folder.check(config)
    if other_context(config, fingerprint) is None:
        check_pointer(folder.path, config.init.backbone, fingerprint)
    return folder


def other_context(config: RunConfig, fingerprint: str | None) -> str | None:
    """What a start says of a denoiser that was trained with another context tower; None if not.

    Args:
        config: A resolved configuration.
        fingerprint: The fingerprint of `init.backbone`.
    """
    denoiser, backbone = config.init.denoiser, config.init.backbone
    if denoiser is None or backbone is None:
        return None
    pointer = read_pointer(denoiser)
    own = Path(pointer["backbone"] if pointer else denoiser)
    if own.resolve() == Path(backbone).resolve() or (pointer and pointer["sha256"] == fingerprint):
        return None
    return f"the denoiser of {denoiser} was trained with another context tower, that of {own}"


def untrained_denoiser(model: ModelConfig, backbone: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a denoiser at step 0, by the released names: copies, and a fresh conditioning.

    Args:
        backbone: The tensors of the backbone, by names on the hub. The conditioning has the dtype
            of its head.
    """
    defaults = RunConfig()
    conditioning = fresh_conditioning(model, defaults.conditioning, seed=defaults.seed)
    copies, dtype = _names_of_copies(model), backbone["lm_head.weight"].dtype

    def fresh(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(dtype, shape, lambda: iter((conditioning(name).to(dtype).flatten(),)))

    shapes = hf_shapes(denoiser_entries(model, defaults.conditioning.frequencies), model)
    return {
        name: backbone[copies[name]] if name in copies else fresh(name, tuple(shape)) for name, shape in shapes.items()
    }


def _copied(model: ModelConfig, backbone: TensorSource, conditioning: TensorSource) -> TensorSource:
    """A denoiser whose tower is a copy of the backbone."""
    copies = _names_of_copies(model)
    return lambda name: backbone(copies[name]) if name in copies else conditioning(name)


def _names_of_copies(model: ModelConfig) -> dict[str, str]:
    """The tensor of the backbone that each of the denoiser's tower is a copy of."""
    backbone_names, denoiser_names = (
        hf_shapes(entries, model) for entries in (backbone_entries(model), denoiser_entries(model, 0))
    )
    # The tower's entries are in the order of the backbone's, before the time conditioning.
    return dict(zip(denoiser_names, backbone_names, strict=False))


def check_pointer(denoiser: Path, backbone: str | Path | None, fingerprint: str | None) -> None:
    """Check that a denoiser belongs to a backbone.

    Args:
        denoiser: A folder. Without a pointer file, which names its backbone, it passes the check.
        backbone: The folder of the backbone, for the error.
        fingerprint: The fingerprint of the backbone.

    Raises:
        UserError: The fingerprint is not the one in the pointer file.
    """
    pointer = read_pointer(denoiser)
    if pointer is not None and pointer["sha256"] != fingerprint:
        raise UserError(
            f"{backbone}: found sha256 {fingerprint}, expected {pointer['sha256']}, the backbone of {denoiser}"
        )
