"""What a training step keeps between its forward and backward passes, layer by layer, as formulas.

Symbols: T = r b l noisy positions and L = b l clean ones of a micro-batch, N = T / S blocks (r b
where a sequence has one time), h hidden size, w bytes of an activation. Mamba: i channels, c
channels of the convolution, m heads, p head size, d state size, Q chunk. Attention: H heads, K kv
heads, e head size. f: width of a dense MLP. E experts, k for a token, x width of an expert, s of
the shared one. The formulas are those of one tensor-parallel rank of one; of t ranks each keeps a
t-th of what is inside a mixer, and with sequence parallelism a t-th of what is between them. A test
holds each formula against the tensors that autograd really keeps, in torch; with this project's
kernels a Mamba layer in bfloat16 keeps a tenth less, the other layers as much.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_twotower.config.precision import PRECISIONS
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length

# Bytes of an element of the working precision of scans and routers.
_WIDE = 4


@dataclass(frozen=True)
class Part:
    """One kept thing of one layer. handoff: it comes from the context tower. recompute: it is kept with recompute; with
    recompute alone, if `only`."""

    what: str
    formula: str
    bytes: int
    handoff: bool = False
    recompute: bool = False
    only: bool = False


@dataclass(frozen=True)
class StepSize:
    """A micro-batch: b sequences of l tokens in blocks of s, r draws of each; times per block or per sequence.

    tensor: ranks that share what is inside a mixer. sequence: ranks that share what is between
    mixers. expert_tensor: ranks that share each expert. Experts are taken to be equally busy.
    """

    sequences: int
    length: int
    block: int
    draws: int = 1
    time_per_block: bool = False
    activation_bytes: int = 4
    tensor: int = 1
    sequence: int = 1
    expert_tensor: int = 1

    @property
    def clean(self) -> int:
        return self.sequences * self.length

    @property
    def noisy(self) -> int:
        return self.draws * self.clean

    @property
    def own(self) -> int:
        """Noisy positions that this rank has between mixers."""
        return self.noisy // self.sequence

    @property
    def rows(self) -> int:
        return self.noisy // self.block if self.time_per_block else self.draws * self.sequences


def _common(model: ModelConfig, size: StepSize) -> Iterator[Part]:
    h, w = model.hidden_size, size.activation_bytes
    # Every rank makes all rows of shift, scale and gate, and takes its own.
    rows = 3 * size.rows + (size.rows // size.sequence if size.time_per_block else size.rows)
    yield Part("input of the layer", "h w T", h * w * size.own, recompute=True)
    yield Part("between norm and modulation, after both, mixer's output", "3 h w T", 3 * h * w * size.own)
    yield Part("shift, scale and gate", "4 h w N", rows * h * w)


def _mamba(model: ModelConfig, size: StepSize) -> Iterator[Part]:
    w, T, L, heads = size.activation_bytes, size.noisy, size.clean, model.mamba_num_heads // size.tensor
    inner, taps = model.mamba_inner // size.tensor, model.conv_kernel - 1
    channels = inner + 2 * model.n_groups // size.tensor * model.ssm_state_size
    chunk = chunk_length(size.block, preferred=model.chunk_size)
    state = heads * model.mamba_head_dim * model.ssm_state_size
    chunks = size.sequences * -(-size.length // chunk)
    cast = w if w != _WIDE else 0
    yield Part(
        "convolution's input, with its histories", "c w T (1 + 3/S)", channels * w * (T + taps * T // size.block)
    )
    yield Part("convolution's output: x, B, C", "c w T", channels * w * T)
    yield Part("time steps before and after softplus", "2 m 4 T", 2 * heads * _WIDE * T)
    yield Part("scan's output", "4 i T (+ i w T in bf16)", inner * (_WIDE + cast) * T)
    yield Part("gate z", "i w T", inner * w * T)
    yield Part("input of out_proj", "i w T", inner * w * T)
    yield Part("clean x, B, C", "c w L", channels * w * L, handoff=True)
    held = {"handoff": True, "recompute": True}
    yield Part("clean input of the convolution", "c w L", channels * w * L, **held, only=True)
    yield Part("clean time steps", "4 m L", heads * _WIDE * L, **held)
    yield Part("clean states, one a chunk", "4 m p d L/Q", state * _WIDE * chunks, **held)


def _attention(model: ModelConfig, size: StepSize) -> Iterator[Part]:
    w, T, e = size.activation_bytes, size.noisy, model.head_dim
    queries, keys = model.num_attention_heads * e // size.tensor, 2 * model.num_key_value_heads * e // size.tensor
    yield Part("query, key, value", "(H + 2 K) e w T", (queries + keys) * w * T)
    yield Part("input of linear_proj", "H e w T", queries * w * T)
    yield Part("clean key and value", "2 K e w L", keys * w * size.clean, handoff=True, recompute=True)


def _mlp(model: ModelConfig, size: StepSize) -> Iterator[Part]:
    width = model.intermediate_size // size.tensor
    yield Part("relu and its square", "2 f w T", 2 * width * size.activation_bytes * size.noisy)


def _experts(model: ModelConfig, size: StepSize) -> Iterator[Part]:
    w, k = size.activation_bytes, model.num_experts_per_tok
    # A rank routes its own positions. Each expert's ranks see what all of them sent, and hold a
    # part of the width.
    routed, width = k * size.own * size.expert_tensor, model.moe_intermediate_size // size.expert_tensor
    shared = model.moe_shared_expert_intermediate_size // size.tensor
    yield Part("each token at its experts", "k h w T", model.hidden_size * w * routed)
    yield Part("relu, its square, weighted", "3 k x w T", 3 * width * w * routed)
    yield Part("shared expert", "2 s w T", 2 * shared * w * size.noisy)
    yield Part("router", "about 12 E T + 40 k T", (12 * model.n_routed_experts + 40 * k) * size.own)


_MIXERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def layer_parts(model: ModelConfig, kind: str, size: StepSize, *, recompute: bool = False) -> list[Part]:
    """What one denoiser layer keeps. With recompute: its input, and what its hand-off is made from again."""
    parts = [*_common(model, size), *_MIXERS[kind](model, size)]
    return [part for part in parts if (part.recompute if recompute else not part.only)]


def head_parts(model: ModelConfig, size: StepSize, *, scored: int) -> list[Part]:
    """What the final norm and the loss keep, for so many scored positions. m: scored, V: vocabulary."""
    h, w, T = model.hidden_size, size.activation_bytes, size.noisy
    return [
        Part("input and output of the final norm", "2 h w T", 2 * h * w * size.own),
        Part("scored positions and their gradient", "2 h w m", 2 * h * w * scored),
        Part("gradient of the head", "4 V h", _WIDE * model.vocab_size // size.tensor * h),
        Part("tokens, places, levels and losses", "8 T + 36 m", 8 * T + 36 * scored),
    ]


def step_size(config: RunConfig, *, block: int | None = None) -> StepSize:
    """The micro-batch of a configuration on one of its ranks, with its block size or another."""
    parallel = config.parallel
    return StepSize(
        sequences=config.data.micro_batch_size,
        length=config.data.sequence_length_tokens,
        block=block or config.noise.block_size_tokens,
        draws=config.noise.draws_per_context,
        time_per_block=config.noise.time_per == "block",
        activation_bytes=PRECISIONS[config.train.precision].bytes,
        tensor=parallel.tensor,
        sequence=parallel.tensor if parallel.sequence else 1,
        expert_tensor=parallel.expert_tensor_ranks,
    )


def step_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes kept by all layers of each kind, for the micro-batch of a configuration on one rank."""
    size = step_size(config)
    pattern, recomputed = config.model.hybrid_override_pattern, config.train.recompute_layers
    return {
        kind: pattern.count(kind)
        * sum(part.bytes for part in layer_parts(config.model, kind, size, recompute=kind in recomputed))
        for kind in _MIXERS
        if kind in pattern
    }
