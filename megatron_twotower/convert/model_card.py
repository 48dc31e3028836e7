"""What stands beside the weights in an exported folder: config.json, generation defaults, model card, tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.convert.hf_folder import short
from megatron_twotower.hf import twotower_config_json

GENERATION_FILE = "generation_config.json"
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
# transformers >= 5.3 clamps the time step at `time_step_min` in one of its two paths; training does
# not. It takes its logarithm, so that next to zero is as close as one gets.
_NO_CLAMP = 1e-30


def backbone_config_json(model: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a backbone trained here, for `transformers`."""
    fields = dataclasses.asdict(model)
    clamp = fields.pop("time_step_clamp")
    return fields | {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "time_step_min": max(clamp, _NO_CLAMP),
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
        "torch_dtype": short(dtype),
    }


def plain_config(found: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a plain NemotronH, from one of a folder that may have had two towers or code of its own."""
    own = {key: value for key, value in found.items() if key != "auto_map"}
    return in_precision(own | {"architectures": ["NemotronHForCausalLM"]}, dtype)


def two_tower_config(found: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    return in_precision(twotower_config_json(dict(found)), dtype)


def in_precision(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with the precision of the tensors, under the key that it already has (transformers 5 writes `dtype`)."""
    return config | {"dtype" if "dtype" in config else "torch_dtype": short(dtype)}


def trained_config(found: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The `config.json` of a backbone's folder, as it is right for what a run has trained."""
    clamp = config.model.time_step_clamp
    if config.objective == "ar":
        return {**found, "time_step_min": max(clamp, _NO_CLAMP)}
    return {**found, "time_step_limit": [clamp, float("inf")]} if clamp else dict(found)


def generation_config(folder: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a folder, or where it has none, the special tokens of `config.json`."""
    path = folder / GENERATION_FILE if folder else None
    if path and path.is_file():
        return dict(json.loads(path.read_text()))
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in tokens if config.get(key) is not None}


def block_defaults(config: RunConfig) -> dict[str, Any]:
    """What mask diffusion was trained for: the mask token, and the block size of the last phase."""
    sizes = [phase.block_size_tokens for phase in config.phases if phase.block_size_tokens is not None]
    return {"mask_token_id": config.noise.mask_token_id, "block_size": (sizes or [config.noise.block_size_tokens])[-1]}


def tokenizer_files(*folders: Path | None) -> list[Path]:
    """The tokenizer's files in the first folder that has one."""
    for folder in folders:
        if folder and (folder / TOKENIZER_FILES[0]).is_file():
            return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return []


@dataclass(frozen=True)
class Card:
    """A model card. facts: where the model comes from, one line each. recipe: the folder has the recipe of its run."""

    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    recipe: bool = False

    def text(self, *, name: str) -> str:
        """Markdown. name: of the folder, for the lines that load it."""
        title, about, usage = (text.replace("{name}", name) for text in _CARDS[self.what])
        rows = [f"| {key} | {_cell(value)} |" for key, value in self.facts.items() if value is not None]
        tags = ", ".join(("nemotron_h", *_TAGS[self.what]))
        parts = [
            f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{tags}]\n---",
            f"# {title}",
            about,
            "## Usage",
            f"```python\n{usage}```",
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


def run_facts(config: RunConfig, run: Mapping[str, Any], *, step: int, cursor: int) -> dict[str, Any]:
    """What a card says of a run. run: its `provenance.json`."""
    facts = {"objective": config.objective, "steps": step, "tokens": cursor * config.data.sequence_length_tokens}
    if config.objective == "two_tower":
        facts |= {"block size": block_defaults(config)["block_size"], "noise": _noise(config)}
    facts |= {"seed": str(config.seed), "ranks": run.get("ranks"), "precision": config.train.precision}
    facts |= {"backbone": run.get("backbone"), "backbone_sha256": run.get("backbone_sha256")}
    versions = {"megatron_twotower": run.get("megatron_twotower"), "python": run.get("python")}
    return facts | {"commit": run.get("commit"), "versions": versions | dict(run.get("packages", {}))}


def _noise(config: RunConfig) -> str:
    noise = config.noise
    levels = f"{noise.time_sampling} in {noise.time_min} to {noise.time_max}"
    return f"one level per {noise.time_per}, {levels}; loss {noise.weighting}"


_LOAD = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
_PLAIN = (
    _LOAD
    + """model = AutoModelForCausalLM.from_pretrained("{name}").eval()
inputs = tokenizer("France is a country ", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
)
_BLOCKS = (
    _LOAD
    + """model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True).eval()
inputs = tokenizer("France is a country ", return_tensors="pt")
outputs = model.generate_mask_diffusion(
    inputs["input_ids"], max_new_tokens=128, block_size=16, confidence_threshold=0.8,
    eos_token_id=tokenizer.eos_token_id,
)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
)
_CARDS = {
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
_TAGS = {"context": (), "two_tower": ("block-diffusion", "two-tower"), "denoiser": ("block-diffusion", "two-tower")}
