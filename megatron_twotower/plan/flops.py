"""Floating-point operations of a step, by formula: 2 for each multiplication and addition of a matrix product.

Per position and layer, forward, in the symbols of `memory.py` and with i, g, d, m, p, Q for a Mamba
layer's inner width, groups, state size, heads, head size and chunk, and n positions that attention
reads:

    M  projections 2 h (2 i + 2 g d + m) + 2 i h, convolution 2 c taps, and the scan in chunks:
       scores and values 2 Q (g d + m p) within a chunk, states 4 m p d; a noisy position reads the clean part of its
       chunk and its own block, 2 (Q + S) (g d + m p), and one state, 2 m p d
    *  projections 2 h (H + 2 K) e + 2 H e h, and 4 H e n: causal n = (L + 1) / 2, noisy n = (L - S) / 2 + S
    -  4 h f
    E  router 2 h E, routed 4 k h x, shared 4 h s
    head 2 h V for each scored position: all of `ar`, a share t of a noisy sequence, E[t] = (time_min + time_max) / 2

A frozen layer runs forward (1), a trained one forward and backward (3), and once more forward where
it is recomputed. Norms, activations and the optimizer are not matrix products and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length


@dataclass(frozen=True)
class StepFlops:
    """Per token of the clean sequences. model: without recomputation; executed: with it. context is part of both."""

    model: float
    executed: float
    context: float


def _mamba(m: ModelConfig, length: int, block: int | None) -> float:
    h, inner, bc = m.hidden_size, m.mamba_inner, m.n_groups * m.ssm_state_size
    width = 2 * inner + 2 * bc + m.mamba_num_heads
    # With causal halves counted in full, as the products are made.
    chunk, state = chunk_length(block or 1, preferred=m.chunk_size), inner * m.ssm_state_size
    projections = 2 * h * width + 2 * inner * h + 2 * m.conv_kernel * (inner + 2 * bc)
    if block is None:
        return projections + 2 * chunk * (bc + inner) + 4 * state
    return projections + 2 * (chunk + block) * (bc + inner) + 2 * state


def _attention(m: ModelConfig, length: int, block: int | None) -> float:
    queries, keys = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    read = (length + 1) / 2 if block is None else (length - block) / 2 + block
    return 2 * m.hidden_size * (2 * queries + 2 * keys) + 4 * queries * read


def _mlp(m: ModelConfig, length: int, block: int | None) -> float:
    return 4 * m.hidden_size * m.intermediate_size


def _experts(m: ModelConfig, length: int, block: int | None) -> float:
    routed = m.num_experts_per_tok * m.moe_intermediate_size
    return 4 * m.hidden_size * (routed + m.moe_shared_expert_intermediate_size) + 2 * m.hidden_size * m.n_routed_experts


_LAYERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def layer_flops(model: ModelConfig, kind: str, *, length: int, block: int | None = None) -> float:
    """One layer's forward pass over one position: of a clean stream, or with a block of a noisy one."""
    return _LAYERS[kind](model, length, block)


def head_flops(model: ModelConfig) -> float:
    """The head's forward pass over one scored position."""
    return 2 * model.hidden_size * model.vocab_size


def context_layers(model: ModelConfig) -> str:
    """The layers of the context tower that run: up to the last that hands something on."""
    return model.hybrid_override_pattern.rstrip("E-")


def step_flops(
    config: RunConfig,
    *,
    objective: str | None = None,
    block: int | None = None,
    own: Sequence[PipelineStage] | None = None,
) -> StepFlops:
    """What a training step costs for each token, for its objective or the other, its block size or another.

    Args:
        own: stretches of layers, for what is theirs alone; None for the whole model.
    """
    model, length, noise = config.model, config.data.sequence_length_tokens, config.noise
    kinds, recomputed = model.hybrid_override_pattern, config.train.recompute_layers
    two_tower = (objective or config.objective) == "two_tower"
    block = (block or noise.block_size_tokens) if two_tower else None
    held = own if own is not None else (whole_model(model),)
    numbers = [number for stage in held for number in stage.layers]
    pattern = "".join(kinds[number] for number in numbers)
    forward = {kind: layer_flops(model, kind, length=length, block=block) for kind in set(pattern)}
    share = (noise.time_min + noise.time_max) / 2 if two_tower else (length - 1) / length
    head = share * head_flops(model) if any(stage.last for stage in held) else 0.0
    draws = noise.draws_per_context if two_tower else 1
    trained = 3 * draws * (sum(forward[kind] for kind in pattern) + head)
    # Recomputation is built for the denoiser alone.
    again = draws * sum(forward[kind] for kind in pattern if kind in recomputed) if two_tower else 0.0
    running = [kinds[number] for number in numbers if number < len(context_layers(model))] if two_tower else []
    frozen = sum(layer_flops(model, kind, length=length) for kind in running)
    return StepFlops(frozen + trained, frozen + trained + again, frozen)
