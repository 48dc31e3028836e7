"""Small models with random values in every tensor, for tests that compare two computations."""

import dataclasses

import torch

from megatron_twotower.config.schema import (
    ConditioningConfig,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    RunConfig,
    TrainConfig,
)
from megatron_twotower.convert import hf_folder, initial_weights, load, model_card, tensors
from megatron_twotower.mcore import transformer_config
from megatron_twotower.model import parameter_map, towers

TINY = ModelConfig(
    hybrid_override_pattern="ME*-",
    vocab_size=48,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    mamba_num_heads=4,
    mamba_head_dim=6,
    ssm_state_size=5,
    n_groups=2,
    chunk_size=8,
    intermediate_size=32,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    moe_shared_expert_intermediate_size=16,
)


def tiny_config(
    pattern: str = "ME*-", *, block: int = 4, length: int = 16, objective: str = "two_tower", **train
) -> RunConfig:
    return RunConfig(
        objective=objective,
        model=dataclasses.replace(TINY, hybrid_override_pattern=pattern),
        conditioning=ConditioningConfig(frequencies=16),
        noise=NoiseConfig(block_size_tokens=block),
        data=DataConfig(sequence_length_tokens=length),
        train=TrainConfig(router_dtype="fp64", **train),
    )


def random_source(*, seed: int = 0, scale: float = 0.4) -> tensors.TensorSource:
    """Normal random values for every tensor by its name.

    Norms are near one; biases and tables are not at their initial values.
    """
    shapes: dict[str, torch.Size] = {}

    def source(name: str) -> torch.Tensor:
        key = sum(ord(c) * (i + 1) for i, c in enumerate(name)) + seed * 7919
        noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(key), dtype=torch.float64)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            return 1 + 0.3 * noise
        if name.endswith("A_log"):
            return 0.5 * noise
        if name.endswith("e_score_correction_bias"):
            return 0.05 * noise
        return noise * (scale if len(shapes[name]) == 1 or "table" in name else shapes[name][-1] ** -0.5)

    source.shapes = shapes
    return source


def with_shapes(source, entries, model):
    for entry in entries:
        parts = parameter_map.hf_from_parameter(entry, torch.empty(entry.shape, device="meta"), model)
        source.shapes.update(zip(entry.hf_names, (part.shape for part in parts), strict=True))
    return source


def build_two_tower(config: RunConfig, groups, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A two-tower model with random weights, and the source of the weights."""
    megatron = transformer_config.transformer_config(config)
    model = config.model
    context_entries = parameter_map.context_entries(model)
    entries = parameter_map.denoiser_entries(model, config.conditioning.frequencies)
    source = with_shapes(random_source(seed=seed), [*context_entries, *entries], model)
    context = towers.build_context_tower(config, megatron, groups).to(dtype)
    load.load_weights(context, context_entries, source, model=model, groups=groups)
    two_tower = towers.TwoTower(config, megatron, groups, context).to(dtype)
    load.load_weights(two_tower, entries, source, model=model, groups=groups)
    return two_tower, source


def random_noisy_batch(config: RunConfig, *, batch: int = 2, per_block: bool = True, seed: int = 0):
    from megatron_twotower.train.noise import noisy_batch
    from megatron_twotower.types import Batch

    generator = torch.Generator().manual_seed(seed)
    length, vocabulary = config.data.sequence_length_tokens, config.model.vocab_size
    tokens = torch.randint(4, vocabulary, (batch, length), generator=generator)
    masked = torch.rand(batch, length, generator=generator) < 0.5
    count = length // config.noise.block_size_tokens if per_block else 1
    times = torch.rand(batch, count, generator=generator)
    numbers = torch.arange(batch)
    return noisy_batch(Batch(tokens, numbers, numbers, numbers), masked, times, config.noise)


def planned_config(changes: dict[str, object]) -> RunConfig:
    """A model with all kinds of layers, on a layout: {"parallel.expert": 2, ...}."""
    model = dataclasses.replace(
        TINY,
        hybrid_override_pattern="ME*-ME",
        vocab_size=64,
        hidden_size=64,
        head_dim=16,
        mamba_head_dim=16,
        ssm_state_size=16,
        chunk_size=32,
        intermediate_size=96,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=48,
    )
    data = DataConfig(sequence_length_tokens=64, micro_batch_size=2, global_batch_size=8)
    config = RunConfig(
        model=model, conditioning=ConditioningConfig(frequencies=16), data=data, noise=NoiseConfig(block_size_tokens=8)
    )
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def write_backbone(folder, model):
    """Write a Hugging Face folder of a NemotronH with random weights, fp32."""
    source, entries = initial_weights.random_backbone(model, seed=11), parameter_map.backbone_entries(model)
    hf_folder.write_folder(
        folder,
        hf_folder.lazy_tensors(source, entries, model, dtype=torch.float32),
        config=model_card.backbone_config_json(model, dtype=torch.float32),
        files={},
        copies=[],
    )
    return folder
