"""Where the weights of a run start: random numbers, a backbone's folder, or towers that were trained before."""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.keyed_random import keyed_uniform
from megatron_twotower.config.hf_config import read_pointer
from megatron_twotower.config.schema import ConditioningConfig, ModelConfig, RunConfig
from megatron_twotower.convert.hf_folder import HfFolder
from megatron_twotower.convert.tensors import TensorSource
from megatron_twotower.model.adaln import identity_state
from megatron_twotower.model.parameter_map import backbone_entries, denoiser_entries, hf_shapes


def random_backbone(model: ModelConfig, *, seed: int) -> TensorSource:
    """A fresh NemotronH: every tensor drawn by its own name, so that it is the same on every layout.

    Matrices are normal with `initializer_range`, those that write to the residual stream divided by
    sqrt(layers); Mamba starts as `transformers` starts it.
    """
    shapes = hf_shapes(backbone_entries(model), model)

    def uniform(name: str, *, stream: int = 0) -> Tensor:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        count = math.prod(shapes[name])
        return keyed_uniform(seed, key, stream, torch.arange(count)).reshape(shapes[name])

    def normal(name: str) -> Tensor:
        radius = (-2 * (1 - uniform(name)).log()).sqrt()
        return radius * (2 * math.pi * uniform(name, stream=1)).cos()

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("A_log"):
            return torch.arange(1, shape[0] + 1).float().log()
        if name.endswith("dt_bias"):
            low, high = math.log(model.time_step_min), math.log(model.time_step_max)
            dt = (low + uniform(name) * (high - low)).exp().clamp(min=model.time_step_floor)
            return (dt + (-torch.expm1(-dt)).log()).float()
        if name.endswith(("conv1d.weight", "conv1d.bias")):
            bound = model.conv_kernel**-0.5
            return ((2 * uniform(name) - 1) * bound).float()
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        residual = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
        scale = model.initializer_range / (math.sqrt(model.num_layers) if residual else 1.0)
        return (normal(name) * scale).float()

    return source


def fresh_conditioning(model: ModelConfig, config: ConditioningConfig, *, seed: int) -> TensorSource:
    """Start of the time conditioning, under the released names: `identity` or `released`."""
    hidden = model.hidden_size
    fixed = identity_state(hidden, model.num_layers, config) if config.initialisation == "identity" else {}

    def source(name: str) -> Tensor:
        if name in fixed:
            return fixed[name]
        if name.endswith("bias"):
            return torch.zeros(3 * hidden if name.startswith("t_block") else hidden)
        fan_out = 3 if name.startswith("scale_shift") else 3 * hidden if name.startswith("t_block") else hidden
        shape = (fan_out, config.frequencies if name == "t_embedder.mlp.0.weight" else hidden)
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        first, second = (keyed_uniform(seed, key, i, torch.arange(math.prod(shape))) for i in (0, 1))
        normal = ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).reshape(shape).float()
        return normal * (hidden**-0.5 if name.startswith("scale_shift") else model.initializer_range)

    return source


def backbone_source(config: RunConfig) -> TensorSource:
    """The tensors of the backbone by hub-style names: of `init.backbone`, or random.

    Raises: UserError: the folder does not hold the model that its configuration describes, or no
        backbone.
    """
    backbone, model = config.init.backbone, config.model
    if backbone is None:
        return random_backbone(model, seed=config.seed)
    folder = HfFolder.open(backbone)
    folder.check(config)
    own = folder.backbone_names(model)
    return lambda name: folder(own[name])


def denoiser_source(config: RunConfig, backbone: TensorSource, *, fingerprint: str | None) -> TensorSource:
    """The tensors the denoiser starts from: those of `init.denoiser`, or the backbone's and a fresh time conditioning.

    Args:
        fingerprint: of the backbone.

    Raises:
        UserError: no denoiser, another model, or one that goes with another backbone.
    """
    if config.init.denoiser is None:
        return _copied(config.model, backbone, fresh_conditioning(config.model, config.conditioning, seed=config.seed))
    folder = HfFolder.open(config.init.denoiser)
    if "denoiser" not in folder.towers:
        raise UserError(f"{folder.path}: no denoiser_tower found, expected a two-tower folder or a denoiser")
    folder.check(config)
    check_pointer(folder.path, config.init.backbone, fingerprint)
    return folder


def _copied(model: ModelConfig, backbone: TensorSource, conditioning: TensorSource) -> TensorSource:
    tower, conditioned = hf_shapes(backbone_entries(model), model), hf_shapes(denoiser_entries(model, 0), model)
    copies = dict(zip(conditioned, tower, strict=False))  # the conditioning stands behind the tower
    return lambda name: backbone(copies[name]) if name in copies else conditioning(name)


def check_pointer(denoiser: Path, backbone: str | Path | None, fingerprint: str | None) -> None:
    """Refuse a backbone that is not the one a denoiser goes with."""
    pointer = read_pointer(denoiser)
    if pointer is not None and pointer["sha256"] != fingerprint:
        raise UserError(
            f"{backbone}: found sha256 {fingerprint}, expected {pointer['sha256']}, the backbone of {denoiser}"
        )
