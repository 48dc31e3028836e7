"""What Hugging Face folders say of a model.

This is the model shape in `config.json`, and the pointer from an exported denoiser to its backbone.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.files import read_json_object
from megatron_twotower.config.schema import LAYER_KINDS, ModelConfig
from megatron_twotower.config.validation import validate_model

# Older configurations spell two of the layer types differently.
_LEGACY_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
# In the folder of a denoiser that was exported without its backbone: names that backbone.
POINTER_FILE = "context_tower.json"


def model_from_hf(config: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Read the shape of a backbone from the fields of its Hugging Face `config.json`.

    Args:
        config: The parsed file.
        source: Name of the file for error messages.

    Raises:
        UserError: Not a NemotronH configuration, a needed field is missing, or the model has a
            feature that is not built.
    """
    require(
        config.get("model_type") == "nemotron_h",
        f"{source}: found model_type {config.get('model_type')!r}, expected 'nemotron_h'",
    )
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        letters = {kind: letter for letter, kind in LAYER_KINDS.items()}
        kinds = config.get("layers_block_type") or config.get("layer_types") or []
        pattern = "".join(letters.get(_LEGACY_KINDS.get(kind, kind), "?") for kind in kinds)
    unsupported = {
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_proj_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "moe_latent_size": None,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }
    for key, expected in unsupported.items():
        found = config.get(key, expected)
        require(found == expected, f"{source}: {key}: found {found!r}, expected {expected!r}")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    values = {name: config[name] for name in names if name in config} | {"hybrid_override_pattern": pattern}
    missing = {"vocab_size", "hidden_size"} - values.keys()
    require(not missing, f"{source}: expected the fields {', '.join(sorted(missing))}")
    model = ModelConfig(**values)
    validate_model(model)
    return model


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a Hugging Face folder.

    Raises:
        UserError: The folder or the file is missing, or the file is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found, expected a Hugging Face model folder")
    return read_json_object(path, expected="the configuration of a model")


def read_pointer(folder: str | Path) -> dict[str, str] | None:
    """Read the pointer of a denoiser that was exported without its backbone.

    Returns:
        `backbone`, the folder of the backbone, and `sha256`, the fingerprint of the backbone. None
        if the folder has no pointer.

    Raises:
        UserError: The pointer cannot be read.
    """
    path = Path(folder) / POINTER_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return {"backbone": os.path.normpath(Path(folder) / found["backbone"]), "sha256": str(found["sha256"])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected backbone and sha256") from error
