"""Formulas of the floating-point operations of a training step.

Each multiplication and each addition of a matrix product counts 1. The formulas are the operations
of a forward pass per position and layer, in the symbols of `activations.py`. For a Mamba layer, i
is the inner width, g the groups, d the state size, m the heads, p the head size and Q the chunk.
For attention, n is the number of positions that are read.

    M     projections 2 h (2 i + 2 g d + m) + 2 i h, convolution 2 c taps, and the scan in chunks:
          scores and values 2 Q (g d + m p) within a chunk, states 4 m p d. A noisy position reads
          the clean part of its chunk and its block, 2 (Q + S) (g d + m p), and one state, 2 m p d
    *     projections 2 h (H + 2 K) e + 2 H e h, and 4 H e n: causal n = (L + 1) / 2,
          noisy n = (L - S) / 2 + S
    -     4 h f
    E     router 2 h E, routed 4 k h x, shared 4 h s
    head  2 h V per scored position: all of `ar`, a share t of a noisy sequence,
          E[t] = (time_min + time_max) / 2. The head of the context tower runs there too if it
          gives targets

A frozen layer runs forward (1), a trained layer forward and backward (3), and a recomputed layer
once more forward. Norms, activation functions and the optimizer are no matrix products and not
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations per token of the clean sequences.

    Attributes:
        model: Without recomputation.
        executed: With recomputation.
        context: Of the context tower; both others include it.
    """

    model: float
    executed: float
    context: float


def _mamba(m: ModelConfig, length: int, block: int | None, load: float) -> float:
    h, inner, bc = m.hidden_size, m.mamba_inner, m.n_groups * m.ssm_state_size
    width = 2 * inner + 2 * bc + m.mamba_num_heads
    # Products within a chunk compute all pairs of positions, also those that the causal mask hides.
    chunk, state = chunk_length(block or 1, preferred=m.chunk_size), inner * m.ssm_state_size
    projections = 2 * h * width + 2 * inner * h + 2 * m.conv_kernel * (inner + 2 * bc)
    if block is None:
        return projections + 2 * chunk * (bc + inner) + 4 * state
    return projections + 2 * (chunk + block) * (bc + inner) + 2 * state


def _attention(m: ModelConfig, length: int, block: int | None, load: float) -> float:
    queries, keys = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    read = (length + 1) / 2 if block is None else (length - block) / 2 + block
    return 2 * m.hidden_size * (2 * queries + 2 * keys) + 4 * queries * read


def _mlp(m: ModelConfig, length: int, block: int | None, load: float) -> float:
    return 4 * m.hidden_size * m.intermediate_size


def _experts(m: ModelConfig, length: int, block: int | None, load: float) -> float:
    routed = load * m.num_experts_per_tok * m.moe_intermediate_size
    return 4 * m.hidden_size * (routed + m.moe_shared_expert_intermediate_size) + 2 * m.hidden_size * m.n_routed_experts


_LAYERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def layer_flops(model: ModelConfig, kind: str, *, length: int, block: int | None = None, load: float = 1.0) -> float:
    """The operations of a layer's forward pass per position.

    Args:
        model: The shapes of the model.
        kind: The letter of the layer in the pattern.
        length: The sequence length.
        block: The block size of a noisy stream; `None` for a clean stream.
        load: As `MicroBatchShape.expert_load`.
    """
    return _LAYERS[kind](model, length, block, load)


def head_flops(model: ModelConfig) -> float:
    """The operations of the head's forward pass per scored position."""
    return 2 * model.hidden_size * model.vocab_size


def context_layers(config: RunConfig) -> str:
    """The pattern of the context tower's layers that run.

    These are the layers up to the last one with a handoff, or all if the context tower gives
    targets.
    """
    pattern = config.model.hybrid_override_pattern
    return pattern if config.noise.distils else pattern.rstrip("E-")


def step_flops(
    config: RunConfig,
    *,
    objective: str | None = None,
    block: int | None = None,
    stages: Sequence[PipelineStage] | None = None,
    load: float = 1.0,
) -> StepFlops:
    """The operations of a training step per token.

    Args:
        config: The configuration.
        objective: An objective; `None` for that of the configuration.
        block: A block size; `None` for `noise.block_size_tokens`.
        stages: The pipeline stages to count; `None` for the whole model.
        load: As `MicroBatchShape.expert_load`, for the operations of the busiest rank.
    """
    model, length, noise = config.model, config.data.sequence_length_tokens, config.noise
    kinds, recomputed = model.hybrid_override_pattern, config.train.recompute_layers
    two_tower = (objective or config.objective) == "two_tower"
    block = (block or noise.block_size_tokens) if two_tower else None
    stages = stages if stages is not None else (whole_model(model),)
    layers = [layer for stage in stages for layer in stage.layers]
    pattern = "".join(kinds[layer] for layer in layers)
    forward = {kind: layer_flops(model, kind, length=length, block=block, load=load) for kind in set(pattern)}
    scored_share = (noise.time_min + noise.time_max) / 2 if two_tower else (length - 1) / length
    head = scored_share * head_flops(model) if any(stage.last for stage in stages) else 0.0
    draws = noise.draws_per_context if two_tower else 1
    trained = 3 * draws * (sum(forward[kind] for kind in pattern) + head)
    # Only the denoiser can be recomputed.
    again = draws * sum(forward[kind] for kind in pattern if kind in recomputed) if two_tower else 0.0
    running = [kinds[layer] for layer in layers if layer < len(context_layers(config))] if two_tower else []
    frozen = sum(layer_flops(model, kind, length=length, load=load) for kind in running)
    frozen += draws * head if two_tower and noise.distils else 0.0
    return StepFlops(model=frozen + trained, executed=frozen + trained + again, context=frozen)
