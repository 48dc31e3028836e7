"""Formulas of the activations that a training step keeps between forward and backward pass.

Symbols of the formulas:

    T  noisy positions of a micro-batch on a rank, r L
    L  clean positions of a micro-batch on a rank, b l / C with C context-parallel ranks
    S  block size
    N  noise levels: the blocks T / S, or with one level per sequence r R
    R  rows of a micro-batch: b, or 2 b with context-parallel ranks, which have 2 stretches each
    h  hidden size
    w  bytes of an activation
    V  vocabulary size
    m  scored positions (in the loss), heads (in Mamba)
    Mamba: i inner channels, c channels of the convolution, p head size, d state size, Q chunk
    Attention: H heads, K key-value heads, e head size
    MLP: f width
    Experts: E experts, k experts of a token, x width of an expert, s width of the shared expert

The formulas describe a tensor-parallel group of one rank. Of t ranks, each keeps 1 / t of the
activations inside a mixer. With sequence parallelism it also keeps 1 / t of those between mixers.
Context-parallel ranks keep their positions, and the clean keys and values of all.
A test compares each formula with the tensors that autograd keeps, with operations in torch. With
the kernels of this project, a Mamba layer in bfloat16 keeps a tenth less, other layers as much.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_twotower.config.context_split import stretches_per_rank
from megatron_twotower.config.precision import PRECISIONS
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length
from megatron_twotower.plan.layout import expert_load

# Bytes of an element in scans and routers, whose precision is float32.
_FP32 = 4


@dataclass(frozen=True)
class KeptTensor:
    """One tensor, or several, that a layer keeps until its backward pass.

    Attributes:
        name: What it is.
        formula: Its bytes, in the symbols of this module.
        bytes: Its bytes.
        handoff: Whether it comes from the context tower.
        kept_by: The layers that keep it: "stored" (without recompute), "recomputed", or "all".
    """

    name: str
    formula: str
    bytes: int
    handoff: bool = False
    kept_by: Literal["stored", "recomputed", "all"] = "stored"


@dataclass(frozen=True)
class MicroBatchShape:
    """The shape of a micro-batch on one rank.

    Attributes:
        sequences: The number of sequences b.
        length: Their length l in tokens.
        block: The block size S.
        draws: Noise draws r per sequence.
        time_per_block: Whether each block has a noise level, and not each sequence.
        activation_bytes: Bytes of an activation.
        tensor: The ranks that split the activations inside a mixer.
        sequence: The tensor-parallel ranks that split the activations between mixers.
        context: The ranks that split the sequences.
        expert_tensor: The ranks that split each expert.
        expert_load: The tokens that this rank's experts get over the mean of all ranks.
    """

    sequences: int
    length: int
    block: int
    draws: int = 1
    time_per_block: bool = False
    activation_bytes: int = 4
    tensor: int = 1
    sequence: int = 1
    context: int = 1
    expert_tensor: int = 1
    expert_load: float = 1.0

    @property
    def clean(self) -> int:
        """Clean positions L."""
        return self.sequences * self.length // self.context

    @property
    def rows(self) -> int:
        """Rows R: the stretches of sequences on a rank."""
        return self.sequences * stretches_per_rank(self.context)

    @property
    def noisy(self) -> int:
        """Noisy positions T."""
        return self.draws * self.clean

    @property
    def noisy_on_rank(self) -> int:
        """The noisy positions of this rank between mixers."""
        return self.noisy // self.sequence

    @property
    def levels(self) -> int:
        """Noise levels N."""
        return self.noisy // self.block if self.time_per_block else self.draws * self.rows


def convolution_channels(model: ModelConfig, shape: MicroBatchShape) -> int:
    """The channels of a rank's convolution: x, B and C."""
    return (model.mamba_inner + 2 * model.n_groups * model.ssm_state_size) // shape.tensor


def key_value_width(model: ModelConfig, shape: MicroBatchShape) -> int:
    """The elements of a position's keys and values on a rank, 2 K e."""
    return 2 * model.num_key_value_heads * model.head_dim // shape.tensor


