"""The mixers and layers of both towers, made of the modules that `spec.py` names.

Every mixer takes hidden states (l, b, h), split over tensor-parallel ranks along l under sequence
parallelism, and has two ways through: `causal`, one causal stream, which also returns the hand-off;
and `denoise`, every block of a noisy stream against the hand-off of the same layer. A noisy stream
may hold r draws of every sequence, draw by draw (l, r b, h): all of them read the one hand-off.
`recompute_source` is the least that a hand-off can be made from again: what a layer with recompute
keeps of it between its forward and backward passes. Weights are left uninitialised here: they
always come from a backbone's named tensors.
"""

from collections.abc import Callable
from typing import Any

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
from megatron_twotower.mcore import modules as mcore_modules
from megatron_twotower.mcore.router import Router
from megatron_twotower.model.adaln import rows_of_rank, split_modulation
from megatron_twotower.ops import dispatch
from megatron_twotower.ops.attention import block_attention, causal_attention
from megatron_twotower.ops.convolution import block_history, causal_conv, seeded_block_conv
from megatron_twotower.ops.modulation import add_gated, modulate
from megatron_twotower.ops.norm import gated_rms_norm
from megatron_twotower.ops.scan import chunk_length, chunk_scan, stream_scan, two_stream_scan
from megatron_twotower.types import AttentionHandoff, Blocks, Handoff, MambaHandoff

# The order of norm and modulation: in M and * Megatron fuses the norm into the projection, so
# modulation is first. They are fused in the same layers here, where the spec has it.
MODULATED_BEFORE_NORM = frozenset("M*")
# The layers of the context tower that the denoiser reads.
HANDING_ON = frozenset("M*")


def _column(config: TransformerConfig, inputs: int, outputs: int, groups: ProcessGroupCollection) -> nn.Module:
    """The first projection of a mixer of `MODULATED_BEFORE_NORM`, with its norm where the spec has the two in one."""
    modules = mcore_modules.of(config)
    return (modules.norm_column or modules.column)(
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


def _row(config: TransformerConfig, inputs: int, outputs: int, groups: ProcessGroupCollection) -> nn.Module:
    return mcore_modules.of(config).row(
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


def _norm(kind: str, config: TransformerConfig) -> nn.Module:
    modules = mcore_modules.of(config)
    return nn.Identity() if modules.norm_column and kind in MODULATED_BEFORE_NORM else modules.norm(config)


def _draws(tensors: tuple[Tensor, ...], batch: int) -> list[tuple[Tensor, ...]]:
    """Split (r b, ...) tensors into those of each draw, (b, ...)."""
    return list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))


def _joined(draws: list[Tensor]) -> Tensor:
    return draws[0] if len(draws) == 1 else torch.cat(draws)


class Mixer(MegatronModule):
    """Both ways through a mixer are calls of the module, for hooks on modules gather parameters just before use."""

    def forward(self, hidden: Tensor, blocks: Blocks, handoff: Handoff = None) -> tuple[Tensor, Handoff]:
        return self.causal(hidden, blocks) if handoff is None else (self.denoise(hidden, handoff, blocks), None)

    def causal(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, Handoff]:
        raise NotImplementedError

    def denoise(self, hidden: Tensor, handoff: Any, blocks: Blocks) -> Tensor:
        raise NotImplementedError


