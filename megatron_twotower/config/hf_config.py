"""What Hugging Face folders say of a model.

This is the model shape in `config.json`, and the pointer from an exported denoiser to its backbone.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.files import read_json_object
from megatron_twotower.config.schema import LAYER_KINDS, ModelConfig
from megatron_twotower.config.validation import validate_model

# The model types of folders with one tower, and with two. Older folders with two towers, and the
# released ones, have the former too.
MODEL_TYPE, TWO_TOWER_MODEL_TYPE = "nemotron_h", "nemotron_h_twotower"
# Older configurations spell two of the layer types differently.
_LEGACY_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
# In the folder of a denoiser that was exported without its backbone: names that backbone.
POINTER_FILE = "context_tower.json"
GENERATION_FILE = "generation_config.json"

# The values of `transformers` (NemotronHConfig) for fields that a `config.json` leaves out.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "intermediate_size": 21504,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "routed_scaling_factor": 1.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": (0.0, math.inf),
    "max_position_embeddings": 4096,
}
# Fields with one value that is built. It is also the value of a field that is left out.
ONLY_VALUES: Mapping[str, Any] = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
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
    "num_nextn_predict_layers": 0,
}
# Fields that change nothing that is computed here, and why.
WITHOUT_EFFECT: Mapping[str, str] = {
    "use_cache": "how transformers generates",
    "num_logits_to_keep": "how transformers generates",
    "output_router_logits": "what transformers returns",
    "use_mamba_kernels": "which kernels transformers calls",
    "moe_shared_expert_overlap": "when transformers computes the shared expert",
    "mamba_ssm_cache_dtype": "the states are float32 or wider",
    "residual_in_fp32": "the model of transformers does not read it",
    "sliding_window": "the model of transformers does not read it",
    "n_shared_experts": "the shared experts are one of moe_shared_expert_intermediate_size",
    "expand": "the width of Mamba is heads times head size",
    "rescale_prenorm_residual": "random weights only, which are always rescaled",
    "mtp_layers_block_type": "there are no layers of multi-token prediction",
    "pad_token_id": "generation pads with a mask, not with a token",
    "bos_token_id": "`data prepare` reads that of the tokenizer",
    "eos_token_id": "read by `read_special_tokens`",
}
# Other names that NemotronHConfig, or configurations of older models, have for a field.
OTHER_NAMES: Mapping[str, str] = {
    "attention_head_dim": "head_dim",
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}


def model_from_hf(config: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Read the shape of a backbone from the fields of its Hugging Face `config.json`.

    Fields that are left out have the values of `transformers`.

    Args:
        config: The parsed file.
        source: Name of the file for error messages.

    Raises:
        UserError: Not a NemotronH configuration, a field of the wrong type, two fields that
            disagree, or the model has a feature that is not built.
    """
    known = (MODEL_TYPE, TWO_TOWER_MODEL_TYPE)
    require(
        config.get("model_type") in known,
        f"{source}: found model_type {config.get('model_type')!r}, expected {' or '.join(map(repr, known))}",
    )
    found = _with_usual_names(config, source)
    for key, expected in ONLY_VALUES.items():
        value = found.get(key, expected)
        require(value == expected, f"{source}: {key}: found {value!r}, expected {expected!r}")
    values: dict[str, Any] = {
        "hybrid_override_pattern": _pattern(found, source),
        "time_step_clamp": _lower_limit(found, source),
    }
    for item in dataclasses.fields(ModelConfig):
        if item.name not in values:
            values[item.name] = _number(found, item.name, source, whole=item.type is int)
    model = ModelConfig(**values)
    validate_model(model)
    layers, pattern = found.get("num_hidden_layers"), model.hybrid_override_pattern
    require(
        layers in (None, model.num_layers),
        f"{source}: num_hidden_layers: found {layers!r}, expected {model.num_layers}, the layers of {pattern!r}",
    )
    return model


def _with_usual_names(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields under the names of `ModelConfig` and of NemotronHConfig."""
    found = dict(config)
    for name, usual in OTHER_NAMES.items():
        if name in config:
            value = found.setdefault(usual, config[name])
            require(
                value == config[name],
                f"{source}: found {name} {config[name]!r} and {usual} {value!r}, expected the same value or one field",
            )
    return found


def _number(found: Mapping[str, Any], key: str, source: str, *, whole: bool) -> float:
    """The number of a field, or that of transformers if it is left out."""
    value = found.get(key, DEFAULTS[key])
    if value is None and key == "num_key_value_heads":  # as in transformers
        value = found.get("num_attention_heads", DEFAULTS["num_attention_heads"])
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    require(fits, f"{source}: {key}: found {value!r}, expected a {'whole ' if whole else ''}number")
    return value if whole else float(value)


def _pattern(found: Mapping[str, Any], source: str) -> str:
    """The letters of the layers, from `hybrid_override_pattern` or `layers_block_type`."""
    pattern, kinds = found.get("hybrid_override_pattern"), found.get("layers_block_type")
    letters = {kind: letter for letter, kind in LAYER_KINDS.items()}
    if kinds is None:
        kinds = DEFAULTS["layers_block_type"] if pattern is None else []
    require(isinstance(kinds, list), f"{source}: layers_block_type: found {kinds!r}, expected a list")
    spelt = "".join(letters.get(_LEGACY_KINDS.get(str(kind), str(kind)), "?") for kind in kinds)
    require(
        not kinds or pattern in (None, spelt),
        f"{source}: found hybrid_override_pattern {pattern!r} and layers_block_type of {spelt!r}, expected the same",
    )
    pattern = spelt if pattern is None else pattern
    require(isinstance(pattern, str), f"{source}: hybrid_override_pattern: found {pattern!r}, expected letters")
    return pattern


def _lower_limit(found: Mapping[str, Any], source: str) -> float:
    """The lower clamp of the time step; an upper one is not built."""
    limits = found.get("time_step_limit", DEFAULTS["time_step_limit"])
    try:
        # transformers 5 writes infinity as {"__float__": "Infinity"}.
        low, high = (float(limit["__float__"] if isinstance(limit, Mapping) else limit) for limit in limits)
    except (TypeError, ValueError, KeyError):
        low, high = math.nan, math.nan
    require(
        0 <= low < high == math.inf,
        f"{source}: time_step_limit: found {limits!r}, expected a lower limit from 0 on and no upper one (Infinity)",
    )
    return low


def read_token_shift(folder: str | Path) -> bool:
    """Whether positions of the denoiser of a folder predict the next token, from `config.json`.

    Raises:
        UserError: The file cannot be read, or has something else than a boolean.
    """
    shift = read_object(Path(folder) / "config.json").get("token_shift", False)
    require(isinstance(shift, bool), f"{folder}/config.json: token_shift: found {shift!r}, expected true or false")
    return shift


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a Hugging Face folder.

    Raises:
        UserError: The folder or the file is missing, or the file is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found, expected a Hugging Face model folder")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no file."""
    return read_json_object(path, expected="a JSON object") if path.is_file() else {}


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