def _common(model: ModelConfig, shape: MicroBatchShape) -> Iterator[KeptTensor]:
    h, w, positions = model.hidden_size, shape.activation_bytes, shape.noisy_on_rank
    # Every rank computes shift, scale and gate of all levels, then selects those of its positions.
    modulation = 3 * shape.levels + (shape.levels // shape.sequence if shape.time_per_block else shape.levels)
    yield KeptTensor("input of the layer", "h w T", h * w * positions, kept_by="all")
    yield KeptTensor("outputs of norm, modulation and mixer", "3 h w T", 3 * h * w * positions)
    yield KeptTensor("shift, scale and gate", "4 h w N", modulation * h * w)


def _mamba(model: ModelConfig, shape: MicroBatchShape) -> Iterator[KeptTensor]:
    w, T, L, heads = shape.activation_bytes, shape.noisy, shape.clean, model.mamba_num_heads // shape.tensor
    inner, taps = model.mamba_inner // shape.tensor, model.conv_kernel - 1
    channels = convolution_channels(model, shape)
    chunk = chunk_length(shape.block, preferred=model.chunk_size)
    state = heads * model.mamba_head_dim * model.ssm_state_size
    chunks = shape.rows * -(-L // (shape.rows * chunk))
    cast = w if w != _FP32 else 0
    yield KeptTensor(
        "input of the convolution, with history", "c w T (1 + 3/S)", channels * w * (T + taps * T // shape.block)
    )
    yield KeptTensor("output of the convolution: x, B, C", "c w T", channels * w * T)
    yield KeptTensor("time steps before and after softplus", "2 m 4 T", 2 * heads * _FP32 * T)
    yield KeptTensor("output of the scan", "4 i T (+ i w T in bf16)", inner * (_FP32 + cast) * T)
    yield KeptTensor("gate z", "i w T", inner * w * T)
    yield KeptTensor("input of out_proj", "i w T", inner * w * T)
    yield KeptTensor("clean x, B, C", "c w L", channels * w * L, handoff=True)
    yield KeptTensor("clean input of the convolution", "c w L", channels * w * L, handoff=True, kept_by="recomputed")
    if shape.context > 1:
        seam = channels * w * taps * shape.rows
        yield KeptTensor("inputs before each stretch", "3 c w R", seam, handoff=True, kept_by="recomputed")
    yield KeptTensor("clean time steps", "4 m L", heads * _FP32 * L, handoff=True, kept_by="all")
    yield KeptTensor("clean states, one per chunk", "4 m p d L/Q", state * _FP32 * chunks, handoff=True, kept_by="all")


def _attention(model: ModelConfig, shape: MicroBatchShape) -> Iterator[KeptTensor]:
    w, T, e = shape.activation_bytes, shape.noisy, model.head_dim
    queries, keys = model.num_attention_heads * e // shape.tensor, key_value_width(model, shape)
    yield KeptTensor("query, key, value", "(H + 2 K) e w T", (queries + keys) * w * T)
    yield KeptTensor("input of linear_proj", "H e w T", queries * w * T)
    gathered = keys * w * shape.clean * shape.context
    yield KeptTensor("clean key and value", "2 K e w L C", gathered, handoff=True, kept_by="all")


def _mlp(model: ModelConfig, shape: MicroBatchShape) -> Iterator[KeptTensor]:
    width = model.intermediate_size // shape.tensor
    yield KeptTensor("relu and its square", "2 f w T", 2 * width * shape.activation_bytes * shape.noisy)


def _experts(model: ModelConfig, shape: MicroBatchShape) -> Iterator[KeptTensor]:
    w, k, positions = shape.activation_bytes, model.num_experts_per_tok, shape.noisy_on_rank
    # A rank routes its positions. The ranks of an expert gather the positions of all of them, and
    # each has a part of the width.
    routed = round(k * positions * shape.expert_tensor * shape.expert_load)
    width = model.moe_intermediate_size // shape.expert_tensor
    shared = model.moe_shared_expert_intermediate_size // shape.tensor
    yield KeptTensor("tokens at their experts", "k h w T", model.hidden_size * w * routed)
    yield KeptTensor("relu, its square, weighted", "3 k x w T", 3 * width * w * routed)
    yield KeptTensor("shared expert", "2 s w T", 2 * shared * w * shape.noisy)
    yield KeptTensor("router", "about 12 E T + 40 k T", (12 * model.n_routed_experts + 40 * k) * positions)


_MIXERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def layer_tensors(
    model: ModelConfig, kind: str, shape: MicroBatchShape, *, recompute: bool = False
) -> list[KeptTensor]:
    """What a layer of the denoiser keeps.

    Args:
        model: The shapes of the model.
        kind: The letter of the layer in the pattern.
        shape: The micro-batch.
        recompute: Whether the layer is recomputed. Then it keeps its input, and what its handoff is
            recomputed from.
    """
    tensors = [*_common(model, shape), *_MIXERS[kind](model, shape)]
    return [tensor for tensor in tensors if tensor.kept_by in ("all", "recomputed" if recompute else "stored")]


def head_tensors(model: ModelConfig, shape: MicroBatchShape, *, scored: int) -> list[KeptTensor]:
    """What the final norm and the loss keep, for `scored` scored positions."""
    h, w, T = model.hidden_size, shape.activation_bytes, shape.noisy
    return [
        KeptTensor("input and output of the final norm", "2 h w T", 2 * h * w * shape.noisy_on_rank),
        KeptTensor("scored positions and their gradient", "2 h w m", 2 * h * w * scored),
        KeptTensor("gradient of the head", "4 V h", _FP32 * model.vocab_size // shape.tensor * h),
        KeptTensor("tokens, positions, levels and losses", "8 T + 36 m", 8 * T + 36 * scored),
    ]


def micro_batch_shape(config: RunConfig, *, block: int | None = None, imbalance: float = 1.0) -> MicroBatchShape:
    """The micro-batch of a configuration on the busiest of its ranks.

    Args:
        config: The configuration.
        block: A block size; `None` for `noise.block_size_tokens`.
        imbalance: As in `expert_load`.
    """
    parallel = config.parallel
    return MicroBatchShape(
        sequences=config.data.micro_batch_size,
        length=config.data.sequence_length_tokens,
        block=block or config.noise.block_size_tokens,
        draws=config.noise.draws_per_context,
        time_per_block=config.noise.time_per == "block",
        activation_bytes=PRECISIONS[config.train.precision].bytes,
        tensor=parallel.tensor,
        sequence=parallel.tensor if parallel.sequence else 1,
        context=parallel.context,
        expert_tensor=parallel.expert_tensor_ranks,
        expert_load=expert_load(parallel, imbalance),
    )


def bytes_by_kind(config: RunConfig) -> dict[str, int]:
    """The bytes that all layers of each kind keep of a micro-batch, on a rank with all layers."""
    shape = micro_batch_shape(config)
    pattern, recomputed = config.model.hybrid_override_pattern, config.train.recompute_layers
    return {
        kind: pattern.count(kind)
        * sum(tensor.bytes for tensor in layer_tensors(config.model, kind, shape, recompute=kind in recomputed))
        for kind in _MIXERS
        if kind in pattern
    }