class SelfAttention(Mixer):
    """Grouped-query attention without position encoding."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        self.head_dim = model.head_dim
        self.kv_heads = model.num_key_value_heads // groups.tp.size()
        self.heads_per_kv = model.num_attention_heads // model.num_key_value_heads
        width = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
        self.linear_qkv = _column(config, model.hidden_size, width, groups)
        self.linear_proj = _row(config, model.num_attention_heads * model.head_dim, model.hidden_size, groups)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (b, heads, l, e); key and value (b, kv heads, l, e). Megatron keeps each kv head's queries by it."""
        mixed, _ = self.linear_qkv(hidden)
        l, b, _ = mixed.shape
        mixed = mixed.view(l, b, self.kv_heads, self.heads_per_kv + 2, self.head_dim).permute(1, 2, 3, 0, 4)
        query, key, value = mixed.split([self.heads_per_kv, 1, 1], dim=2)
        # Copies of key and value: a view of these few would keep the whole projection for the
        # backward pass.
        return query.flatten(1, 2), key.squeeze(2).contiguous(), value.squeeze(2).contiguous()

    def _output(self, attended: Tensor) -> Tensor:
        out, _ = self.linear_proj(attended.permute(2, 0, 1, 3).flatten(2))
        return out

    def causal(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, AttentionHandoff | None]:
        query, key, value = self._project(hidden)
        attended = causal_attention(query, key, value, documents=blocks.documents)
        handoff = AttentionHandoff(key, value) if blocks.size else None
        return self._output(attended), handoff

    def recompute_source(self, handoff: AttentionHandoff, blocks: Blocks) -> Callable[[], AttentionHandoff]:
        return lambda: handoff

    def denoise(self, hidden: Tensor, handoff: AttentionHandoff, blocks: Blocks) -> Tensor:
        assert blocks.size is not None
        outs = []
        for query, key, value in _draws(self._project(hidden), len(handoff.key)):
            out = block_attention(
                query,
                key,
                value,
                clean_key=handoff.key,
                clean_value=handoff.value,
                block=blocks.size,
                documents=blocks.documents,
                mask=blocks.attention_mask,
            )
            outs.append(out)
        return self._output(_joined(outs))


class MambaMixer(Mixer):
    """Mamba-2 with a start state: Megatron's parameters and names, this project's scan.

    Under tensor parallelism a rank holds whole groups: its rows of `in_proj` are its z, x, B, C and
    dt.
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
        self.in_proj = _column(config, model.hidden_size, widths, groups)
        self.out_proj = _row(config, model.mamba_inner, model.hidden_size, groups)
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
        """Gate (b, l, inner), convolution input (b, l, channels), time step (b, l, heads) after softplus."""
        mixed, _ = self.in_proj(hidden)
        z, conv_input, dt = mixed.transpose(0, 1).split([self.inner, self.inner + 2 * self.bc, self.heads], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        # A copy of z: the view would keep the whole projection for the backward pass. With this
        # project's kernels the convolution keeps it in any case, and the gated norm reads z where
        # it lies.
        z = z if dispatch.uses_triton(z, "convolution") else z.contiguous()
        return z, conv_input, dt.clamp(min=self.clamp) if self.clamp else dt

    def _split(self, conv_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, heads, head size); B and C (b, l, groups, state size)."""
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

    def causal(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, MambaHandoff | None]:
        z, conv_input, dt = self._project(hidden)
        documents = blocks.documents
        x, B, C = self._split(causal_conv(conv_input, self.conv1d_weight, self.conv1d_bias, documents=documents))
        A, chunk = self._A(), chunk_length(blocks.size or 1, preferred=self.preferred_chunk)
        if blocks.size is None:
            return self._output(stream_scan(x, dt, A, B, C, self.D, chunk=chunk, documents=documents), z), None
        y, states, _ = chunk_scan(x, dt, A, B, C, self.D, chunk=chunk, documents=documents)
        history = block_history(conv_input, taps=self.taps, block=blocks.size)
        return self._output(y, z), MambaHandoff(conv_input, history, x, dt, A, B, states)

    def recompute_source(self, handoff: MambaHandoff, blocks: Blocks) -> Callable[[], MambaHandoff]:
        """Of the input of the convolution, what its output and its histories are again made from when asked for."""
        assert blocks.size is not None
        # A copy: the view would hold the whole projection.
        conv_input, block = handoff.conv_input.contiguous(), blocks.size
        dt, A, states = handoff.dt, handoff.A, handoff.states

        @torch.no_grad()
        def again() -> MambaHandoff:
            convolved = causal_conv(conv_input, self.conv1d_weight, self.conv1d_bias, documents=blocks.documents)
            x, B, _ = self._split(convolved)
            history = block_history(conv_input, taps=self.taps, block=block)
            return MambaHandoff(conv_input, history, x, dt, A, B, states)

        return again

    def denoise(self, hidden: Tensor, handoff: MambaHandoff, blocks: Blocks) -> Tensor:
        assert blocks.size is not None
        z, conv_input, dt = self._project(hidden)
        A, chunk = self._A(), chunk_length(blocks.size, preferred=self.preferred_chunk)
        ys = []
        for own_input, own_dt in _draws((conv_input, dt), len(handoff.x)):
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
        return self._output(_joined(ys), z)


