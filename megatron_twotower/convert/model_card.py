"""The files of an exported folder besides the weights.

These are `config.json`, the defaults of generation, the model card, and the files of the tokenizer.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_twotower.common.files import read_json_object
from megatron_twotower.config.hf_config import GENERATION_FILE, MODEL_TYPE
from megatron_twotower.config.phases import phase_number, resolve_phases
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.config.special_tokens import SpecialTokens, read_special_tokens
from megatron_twotower.convert.hf_folder import dtype_name
from megatron_twotower.data.tokenizer import CONFIG_FILE, EXACT_CLASS, rebuilt_class
from megatron_twotower.hf import twotower_config_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# transformers >= 5.3 clamps the time step at `time_step_min` in one of its two paths. Training does
# not clamp. `transformers` also takes the logarithm of this value, so it cannot be 0.
_NO_CLAMP = 1e-30


def backbone_config_json(model: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` for `transformers` of a backbone that was trained from random weights."""
    fields = dataclasses.asdict(model)
    clamp = fields.pop("time_step_clamp")
    return fields | {
        "model_type": MODEL_TYPE,
        "architectures": ["NemotronHForCausalLM"],
        "time_step_min": max(clamp, _NO_CLAMP),
        **_time_step_limit(clamp),
        "num_hidden_layers": model.num_layers,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "expand": 2,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype_name(dtype),
    }


