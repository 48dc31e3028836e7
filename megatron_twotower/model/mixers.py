"""The mixers of the layers, built from the module classes of `mcore.modules`.

Hidden states are (l, b, h), split along l over tensor-parallel ranks under sequence parallelism.

Every mixer has two modes:

* `causal`: one causal stream. Its result includes the handoff for the denoiser.
* `denoise`: each block of a noisy stream, with the handoff of the same layer of the context tower.
  The noisy stream may have r draws of each sequence, one draw after the other: (l, r b, h). All
  draws of a sequence read the same handoff.

Weights are not initialised here. They are always loaded from named tensors.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_twotower.common.device import device
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.mcore.modules import layer_modules
from megatron_twotower.mcore.router import Router
from megatron_twotower.ops import dispatch
from megatron_twotower.ops.attention import block_attention, causal_attention
from megatron_twotower.ops.context_parallel import Steps, finish
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv
from megatron_twotower.ops.norm import gated_rms_norm
from megatron_twotower.ops.scan import chunk_length, chunk_scan_steps, stream_scan, two_stream_scan
from megatron_twotower.types import AttentionHandoff, Blocks, Handoff, MambaHandoff

# Kinds of layers that read a handoff of the context tower in the denoiser.
HANDOFF_KINDS = frozenset("M*")

MixerMode = Literal["causal", "denoise"]


def _column_linear(config: TransformerConfig, inputs: int, outputs: int, groups: ProcessGroupCollection) -> nn.Module:
    """The input projection of M and *, and the layer's norm too if the modules fuse both."""
    modules = layer_modules(config)
    return (modules.norm_column_linear or modules.column_linear)(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=groups.tp,
    )


def _row_linear(config: TransformerConfig, inputs: int, outputs: int, groups: ProcessGroupCollection) -> nn.Module:
    return layer_modules(config).row_linear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=groups.tp,
    )


def _split_draws(tensors: tuple[Tensor, ...], batch: int) -> list[tuple[Tensor, ...]]:
    """Split (r b, ...) tensors into r tuples of (b, ...) tensors, one for each draw."""
    return list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))


def _join_draws(draws: list[Tensor]) -> Tensor:
    return draws[0] if len(draws) == 1 else torch.cat(draws)


def _rows(blocks: Blocks, sequences: int) -> int:
    """The rows of a number of sequences: one for each stretch."""
    return sequences * (1 if blocks.context is None else len(blocks.context.numbers))


def _stretches(rows: Tensor, blocks: Blocks) -> Iterator[tuple[slice, int, Tensor | None, Any]]:
    """Each stretch that this rank has of all its sequences; without context parallelism one.

    Args:
        rows: (b, heads, l, e).
        blocks: How the sequences are divided.

    Yields:
        The rows of the stretch, one for each sequence; the length of the sequence up to the end of
        the stretch; the documents up to there; the attention mask.
    """
    length, masks = rows.shape[2], blocks.attention_masks
    if blocks.context is None:
        yield slice(None), length, blocks.documents, masks[0] if masks else None
        return
    numbers, documents = blocks.context.numbers, blocks.context.documents
    for place, number in enumerate(numbers):
        end = (number + 1) * length
        known = None if documents is None else documents[:, :end]
        yield slice(place, None, len(numbers)), end, known, masks[place] if masks else None


def _interleave(outs: list[Tensor]) -> Tensor:
    """Results of each stretch (sequences, ...) -> rows (sequences x stretches, ...)."""
    return outs[0] if len(outs) == 1 else torch.stack(outs, dim=1).flatten(0, 1)