class _Pointwise(Mixer):
    """A mixer without memory: both streams go the same way and nothing is handed off."""

    def causal(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, None]:
        return self.apply_to(hidden, blocks), None

    def recompute_source(self, handoff: None, blocks: Blocks) -> Callable[[], None]:
        return lambda: None

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        raise NotImplementedError


class DenseMLP(_Pointwise):
    """Squared-ReLU MLP: Megatron's."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        parts = mcore_modules.of(config).feed_forward
        self.mlp = MLP(config, parts, ffn_hidden_size=model.intermediate_size, tp_group=groups.tp)

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        return self.mlp(hidden)[0]


class MixtureOfExperts(_Pointwise):
    """Sigmoid top-k routing with a selection bias over routed experts, and a shared expert: Megatron's.

    Padding goes through experts like the rest, but balances nothing.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        modules = mcore_modules.of(config)
        parts = MoESubmodules(
            experts=modules.experts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=modules.feed_forward),
            router=Router,
        )
        # Megatron 0.16.1 (moe/router.py) leaves the router's weight on the host until its first
        # forward pass, where the optimizer of a CUDA device refuses it.
        with device():
            self.moe = MoELayer(config, submodules=parts, pg_collection=groups)
        self.sequence_ranks = groups.tp if config.sequence_parallel else None
        if groups.expt_tp.size() != groups.tp.size():
            # Megatron 0.16.1 (tensor_parallel/layers.py) marks experts for their own data-parallel
            # group only where expert parallelism is above 1; they need it too where fewer ranks
            # split an expert than other weights.
            for parameter in self.moe.experts.parameters():
                parameter.allreduce = False

    def apply_to(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        self.moe.router.sequence_weights = blocks.sequence_weights
        padding = blocks.padding
        if padding is not None:
            padding = padding.repeat(hidden.shape[1] // len(padding), 1)
            if self.sequence_ranks is not None:
                padding = padding.chunk(self.sequence_ranks.size(), dim=1)[self.sequence_ranks.rank()]
        return self.moe(hidden, padding_mask=padding)[0]


MIXERS: dict[str, type[MegatronModule]] = {"M": MambaMixer, "*": SelfAttention, "E": MixtureOfExperts, "-": DenseMLP}


class Layer(MegatronModule):
    """One layer of a tower: `x + mixer(norm(x))`."""

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.kind, self.number = kind, number
        self.norm = _norm(kind, config)
        with mcore_modules.building(config, number):
            self.mixer = MIXERS[kind](model, config, groups)
        if isinstance(self.mixer, MixtureOfExperts):
            self.mixer.moe.set_layer_number(number + 1)

    def forward(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, Handoff]:
        with mcore_modules.computing(self.config, self.number):
            out, handoff = self.mixer(self.norm(hidden), blocks)
        return hidden + out, handoff

    def recompute_source(self, handoff: Handoff, blocks: Blocks) -> Callable[[], Handoff]:
        return self.mixer.recompute_source(handoff, blocks)


class DenoiserLayer(Layer):
    """One layer of the denoiser: `x + gate * mixer(...)`, modulated before or after the norm by layer kind."""

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(kind, number, model, config, groups)
        table = torch.empty(3, config.hidden_size, dtype=config.params_dtype, device=device())
        self.scale_shift_table = nn.Parameter(table)
        self.scale_shift_table.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_ranks = groups.tp if config.sequence_parallel else None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, conditioning: Tensor, handoff: Handoff, blocks: Blocks
    ) -> Tensor:
        """
        Args:
            hidden: (l, r b, h), or this rank's part of l under sequence parallelism.
            conditioning: (r b, n, 3h), or (r b, 1, 3h) where a sequence has one time.
        """
        rows = split_modulation(conditioning, self.scale_shift_table)
        shift, scale, gate = (self._own(row, hidden.shape[0]) for row in rows)
        if self.kind in MODULATED_BEFORE_NORM:
            normed = self.norm(modulate(hidden, shift, scale))
        else:
            normed = modulate(self.norm(hidden), shift, scale)
        with mcore_modules.computing(self.config, self.number):
            out, _ = self.mixer(normed, blocks, handoff)
        return add_gated(hidden, gate, out)

    def _own(self, rows: Tensor, length: int) -> Tensor:
        if self.sequence_ranks is None:
            return rows
        return rows_of_rank(rows, length=length, rank=self.sequence_ranks.rank(), ranks=self.sequence_ranks.size())