def plain_config(found: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a plain NemotronH.

    Args:
        found: The `config.json` of the source, which may have two towers, or code in the folder.
        dtype: The dtype of the exported tensors.
    """
    plain = {key: value for key, value in found.items() if key not in ("auto_map", "token_shift")}
    return _with_dtype(plain | {"model_type": MODEL_TYPE, "architectures": ["NemotronHForCausalLM"]}, dtype)


def two_tower_config(found: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a folder with two towers, or with a denoiser alone.

    Args:
        found: The `config.json` of the source.
        dtype: The dtype of the exported tensors.
    """
    return _with_dtype(twotower_config_json(dict(found)), dtype)


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with another dtype, under the key that is there. transformers 5 writes `dtype`."""
    # transformers does not read the older name of the head size.
    if "attention_head_dim" in config:
        config = {"head_dim": config["attention_head_dim"]} | config
    return config | {"dtype" if "dtype" in config else "torch_dtype": dtype_name(dtype)}


def trained_config(found: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The `config.json` of a backbone's folder, with the clamp of time steps that a run used."""
    clamp = config.model.time_step_clamp
    lowest = {"time_step_min": max(clamp, _NO_CLAMP)} if config.objective == "ar" else {}
    return {**found, **lowest, **_time_step_limit(clamp)}


def with_token_shift(found: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A `config.json` with what the denoiser of a run says of its positions, and nothing else's."""
    kept = {key: value for key, value in found.items() if key != "token_shift"}
    return kept | ({"token_shift": True} if config.objective == "two_tower" and config.noise.token_shift else {})


def _time_step_limit(clamp: float) -> dict[str, Any]:
    """The field from which this project and the modelling file read the clamp; none without it."""
    return {"time_step_limit": [clamp, float("inf")]} if clamp else {}


def generation_config(folder: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of generation of a folder, or the special tokens of `config.json`.

    Args:
        folder: The source; `None` if there is none.
        config: The `config.json` of the source.
    """
    path = folder / GENERATION_FILE if folder else None
    if path and path.is_file():
        return read_json_object(path, expected="the defaults of generation")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in tokens if config.get(key) is not None}


def with_special_tokens(generation: Mapping[str, Any], said: SpecialTokens) -> dict[str, Any]:
    """The defaults of generation with the mask token and EOS that another file names.

    The ids of EOS are added to those that are there: text ends with each of them.
    """
    found, eos = dict(generation), generation.get("eos_token_id")
    own = [] if eos is None else eos if isinstance(eos, list) else [eos]
    ids = list(dict.fromkeys((*own, *said.eos_token_ids)))
    if ids:
        found["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    if said.mask_token_id is not None:
        found.setdefault("mask_token_id", said.mask_token_id)
    return found


def block_defaults(config: RunConfig, *, cursor: int) -> dict[str, Any]:
    """The defaults of generation by mask diffusion after a run has read `cursor` sequences.

    These are the mask token, the block size of the phase that the run has reached, and all block
    sizes that its denoiser was trained with.
    """
    phases = resolve_phases(config)
    reached = phases[: phase_number(phases, max(cursor - 1, 0)) + 1]
    before = read_special_tokens(config.init.denoiser).trained_block_sizes if config.init.denoiser else ()
    sizes = [*before, *(phase.noise.block_size_tokens for phase in reached if cursor)]
    defaults = {"mask_token_id": config.noise.mask_token_id, "block_size": reached[-1].noise.block_size_tokens}
    return defaults | ({"trained_block_sizes": sorted(set(sizes))} if sizes else {})


def tokenizer_files(*folders: Path | None) -> list[Path]:
    """The files of the tokenizer in the first folder that has one; empty if no folder has."""
    for folder in folders:
        if folder and (folder / TOKENIZER_FILES[0]).is_file():
            return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return []


def exact_tokenizer_config(tokenizer: Sequence[Path]) -> dict[str, str]:
    """The tokenizer_config.json with which AutoTokenizer takes tokenizer.json as it is.

    Args:
        tokenizer: The files of the tokenizer.

    Returns:
        Its text by its name; empty if the file among `tokenizer` needs no change.
    """
    for path in tokenizer:
        if path.name == CONFIG_FILE and rebuilt_class(path.parent):
            return {path.name: json.dumps(json.loads(path.read_text()) | {"tokenizer_class": EXACT_CLASS}, indent=2)}
    return {}


@dataclass(frozen=True)
class ModelCard:
    """The content of a model card.

    Attributes:
        what: The content of the folder, a key of `export.FOLDER_KINDS`.
        facts: The origin of the model, a row of a table each.
        recipe: Whether the folder has the recipe of the run.
    """

    what: str
    facts: Mapping[str, Any]
    recipe: bool

    def text(self, *, name: str) -> str:
        """The card in Markdown.

        Args:
            name: The name of the folder, for the code that loads it.
        """
        title, about, usage = (text.replace("{name}", name) for text in _TEXTS[self.what])
        rows = [f"| {key} | {_cell(value)} |" for key, value in self.facts.items() if value is not None]
        tags = ", ".join(("nemotron_h", *_TAGS[self.what]))
        parts = [
            f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{tags}]\n---",
            f"# {title}",
            about,
            "## Usage",
            f"```python\n{usage}```",
            *_NOTES[self.what],
            "## Provenance",
            "Written by `megatron_twotower`.",
            "\n".join(["| | |", "|---|---|", *rows]),
        ]
        if self.recipe:
            parts.append("`training.yaml` is the whole recipe of the run: `twotower train recipe=training.yaml`.")
        return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_facts(config: RunConfig, provenance: Mapping[str, Any], *, step: int, cursor: int) -> dict[str, Any]:
    """The facts of a model card for a model of a run.

    Args:
        config: The configuration of the run.
        provenance: Its `provenance.json`.
        step: The optimizer step of the checkpoint.
        cursor: The number of sequences that were read up to this step.
    """
    facts = {"objective": config.objective, "steps": step, "tokens": cursor * config.data.sequence_length_tokens}
    if config.objective == "two_tower":
        facts |= {"block size": block_defaults(config, cursor=cursor)["block_size"], "noise": _noise(config)}
    facts |= {"seed": str(config.seed), "ranks": provenance.get("ranks"), "precision": config.train.precision}
    folders = ("backbone", "backbone_sha256", "denoiser", "denoiser_sha256")
    facts |= {key: provenance.get(key) for key in (*folders, "commit")}
    versions = {key: provenance.get(key) for key in ("megatron_twotower", "python")}
    return facts | {"versions": versions | dict(provenance.get("packages", {}))}


def _noise(config: RunConfig) -> str:
    noise = config.noise
    levels = f"{noise.time_sampling} in {noise.time_min} to {noise.time_max}"
    shift = "; positions predict the next token" if noise.token_shift else ""
    return f"one level per {noise.time_per}, {levels}; loss {noise.weighting}{shift}"


_IMPORTS = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

"""
_PLAIN = (
    _IMPORTS
    + """tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}").eval()
inputs = tokenizer("France is a country ", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
)
_BLOCKS = (
    _IMPORTS
    + """tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True).eval()
inputs = tokenizer("France is a country ", return_tensors="pt")
outputs = model.generate_mask_diffusion(
    inputs["input_ids"], max_new_tokens=128, confidence_threshold=0.8
)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
)
# What to know of loading a folder with two towers, or with a denoiser alone.
_TRUST = (
    "`modeling_nemotron_h_twotower.py` in this folder is the code of the model, so transformers needs "
    "`trust_remote_code=True` and refuses the folder without it. `generate` and `forward` are those of the context "
    "tower, as in other causal language models; training through them (Trainer, PEFT) trains the context tower alone."
)
# Title, description and usage of each kind of folder.
_TEXTS = {
    "context": ("NemotronH", "A NemotronH language model, which writes one token after another.", _PLAIN),
    "two_tower": (
        "Two-tower block-diffusion language model",
        "A frozen context tower reads the text so far; a denoiser beside it fills a block of masked tokens in a few "
        "parallel passes. `generate_mask_diffusion` writes with both, `generate_ar` with the context tower alone, "
        "`generate_speculative` writes what `generate_ar` does from drafts of the denoiser.",
        _BLOCKS,
    ),
    "denoiser": (
        "Denoiser of a two-tower language model",
        "The trained half of a two-tower model. The frozen half is the backbone that `context_tower.json` names, with "
        "its SHA-256; it is read from there when the model is loaded. `twotower convert export --from {name} --to "
        "WHOLE --backbone BACKBONE` writes both into one folder.",
        _BLOCKS,
    ),
}
_NOTES = {"context": (), "two_tower": (_TRUST,), "denoiser": (_TRUST,)}
_TAGS = {"context": (), "two_tower": ("block-diffusion", "two-tower"), "denoiser": ("block-diffusion", "two-tower")}