class Mixer(MegatronModule):
    """A mixer with two modes.

    Trained towers call `forward` for both modes, never `causal` or `denoise`: hooks on modules
    gather parameters just before `forward`.
    """

    def forward(
        self, hidden: Tensor, blocks: Blocks, *, mode: MixerMode, handoff: Handoff = None
    ) -> tuple[Tensor, Handoff]:
        """Apply the mixer to hidden states (l, b, h).

        Args:
            hidden: Clean states in mode `causal`, noisy states in mode `denoise`.
            blocks: How the sequences are divided.
            mode: `causal` or `denoise`.
            handoff: In mode `denoise`, the handoff of the context layer, if its kind has one.

        Returns:
            The output, shaped like `hidden`, and in mode `causal` the handoff.
        """
        if mode == "causal":
            return finish(self.causal(hidden, blocks))
        return self.denoise(hidden, handoff, blocks), None

    def causal(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, Handoff]]:
        """Mix one causal stream; return the output and the handoff.

        It pauses while messages to other context-parallel ranks are under way.
        """
        raise NotImplementedError

    def denoise(self, hidden: Tensor, handoff: Any, blocks: Blocks) -> Tensor:
        """Mix each block of a noisy stream with the handoff of the context layer."""
        raise NotImplementedError

    def handoff_recompute_fn(self, handoff: Any, blocks: Blocks) -> Callable[[], Any]:
        """A function that returns the handoff again.

        It refers to as few tensors as possible: these are what a layer with recompute keeps of the
        handoff between its forward and backward passes.
        """
        raise NotImplementedError


class SelfAttention(Mixer):
    """Grouped-query attention without position encoding."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        self.head_dim = model.head_dim
        self.kv_heads = model.num_key_value_heads // groups.tp.size()
        self.heads_per_kv = model.num_attention_heads // model.num_key_value_heads
        width = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
        self.linear_qkv = _column_linear(config, model.hidden_size, width, groups)
        self.linear_proj = _row_linear(config, model.num_attention_heads * model.head_dim, model.hidden_size, groups)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (b, heads, l, e); key and value (b, kv heads, l, e), for the head size e.

        In Megatron's layout the queries of each kv head are next to its key and value.
        """
        mixed, _ = self.linear_qkv(hidden)
        l, b, _ = mixed.shape
        mixed = mixed.view(l, b, self.kv_heads, self.heads_per_kv + 2, self.head_dim).permute(1, 2, 3, 0, 4)
        query, key, value = mixed.split([self.heads_per_kv, 1, 1], dim=2)
        # Copies, because a view of key or value would keep the output of the projection in memory
        # for the backward pass.
        return query.flatten(1, 2), key.squeeze(2).contiguous(), value.squeeze(2).contiguous()

    def _output(self, attended: Tensor) -> Tensor:
        out, _ = self.linear_proj(attended.permute(2, 0, 1, 3).flatten(2))
        return out

    def causal(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, AttentionHandoff | None]]:
        """Attend to all earlier positions. The handoff is key and value.

        There is none if `blocks` has no size: then no denoiser reads this stream.
        """
        query, key, value = self._project(hidden)
        if blocks.context is not None:
            key, value = yield from blocks.context.whole_sequences(key, value)
        outs = []
        for rows, length, documents, _ in _stretches(query, blocks):
            keys, values = key[:, :, :length], value[:, :, :length]
            outs.append(causal_attention(query[rows], keys, values, documents=documents))
        handoff = AttentionHandoff(key, value) if blocks.size else None
        return self._output(_interleave(outs)), handoff

    def handoff_recompute_fn(self, handoff: AttentionHandoff, blocks: Blocks) -> Callable[[], AttentionHandoff]:
        """Keep the handoff itself: key and value are all that it has."""
        return lambda: handoff

    def denoise(self, hidden: Tensor, handoff: AttentionHandoff, blocks: Blocks) -> Tensor:
        """Let each position attend to its own noisy block and to the clean blocks before it."""
        assert blocks.size is not None
        draws, projected = [], self._project(hidden)
        for query, key, value in _split_draws(projected, _rows(blocks, len(handoff.key))):
            outs = []
            for rows, length, documents, mask in _stretches(query, blocks):
                out = block_attention(
                    query[rows],
                    key[rows],
                    value[rows],
                    clean_key=handoff.key[:, :, :length],
                    clean_value=handoff.value[:, :, :length],
                    block=blocks.size,
                    documents=documents,
                    mask=mask,
                )
                outs.append(out)
            draws.append(_interleave(outs))
        return self._output(_join_draws(draws))


