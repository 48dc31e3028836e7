"""Hugging Face folders of every style with random weights, and their contents for comparison."""

import dataclasses
import json
from unittest import mock

import torch

from helpers.models import TINY
from megatron_twotower.convert import hf_folder, model_card
from megatron_twotower.convert.tensors import FileTensor, LazyTensor, file_tensors
from megatron_twotower.hf import twotower_config_json
from megatron_twotower.model import parameter_map

MODEL = dataclasses.replace(TINY, hybrid_override_pattern="ME*-M")
# The towers of a folder of each style, and how it names the tensors of its backbone.
STYLES = {
    "hub": ({"backbone"}, parameter_map.TensorNaming()),
    "transformers": ({"backbone"}, parameter_map.TensorNaming("model.", stacked=True)),
    "two_tower": ({"context", "denoiser"}, parameter_map.TensorNaming()),
    "denoiser": ({"denoiser"}, parameter_map.TensorNaming()),
}


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return LazyTensor(dtype, shape, lambda: iter((values.to(dtype).flatten(),)))


def own_precision(name: str) -> torch.dtype:
    """The dtypes of released checkpoints: a few small tensors are float32."""
    return torch.float32 if name.endswith(("A_log", ".D", "e_score_correction_bias")) else torch.bfloat16


def write(path, style, *, model=MODEL, precision=own_precision, change=None):
    """Write a folder of a style, in several files.

    Args:
        change: Is called with the tensors by their names in the folder, returns those to write.
    """
    towers, naming = STYLES[style]
    entries = parameter_map.folder_entries(towers, model, 256)
    tensors = {n: random_tensor(n, shape, precision(n)) for n, shape in parameter_map.hf_shapes(entries, model).items()}
    tensors = hf_folder.rename_tensors(tensors, naming)
    if change:
        tensors = change(tensors)
    config = model_card.backbone_config_json(model, dtype=torch.bfloat16) | {"a_field_of_its_own": 7}
    if "denoiser" in towers:
        config = twotower_config_json(config)
    with mock.patch.object(hf_folder, "SHARD_BYTES", 20_000):
        hf_folder.write_folder(path, tensors, config=config, files={}, copies=[])
    return path


def tensors_of(folder) -> dict[str, FileTensor]:
    """All tensors of a folder by name."""
    return {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in file_tensors(file).items()
    }


def contents(folder) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.read().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors_of(folder).items()
    }


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())
