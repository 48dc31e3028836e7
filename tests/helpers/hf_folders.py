"""Hugging Face folders of every style with random weights, and a comparison of two of them."""

import dataclasses
import json

import torch

from helpers.models import TINY
from megatron_twotower.convert import hf_folder, model_card
from megatron_twotower.convert.hf_folder import spell
from megatron_twotower.convert.tensors import LazyTensor, Span, read_header
from megatron_twotower.hf import twotower_config_json
from megatron_twotower.model import parameter_map

MODEL = dataclasses.replace(TINY, hybrid_override_pattern="ME*-M")
# What a folder of each style holds, and how it spells it.
STYLES = {
    "hub": ({"backbone"}, parameter_map.Spelling()),
    "transformers": ({"backbone"}, parameter_map.Spelling("model.", stacked=True)),
    "two_tower": ({"context", "denoiser"}, parameter_map.Spelling()),
    "denoiser": ({"denoiser"}, parameter_map.Spelling()),
}


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return LazyTensor(dtype, shape, lambda: iter((values.to(dtype).flatten(),)))


def own_precision(name: str) -> torch.dtype:
    """Mix precisions as released checkpoints do: a few small tensors are wider than the rest."""
    return torch.float32 if name.endswith(("A_log", ".D", "e_score_correction_bias")) else torch.bfloat16


def write(path, style, *, model=MODEL, precision=own_precision, change=None, shard_bytes=20_000):
    """A folder of that style.

    change: applied to its tensors, by the folder's own names, before they are written.
    """
    towers, spelling = STYLES[style]
    entries = parameter_map.folder_entries(towers, model, 256)
    tensors = {n: random_tensor(n, shape, precision(n)) for n, shape in parameter_map.hf_shapes(entries, model).items()}
    tensors = spell(tensors, spelling)
    if change:
        tensors = change(tensors)
    config = model_card.backbone_config_json(model, dtype=torch.bfloat16) | {"a_field_of_its_own": 7}
    if "denoiser" in towers:
        config = twotower_config_json(config)
    hf_folder.write_folder(path, tensors, config=config, files={}, copies=[], shard_bytes=shard_bytes)
    return path


def spans(folder) -> dict[str, Span]:
    return {name: span for file in sorted(folder.glob("*.safetensors")) for name, span in read_header(file).items()}


def contents(folder) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The bytes, dtype and shape of every tensor of a folder."""
    return {
        name: (span.dtype, span.shape, span.read().flatten().view(torch.uint8).numpy().tobytes())
        for name, span in spans(folder).items()
    }


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())