class MambaMixer(Mixer):
    """Mamba-2 with a start state: Megatron's parameters and names, this project's scan.

    Under tensor parallelism each rank has complete groups of heads. Its rows of `in_proj` are its
    own z, x, B, C and dt.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        ranks = groups.tp.size()
        self.preferred_chunk, self.taps = model.chunk_size, model.conv_kernel
        self.heads, self.groups = model.mamba_num_heads // ranks, model.n_groups // ranks
        self.head_dim, self.state = model.mamba_head_dim, model.ssm_state_size
        self.clamp, self.epsilon = model.time_step_clamp, model.layer_norm_epsilon
        self.inner, self.bc = self.heads * self.head_dim, self.groups * self.state
        widths = 2 * model.mamba_inner + 2 * model.n_groups * model.ssm_state_size + model.mamba_num_heads
        self.in_proj = _column_linear(config, model.hidden_size, widths, groups)
        self.out_proj = _row_linear(config, model.mamba_inner, model.hidden_size, groups)
        channels = self.inner + 2 * self.bc
        shapes = {
            "conv1d_weight": (channels, model.conv_kernel),
            "conv1d_bias": (channels,),
            "A_log": (self.heads,),
            "D": (self.heads,),
            "dt_bias": (self.heads,),
            "norm_weight": (self.inner,),
        }
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device()))
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim, parameter.partition_stride = 0, 1  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (b, l, inner), convolution input (b, l, c), and time step (b, l, heads).

        Softplus and the clamp are applied to the time step.
        """
        mixed, _ = self.in_proj(hidden)
        z, conv_input, dt = mixed.transpose(0, 1).split([self.inner, self.inner + 2 * self.bc, self.heads], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        # A copy, because a view of z would keep the output of the projection in memory for the
        # backward pass. This project's kernels need no copy: their convolution keeps that output
        # anyway, and their gated norm reads z from the view.
        z = z if dispatch.uses_triton(z, "convolution") else z.contiguous()
        return z, conv_input, dt.clamp(min=self.clamp) if self.clamp else dt

    def _split(self, conv_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into x (b, l, heads, head size), B and C (both b, l, groups, state size)."""
        x, B, C = conv_output.split([self.inner, self.bc, self.bc], dim=-1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state)),
            C.unflatten(-1, (self.groups, self.state)),
        )

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        normed = gated_rms_norm(y.flatten(2), z, self.norm_weight.view(self.groups, -1), self.epsilon)
        out, _ = self.out_proj(normed.transpose(0, 1))
        return out

    def causal(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, MambaHandoff | None]]:
        """Scan the stream from its start. Without a size in `blocks` there is no handoff."""
        z, conv_input, dt = self._project(hidden)
        documents, context, before = blocks.documents, blocks.context, None
        if context is not None:
            before = yield from context.before(conv_input, self.taps - 1)
        convolved = causal_conv(conv_input, self.conv1d_weight, self.conv1d_bias, documents=documents, before=before)
        x, B, C = self._split(convolved)
        A, chunk = self._A(), chunk_length(blocks.size or 1, preferred=self.preferred_chunk)
        if blocks.size is None:
            y = stream_scan(x, dt, A, B, C, self.D, chunk=chunk, documents=documents, context=context)
            return self._output(y, z), None
        y, states, _ = yield from chunk_scan_steps(
            x, dt, A, B, C, self.D, chunk=chunk, documents=documents, context=context
        )
        history = block_history(conv_input, taps=self.taps, block=blocks.size, before=before)
        return self._output(y, z), MambaHandoff(conv_input, history, x, dt, A, B, states, before)

    def handoff_recompute_fn(self, handoff: MambaHandoff, blocks: Blocks) -> Callable[[], MambaHandoff]:
        """Keep the input of the convolution, and recompute x, B and the history from it."""
        assert blocks.size is not None
        # A copy, because a view would keep the output of the projection in memory.
        conv_input, block, before = handoff.conv_input.contiguous(), blocks.size, handoff.before
        dt, A, states = handoff.dt, handoff.A, handoff.states

        @torch.no_grad()
        def recompute() -> MambaHandoff:
            convolved = causal_conv(
                conv_input, self.conv1d_weight, self.conv1d_bias, documents=blocks.documents, before=before
            )
            x, B, _ = self._split(convolved)
            history = block_history(conv_input, taps=self.taps, block=block, before=before)
            return MambaHandoff(conv_input, history, x, dt, A, B, states, before)

        return recompute

    def denoise(self, hidden: Tensor, handoff: MambaHandoff, blocks: Blocks) -> Tensor:
        """Scan each noisy block from the clean state and convolution inputs before it."""
        assert blocks.size is not None
        z, conv_input, dt = self._project(hidden)
        A, chunk = self._A(), chunk_length(blocks.size, preferred=self.preferred_chunk)
        ys = []
        for own_input, own_dt in _split_draws((conv_input, dt), len(handoff.x)):
            seeded = seeded_block_conv(
                own_input, handoff.history, self.conv1d_weight, self.conv1d_bias, documents=blocks.documents
            )
            x, B, C = self._split(seeded)
            y = two_stream_scan(
                x,
                own_dt,
                A,
                B,
                C,
                self.D,
                clean_x=handoff.x,
                clean_dt=handoff.dt,
                clean_A=handoff.A,
                clean_B=handoff.B,
                states=handoff.states,
                block=blocks.size,
                chunk=chunk,
                documents=blocks.documents,
            )
            ys.append(y)
        return self._output(_join_draws(ys), z)


class PointwiseMixer(Mixer):
    """A mixer that treats each position alone: both modes are the same, without a handoff."""

    def causal(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, None]]:
        """Apply the mixer; there is no handoff."""
        yield from ()
        return self.apply_to(hidden, blocks), None

    def denoise(self, hidden: Tensor, handoff: None, blocks: Blocks) -> Tensor:
        """Apply the mixer, as in mode `causal`."""
        return self.apply_to(hidden, blocks)

    def handoff_recompute_fn(self, handoff: None, blocks: Blocks) -> Callable[[], None]:
        """There is no handoff, so the function returns `None`."""
        return lambda: None

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """Transform each position of (l, b, h)."""
        raise NotImplementedError


class DenseMLP(PointwiseMixer):
    """Megatron's MLP with the squared-ReLU activation."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        projections = layer_modules(config).mlp
        self.mlp = MLP(config, projections, ffn_hidden_size=model.intermediate_size, tp_group=groups.tp)

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """Apply the MLP to (l, b, h)."""
        return self.mlp(hidden)[0]


class MixtureOfExperts(PointwiseMixer):
    """Megatron's mixture of experts: routed experts and a shared expert.

    The router scores experts with a sigmoid and selects the top k with a selection bias. Padding
    passes through the experts, but does not count for their balance.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        modules = layer_modules(config)
        submodules = MoESubmodules(
            experts=modules.experts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=modules.mlp),
            router=Router,
        )
        # Megatron 0.16.1 (moe/router.py) creates the router's weight in host memory and moves it in
        # the first forward pass. The optimizer rejects it there if the other weights are on CUDA.
        with device():
            self.moe = MoELayer(config, submodules=submodules, pg_collection=groups)
        self.sequence_ranks = groups.tp if config.sequence_parallel else None
        if groups.expt_tp.size() != groups.tp.size():
            # Experts need their own data-parallel group also if fewer ranks split an expert than
            # split other weights. Megatron 0.16.1 (tensor_parallel/layers.py) marks them for it
            # only if expert parallelism is above 1.
            for parameter in self.moe.experts.parameters():
                parameter.allreduce = False

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """Apply routed and shared experts to (l, b, h)."""
        self.moe.router.sequence_weights = blocks.sequence_weights
        self.moe.router.rows_per_sequence = _rows(blocks, 1)
        padding, buckets = blocks.padding, blocks.noise_buckets
        if padding is not None:
            padding = self._positions_of_rank(padding.repeat(hidden.shape[1] // len(padding), 1))
        if buckets is not None:
            buckets = self._positions_of_rank(buckets).t().flatten()
        self.moe.router.noise_buckets = buckets
        return self.moe(hidden, padding_mask=padding)[0]

    def _positions_of_rank(self, rows: Tensor) -> Tensor:
        """What (b, l) has of this rank's positions: (b, l of `hidden`)."""
        if self.sequence_ranks is None:
            return rows
        return rows.chunk(self.sequence_ranks.size(), dim=1)[self.sequence_ranks.rank()]


MIXERS: dict[str, type[Mixer]] = {"M": MambaMixer, "*": SelfAttention, "E": MixtureOfExperts, "-": DenseMLP}
