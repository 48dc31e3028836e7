"""Small two-tower models of the shipped modelling file."""

import json

import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import NemotronHConfig
from transformers.generation.streamers import BaseStreamer

from megatron_twotower.hf import MODELING_FILE, twotower_config_json
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM

RELEASE = Version(transformers.__version__).release
# Before 5.6 the configuration of transformers knows no dense layer, and up to 5.12 at least its own
# scan is wrong beyond one chunk on a CPU. The shipped file has a scan of its own.
DENSE, LONG = RELEASE >= (5, 6), RELEASE >= (5, 17)


def known(pattern):
    return pattern if DENSE else pattern.replace("-", "E")


PATTERN = known("ME*-M")
PATTERNS = tuple(dict.fromkeys(map(known, ("M", "*", "E", "-", "ME*-M", "*E-MM*"))))
VOCABULARY, MASK, HIDDEN = 48, 3, 32
# Numbers with which a sampler commits sometimes one and sometimes several tokens of `tiny_model`.
TYPICAL_SAMPLERS = (
    "factor:2.5",
    "entropy_bound:2.5",
    "klass:0.2,1,1",
    "credit:0.3,0.9,0.9,0.3",
    "prefix:0.25",
    "early_end:0.4,2",
    "by_position:0.2,0.5",
    "by_step:0.5,0.2,2",
    "routed:0.5,1.2",
)


class Recorder(BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def tiny_fields(pattern=PATTERN, **changes):
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20,
        "routed_scaling_factor": 2.5,
        "layer_norm_epsilon": 1e-5,
        "time_step_min": 1e-30,
        "initializer_range": 0.02,
        "eos_token_id": None,  # a text has the length that a test asks for
        "torch_dtype": "float32",
    } | changes


def tiny_config(pattern=PATTERN, **changes):
    fields = tiny_fields(pattern, **changes)
    return NemotronHConfig(**{key: value for key, value in fields.items() if key != "model_type"})


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise * 0.3 + (1.0 if name.endswith(("norm.weight", "norm_f.weight")) else 0.0))
    return module.eval()


def tiny_model(pattern=PATTERN, *, seed=0, dtype=torch.float64, **changes):
    return randomise(NemotronHTwoTowerForCausalLM(tiny_config(pattern, **changes)), seed).to(dtype)


def random_ids(rows, length, seed=1):
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def become_backbone(model):
    """Give the denoiser the context tower's weights and the identity modulation."""
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.load_state_dict(model.context_lm_head.state_dict())
    with torch.no_grad():
        model.t_block[1].weight.zero_()
        model.t_block[1].bias.zero_()
        for table in model.scale_shift_tables:
            table.zero_()
            table[2] = 1.0
    return model


def save(folder, model, *, pattern=PATTERN, **changes):
    """Write a folder as the exporter does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    fields = tiny_fields(pattern, torch_dtype=str(model.dtype).removeprefix("torch."), **changes)
    (folder / "config.json").write_text(json.dumps(twotower_config_json(fields)))
    (folder / MODELING_FILE.name).write_bytes(MODELING_FILE.read_bytes())
