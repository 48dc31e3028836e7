"""Weights between Hugging Face folders, Megatron modules and checkpoints, by the table in `names`.

- `tensors`: tensors that are not read yet; the safetensors format
- `folders`: Hugging Face folders, read by name, checked as a whole, written in one step
- `saved`: the weights of Megatron's checkpoints, read and written tensor by tensor
- `weights`: named tensors into Megatron modules; `start`: the tensors a run starts from
- `imports`, `exports`: the two commands; `describe`: config.json, model card, tokenizer; `progress`: the bar
"""

from megatron_twotower.convert.describe import backbone_config_json
from megatron_twotower.convert.exports import Choices, export
from megatron_twotower.convert.folders import HfFolder, fingerprint, lazy_tensors, write_folder
from megatron_twotower.convert.imports import import_folder
from megatron_twotower.convert.start import backbone_source, denoiser_source, fresh_conditioning, random_backbone
from megatron_twotower.convert.tensors import TensorSource
from megatron_twotower.convert.weights import load_weights

__all__ = [
    "Choices",
    "HfFolder",
    "TensorSource",
    "backbone_config_json",
    "backbone_source",
    "denoiser_source",
    "export",
    "fingerprint",
    "fresh_conditioning",
    "import_folder",
    "lazy_tensors",
    "load_weights",
    "random_backbone",
    "write_folder",
]
