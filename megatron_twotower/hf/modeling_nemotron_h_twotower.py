"""A two-tower NemotronH: an autoregressive context tower, and a denoiser that writes text in blocks beside it.

This file ships inside the model's folder and needs only torch and transformers (5.3 or newer):

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate_mask_diffusion(input_ids, max_new_tokens=128)

The context tower reads clean text, causally, and keeps for every layer what its denoiser twin starts from: keys and
values of attention layers, convolution and scan states of Mamba layers. The denoiser sees one block of tokens, partly
masked, and predicts all of them at once; a block that is done is read by the context tower. Prompts of different
lengths stand in one batch with padding on their left: its keys are not seen, and Mamba layers take no step there.

Dimensions: b batch, l length, s block size, h hidden size, v vocabulary; Mamba: g groups of r heads, p head size,
d state size, c convolution channels, k taps. Norms, convolutions, scans and routers work in float32, or in float64 in
a float64 model.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import NemotronHConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput

TIME_FEATURES, TIME_SCALE, TIME_PERIOD = 256, 1000.0, 10000.0
SCORED_TOGETHER = 1024  # positions whose logits stand in memory at once


@dataclass(frozen=True)
class DenoisingStep:
    """What a step of mask diffusion did to a block, for whoever watches.

    block, step: counted from 0, the step within its block.
    t: (b,) the noise level that the denoiser was given.
    ids: (b, s) after the step, the mask token where nothing is committed yet.
    predicted: (b, s) what the denoiser would write; where a token was committed before, that token.
    confidence: (b, s) the probability of each prediction; 0 where a token was committed before.
    committed: (b, s) bool, in this step.
    """

    block: int
    step: int
    t: Tensor
    ids: Tensor
    predicted: Tensor
    confidence: Tensor
    committed: Tensor


# Called after every step of mask diffusion.
OnStep = Callable[[DenoisingStep], None]
# Called when text grows at its end with: new ids (b, n), and which of them are text (b, n) bool; a row that has ended,
# or that grows by less than another, has False on its right.
OnTokens = Callable[[Tensor, Tensor], None]


class ArgumentError(ValueError):
    """An argument, or a field of the configuration, that this model cannot work with."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- what the context tower keeps ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """How a tower goes over new positions (b, l).

    causal: no position sees a later one. keep: the states take up what is read; a causal pass that does not keep holds
    it back, and `settle` decides how much of it the states take up.
    seen: (b or 1, 1, l or 1, past + l) bool, the keys that each query sees; None: as `causal` says.
    text: (b, l) bool, False at padding; None: no padding.
    """

    causal: bool
    keep: bool
    seen: Tensor | None = None
    text: Tensor | None = None


DENOISE = Pass(causal=False, keep=False)


class KeyValues:
    """Keys and values (b, kv heads, positions, head size) of one attention layer, in buffers that grow by doubling.

    What is written stands right behind the kept positions and is read together with them, without a copy. The context
    tower then keeps it; the denoiser does not, and the next one to write takes its place.
    """

    def __init__(self) -> None:
        self.length = 0
        self.buffers: tuple[Tensor, ...] = ()

    def write(self, *added: Tensor) -> tuple[Tensor, ...]:
        """Key and value to write -> views of the kept and the written positions of both."""
        end = self.length + added[0].shape[2]
        if not self.buffers or self.buffers[0].shape[2] < end:
            kept = self.views()
            self.buffers = tuple(t.new_empty(*t.shape[:2], max(64, 2 * end), t.shape[3]) for t in added)
            for buffer, old in zip(self.buffers, kept, strict=False):
                buffer[:, :, : self.length] = old
        for buffer, new in zip(self.buffers, added, strict=True):
            buffer[:, :, self.length : end] = new
        return tuple(buffer[:, :, :end] for buffer in self.buffers)

    def views(self, start: int = 0) -> tuple[Tensor, ...]:
        """The kept positions from `start` on."""
        return tuple(buffer[:, :, start : self.length] for buffer in self.buffers)

    def pull(self, ends: Tensor, count: int) -> None:
        """Move the last `count` written positions, which stand behind `length`, to each row's own end (b,)."""
        columns = (ends.unsqueeze(-1) + torch.arange(count, device=ends.device))[:, None, :, None]
        for buffer in self.buffers:
            written = buffer[:, :, self.length : self.length + count].clone()
            buffer.scatter_(2, columns.expand_as(written), written)


class MambaState:
    """The last k - 1 inputs of the convolution (b, k - 1, c), and the state of the scan (b, g, r, p, d).

    held: of a pass whose reading is not settled: padded inputs of the convolution (b, k - 1 + l, c), and x, dt, A, B
    and state as `scan_chunk` takes them.
    """

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.ssm: Tensor | None = None
        self.held: tuple[Tensor, ...] = ()

    def settle(self, counts: Tensor) -> None:
        """Take up the first `counts` (b,) positions that are held: those behind them make no step."""
        padded, x, dt, A, B, state = self.held
        steps = torch.arange(x.shape[1], device=x.device)
        dt = dt.masked_fill((steps >= counts.unsqueeze(-1))[..., None, None], 0.0)
        history = torch.arange(padded.shape[1] - x.shape[1], device=x.device)
        columns = (counts.unsqueeze(-1) + history).unsqueeze(-1).expand(-1, -1, padded.shape[2])
        self.conv, self.held = padded.gather(1, columns), ()
        decay = (dt * A).permute(0, 2, 3, 1).cumsum(-1)
        self.ssm = state_after(state, (x * dt.unsqueeze(-1)).permute(0, 2, 3, 1, 4), decay, B.transpose(1, 2))


State = KeyValues | MambaState | None


@dataclass
class ContextCache:
    """What the context tower has kept of the text it has read, for each layer.

    denoiser: the same states where the denoiser stands; the very same objects on one device, copies on two.
    hidden: (b, h) final hidden state of each row's last position, which predicts the next token.
    length: columns of keys and values that are in use, padding included.
    starts, ends: (b,) the first column of each row's text, and the one behind its last; None: 0 and `length`.
    """

    context: list[State]
    denoiser: list[State]
    hidden: Tensor | None = None
    length: int = 0
    starts: Tensor | None = None
    ends: Tensor | None = None

    def seen(self, new: int, device: torch.device, *, causal: bool) -> Tensor | None:
        """Which columns (b or 1, 1, new or 1, length + new) the new positions see, where `causal` does not say it."""
        alike = self.starts is None and self.ends is None
        if alike and (new == 1 or not causal or not self.length):
            return None
        columns = torch.arange(self.length + new, device=device)
        text = columns.new_ones(1, len(columns), dtype=torch.bool)
        if self.ends is not None:
            text = (columns < self.ends.to(device).unsqueeze(-1)) | (columns >= self.length)
        if self.starts is not None:
            text = text & (columns >= self.starts.to(device).unsqueeze(-1))
        text = text[:, None, None]
        if not causal or new == 1:
            return text
        own = columns[self.length :].unsqueeze(-1)
        # Padding sees itself: attention over nothing at all is not a number.
        return (text & (columns <= own)) | (columns == own)


def _mirror(source: State, target: State, device: torch.device, start: int) -> None:
    """Bring the denoiser's copy of a layer's state up to date: of keys and values, only columns from `start` move."""
    if isinstance(source, KeyValues) and isinstance(target, KeyValues):
        target.length = start
        target.write(*(view.to(device) for view in source.views(start)))
        target.length = source.length
    elif isinstance(source, MambaState) and isinstance(target, MambaState):
        target.conv, target.ssm = (None if t is None else t.to(device) for t in (source.conv, source.ssm))


# --- mixers: each maps (b, l, h) to (b, l, h), from a state (None: no past) that it updates if the pass keeps -------


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, _wide(self.weight), self.epsilon).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention without position encoding: causal, or, for a denoiser's block, in both directions."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner, kv = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: State, how: Pass) -> Tensor:
        length, kv_heads = x.shape[1], self.k_proj.out_features // self.head_dim
        key, value = (proj(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        if isinstance(state, KeyValues):
            key, value = state.write(key, value)
            state.length += length if how.keep else 0
        query = self.q_proj(x).unflatten(-1, (kv_heads, -1, self.head_dim)).permute(0, 2, 3, 1, 4)
        if how.causal and how.seen is None and length > 1:
            query = query.flatten(1, 2)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).flatten(2))
        # The heads of a group as further queries: keys and values are read as they stand, never repeated.
        group, seen = query.shape[2], how.seen
        if seen is not None and seen.shape[2] > 1:
            seen = seen.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=seen)
        return self.o_proj(out.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).flatten(2))


def state_after(state: Tensor, dtx: Tensor, decay: Tensor, B: Tensor) -> Tensor:
    """The scan's state (b, g, r, p, d) behind q positions: dtx (b, g, r, q, p), decay (b, g, r, q) summed logs,
    B (b, g, q, d)."""
    last = decay[..., -1:]
    added = (dtx * (last - decay).exp().unsqueeze(-1)).transpose(2, 3).flatten(3).mT @ B
    return last.exp().unsqueeze(-1) * state + added.unflatten(2, state.shape[2:4])


def scan_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, update: bool
) -> tuple[Tensor, Tensor]:
    """One chunk of Mamba-2's recurrence (Dao and Gu 2024, section 6), as matrix products.

        h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T,    y_i = h_i C_i

    Args:
        x: (b, q, g, r, p); dt: (b, q, g, r), positive; A: (g, r), negative; B, C: (b, q, g, d).
        state: (b, g, r, p, d) before the chunk.
        update: give the state after the chunk; else it comes back as it was.

    Returns:
        y (b, q, g, r, p) and the state.
    """
    r, p = x.shape[3:]
    if x.shape[1] == 1:
        dtx = (x * dt.unsqueeze(-1))[:, 0]
        state = (dt[:, 0] * A).exp()[..., None, None] * state + dtx.unsqueeze(-1) * B[:, 0, :, None, None]
        return (state.flatten(2, 3) @ C[:, 0].unsqueeze(-1)).view(x.shape), state
    decay = (dt * A).permute(0, 2, 3, 1).cumsum(-1)
    dtx = (x * dt.unsqueeze(-1)).permute(0, 2, 3, 1, 4)
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    # Log decays are at most 0; those above 0 are of later positions, and would overflow before they are left out.
    steps = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).clamp(max=0.0).exp().tril()
    within = (steps * (C @ B.mT).unsqueeze(2)) @ dtx
    before = (C @ state.flatten(2, 3).mT).unflatten(-1, (r, p)).transpose(2, 3)
    y = torch.addcmul(within, before, decay.exp().unsqueeze(-1)).permute(0, 3, 1, 2, 4)
    return y, state_after(state, dtx, decay, B) if update else state


class GatedNorm(nn.Module):
    """norm(y * silu(z)), over each group of channels by itself."""

    def __init__(self, size: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.epsilon = groups, epsilon

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * F.silu(_wide(z))).unflatten(-1, (self.groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=self.epsilon).flatten(-2) * _wide(self.weight)


class Mamba(nn.Module):
    """Mamba-2. The state space is scanned forward only, in the denoiser too."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        heads, groups, self.head_dim = config.mamba_num_heads, config.n_groups, config.mamba_head_dim
        self.heads, self.groups, self.chunk = heads, groups, config.chunk_size
        self.inner, self.bc = heads * self.head_dim, groups * config.ssm_state_size
        self.step_limit = tuple(config.time_step_limit)
        channels, taps = self.inner + 2 * self.bc, config.conv_kernel
        self.in_proj = nn.Linear(config.hidden_size, self.inner + channels + heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.arange(1, heads + 1).float().log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(self.inner, groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, state: State, how: Pass) -> Tensor:
        past = state if isinstance(state, MambaState) else MambaState()
        z, inputs, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.bc, self.heads], dim=-1)
        # transformers' own model also clamps at time_step_min, but only in its chunked path; training never does.
        dt = F.softplus(_wide(dt) + _wide(self.dt_bias)).clamp(*self.step_limit).unflatten(-1, (self.groups, -1))
        if how.text is not None:
            # Padding: nothing for the convolution to see, and no step of the scan.
            inputs = inputs * how.text.unsqueeze(-1)
            dt = dt * how.text[..., None, None]
        padded = self._padded(inputs, past)
        values, B, C = self._convolve(padded, x.shape[1]).split([self.inner, self.bc, self.bc], dim=-1)
        values = values.unflatten(-1, (self.groups, -1, self.head_dim))
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        A, D = (t.unflatten(0, (self.groups, -1)) for t in (-_wide(self.A_log).exp(), _wide(self.D)))
        ssm = past.ssm if past.ssm is not None else values.new_zeros(*values[:, 0].shape, B.shape[-1])
        if how.causal and not how.keep:
            past.held = (padded, values, dt, A, B, ssm)
        parts, length = [], x.shape[1]
        for start in range(0, length, self.chunk):
            chunk = slice(start, start + self.chunk)
            update = how.keep or start + self.chunk < length
            y, ssm = scan_chunk(values[:, chunk], dt[:, chunk], A, B[:, chunk], C[:, chunk], ssm, update=update)
            parts.append(y)
        if how.keep:
            past.conv, past.ssm = padded[:, length:].clone(), ssm
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)) + D.unsqueeze(-1) * values
        return self.out_proj(self.norm(y.flatten(2), z).to(x.dtype))

    def _padded(self, x: Tensor, past: MambaState) -> Tensor:
        """(b, l, c) behind the k - 1 inputs before it."""
        history = self.conv1d.weight.shape[2] - 1
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if past.conv is None else past.conv
        return torch.cat([before, x], dim=1)

    def _convolve(self, padded: Tensor, length: int) -> Tensor:
        """silu of the causal convolution of (b, k - 1 + l, c), in the wide dtype: shifted copies, summed."""
        weight, padded = _wide(self.conv1d.weight.squeeze(1)), _wide(padded)
        out = padded[:, :length] * weight[:, 0]
        for tap in range(1, weight.shape[1]):
            out = torch.addcmul(out, padded[:, tap : tap + length], weight[:, tap])
        return F.silu(out if self.conv1d.bias is None else out + _wide(self.conv1d.bias))


class SquaredReluMLP(nn.Module):
    def __init__(self, config: NemotronHConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, state: State = None, how: Pass = DENOISE) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


def routed_experts(
    tokens: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Tokens (n, h) through the experts chosen for each (n, k), weighted (n, k) and summed, in the tokens' dtype."""
    order = chosen.flatten().argsort()
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    sorted_tokens = tokens[order // chosen.shape[1]]
    parts = [expert(own) for expert, own in zip(experts, sorted_tokens.split(counts), strict=True) if len(own)]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    each = torch.cat(parts)[back].unflatten(0, chosen.shape)
    return (each * weights.unsqueeze(-1)).sum(1).to(tokens.dtype)


def routed_matrices(
    tokens: Tensor, weights: Tensor, chosen: Tensor, matrices: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """`routed_experts` of bare weights: calls of modules cost as much as these products of few tokens.

    matrices: up and down projection of each expert in turn; biases: likewise, or none at all.
    """

    def expert(number: int, x: Tensor) -> Tensor:
        up, down = matrices[2 * number : 2 * number + 2]
        up_bias, down_bias = biases[2 * number : 2 * number + 2] or (None, None)
        return F.linear(F.relu(F.linear(x, up, up_bias)).square(), down, down_bias)

    return routed_experts(tokens, weights, chosen, [partial(expert, i) for i in range(len(matrices) // 2)])


# As one step of a compiled graph, which could not follow how many tokens an expert gets.
compiled_routed_matrices = torch.library.custom_op("nemotron_h_twotower::routed_matrices", mutates_args=())(
    routed_matrices
)


@compiled_routed_matrices.register_fake
def _(tokens: Tensor, weights: Tensor, chosen: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    return torch.empty_like(tokens)


class Router(nn.Module):
    """Sigmoid scores; the bias decides who is chosen, and no more."""

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, h) -> weights and expert numbers, each (tokens, top k)."""
        scores = F.linear(_wide(x), _wide(self.weight)).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, chosen


def _is_bare(linear: nn.Module, device: torch.device) -> bool:
    """Whether a projection is its weight and no more: nothing wraps it, and it is not offloaded."""
    return type(linear) is nn.Linear and linear.weight.device == device


class MixtureOfExperts(nn.Module):
    """Routed experts, each run once over its tokens, and a shared one."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        width, experts = config.moe_intermediate_size, range(config.n_routed_experts)
        self.experts = nn.ModuleList([SquaredReluMLP(config, width) for _ in experts])
        self.shared_experts = SquaredReluMLP(config, config.moe_shared_expert_intermediate_size)

    def forward(self, x: Tensor, state: State, how: Pass) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        projections: list[Any] = [linear for expert in self.experts for linear in (expert.up_proj, expert.down_proj)]
        if torch.is_grad_enabled() or not all(_is_bare(linear, x.device) for linear in projections):
            routed = routed_experts(tokens, weights, chosen, list(self.experts))
        else:
            matrices = [linear.weight for linear in projections]
            biases = [linear.bias for linear in projections if linear.bias is not None]
            compiling = torch.compiler.is_compiling()
            through = torch.ops.nemotron_h_twotower.routed_matrices if compiling else routed_matrices
            routed = through(tokens, weights, chosen, matrices, biases)
        return routed.view(x.shape) + self.shared_experts(x)


class DenseMLP(SquaredReluMLP):
    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config, config.intermediate_size)


MIXERS: dict[str, type[nn.Module]] = {
    "linear_attention": Mamba, "full_attention": Attention, "moe": MixtureOfExperts, "mlp": DenseMLP,
    "mamba": Mamba, "attention": Attention,  # as older configurations spell them
}  # fmt: skip
STATES: dict[str, Callable[[], State]] = {
    "linear_attention": MambaState, "full_attention": KeyValues, "mamba": MambaState, "attention": KeyValues,
}  # fmt: skip


# --- towers -------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, config: NemotronHConfig, kind: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)
        # Mamba and attention: modulation, then norm. Experts and MLPs: norm, then modulation.
        self.modulated_first = kind in STATES

    def forward(self, x: Tensor, state: State, how: Pass, *, modulation: Tensor | None = None) -> Tensor:
        """`modulation`: (3, b, 1, h), the layer's shift, 1 + scale and gate; None for a plain layer."""
        if modulation is None:
            return x + self.mixer(self.norm(x), state, how)
        shift, scale, gate = modulation.unbind()
        if self.modulated_first:
            inputs = self.norm(torch.addcmul(shift, x, scale))
        else:
            inputs = torch.addcmul(shift, self.norm(x), scale)
        return torch.addcmul(x, gate, self.mixer(inputs, state, how))


class Tower(nn.Module):
    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.kinds = tuple(config.layers_block_type)
        self.layers = nn.ModuleList([Layer(config, kind) for kind in self.kinds])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    def states(self) -> list[State]:
        """States of a text of which nothing was read."""
        return [STATES[kind]() if kind in STATES else None for kind in self.kinds]

    def forward(self, ids: Tensor, states: list[State], how: Pass, *, modulations: Tensor | None = None) -> Tensor:
        """Ids (b, l) -> hidden states (b, l, h), before the final norm. Modulations: (layers, 3, b, 1, h)."""
        x = self.embeddings(ids.to(self.device))
        per_layer = [None] * len(self.layers) if modulations is None else modulations.unbind()
        for layer, state, modulation in zip(self.layers, states, per_layer, strict=True):
            x = layer(x, state, how, modulation=modulation)
        return x


def time_features(t: Tensor) -> Tensor:
    """Noise levels (b,) -> [cos, sin] of 1000 t at falling frequencies, (b, 256) float32."""
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (t.float() * TIME_SCALE).unsqueeze(-1) * torch.exp(-math.log(TIME_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# --- sampling -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took. passes: of the tower that decides on tokens, each over the whole batch; row_passes:
    summed over rows, counting those in which the row still had something to decide (NFE); new_tokens: summed over rows,
    up to and with EOS; seconds: wall-clock, the prompt's prefill included.

    Of `generate_speculative` alone: draft_passes of the denoiser, and drafted tokens that were accepted, over all rows.
    """

    passes: int
    row_passes: int
    new_tokens: int
    seconds: float
    draft_passes: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.new_tokens / self.row_passes


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits. temperature 0: greedily, and the rest does not matter.

    top_k: among so many; top_p: among the fewest whose probabilities, at the temperature, sum to at least that much.
    None: among all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    generator: torch.Generator | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature: found {self.temperature}, expected at least 0")
        _require(self.top_k is None or self.top_k > 0, f"top_k: found {self.top_k}, expected at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"top_p: found {self.top_p}, expected above 0, at most 1")

    def scores(self, logits: Tensor) -> Tensor:
        """(..., v) -> (..., v) logits at the temperature, minus infinity for what is never chosen. Temperature > 0."""
        scores = _wide(logits) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = scores.softmax(-1).sort(dim=-1, descending=True)
            enough = ranked.cumsum(-1) - ranked >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -math.inf)
        return scores

    def draw(self, scores: Tensor) -> Tensor:
        """(..., v) log-probabilities up to a constant -> (...) ids: with Gumbel noise the highest sum is a sample."""
        return (scores - torch.empty_like(scores).exponential_(generator=self.generator).log()).argmax(-1)

    def choose(self, logits: Tensor) -> Tensor:
        """(..., v) -> (...) ids."""
        return logits.argmax(-1) if self.temperature == 0 else self.draw(self.scores(logits))

    def accept(self, draft: Tensor, draft_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How much of a draft stays, and the token behind it, so that both are distributed as `logits` alone say.

        The rejection rule of speculative sampling (Leviathan and others 2023, algorithm 1): a drafted token of
        probability q stays with probability min(1, p / q); in place of the first that does not comes one drawn from
        max(p - q, 0), and behind a draft that stays whole, one drawn from p.

        Args:
            draft: (b, n), each token drawn by `choose` from its own draft_logits (b, n, v), which depend on no later
                token.
            logits: (b, n + 1, v) that decide.

        Returns:
            accepted (b,), 0 to n, and the next token (b,).
        """
        if self.temperature == 0:
            wanted = logits.argmax(-1)
            accepted = (draft == wanted[:, :-1]).long().cumprod(-1).sum(-1)
            return accepted, wanted.gather(1, accepted.unsqueeze(-1)).squeeze(-1)
        p, q = self.scores(logits).softmax(-1), self.scores(draft_logits).softmax(-1)
        each_p, each_q = (t.gather(-1, draft.unsqueeze(-1)).squeeze(-1) for t in (p[:, :-1], q))
        stays = torch.empty_like(each_p).uniform_(generator=self.generator) * each_q < each_p
        accepted = stays.long().cumprod(-1).sum(-1)
        at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
        p, q = p.gather(1, at).squeeze(1), F.pad(q, (0, 0, 0, 1)).gather(1, at).squeeze(1)
        rest = (p - q).clamp(min=0)
        # Where rounding leaves nothing of p - q, p and q are the same.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        return accepted, self.draw(rest.log())


@dataclass(frozen=True)
class BlockSettings:
    """How a block is filled; see `generate_mask_diffusion`."""

    size: int
    steps: int
    mask_token_id: int
    threshold: float
    sampling: Sampling
    on_step: OnStep | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("block_size", self.size), ("steps_per_block", self.steps)):
            _require(value > 0, f"{name}: found {value}, expected at least 1")
        threshold = self.threshold
        _require(0 <= threshold <= 1, f"confidence_threshold: found {threshold}, expected 0 to 1")


def commit(masked: Tensor, confidence: Tensor, *, threshold: float, steps_left: int) -> Tensor:
    """Which of the masked positions (b, s) to commit, (b, s) bool.

    In every row the most confident ones: as many as are above the threshold, at least one, and at least so many that
    equal shares would finish in the steps that are left.
    """
    above = (masked & (confidence > threshold)).sum(-1)
    share = (masked.sum(-1) + steps_left - 1) // steps_left
    count = torch.maximum(above, share).clamp(min=1)
    order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(masked.shape[1], device=masked.device) < count.unsqueeze(-1)
    return masked & torch.empty_like(masked).scatter_(1, order, first)


def end_rows(new: Tensor, eos_token_id: int | None) -> tuple[Tensor, int]:
    """New tokens (b, n) with everything after a row's first EOS made EOS, cut to the longest row; tokens in all."""
    if eos_token_id is None:
        return new, new.numel()
    ends = new == eos_token_id
    after = ends.cumsum(-1) - ends.long() > 0
    lengths = (~after).sum(-1)
    return new.masked_fill(after, eos_token_id)[:, : int(lengths.max())], int(lengths.sum())


def _check_ids(ids: Tensor, new: int = 1) -> None:
    shape = tuple(ids.shape)
    _require(len(shape) == 2 and 0 not in shape, f"input_ids: found shape {shape}, expected (rows, tokens), none 0")
    _require(not ids.is_floating_point(), f"input_ids: found {ids.dtype}, expected integers")
    _require(new > 0, f"max_new_tokens: found {new}, expected at least 1")


def _checked_mask(mask: Tensor | None, ids: Tensor, *, right: bool = False) -> Tensor | None:
    """An attention mask as bool, None if it masks nothing. right: padding on the right is allowed, too."""
    if mask is None:
        return None
    shape, expected = tuple(mask.shape), tuple(ids.shape)
    _require(shape == expected, f"attention_mask: found shape {shape}, expected that of input_ids, {expected}")
    text = mask.bool()
    if text.all():
        return None
    _require(bool(text.any(-1).all()), "attention_mask: found a row without text, expected at least one token")
    _require(right or bool(text[:, -1].all()), "attention_mask: found padding on the right, expected it on the left")
    stretches = (text[:, 1:] & ~text[:, :-1]).sum(-1) + text[:, 0]
    _require(bool((stretches == 1).all()), "attention_mask: found padding within text, expected it at the ends")
    return text


# --- a denoiser alone ---------------------------------------------------------------------------------------------

# In the folder of a denoiser without its context tower: `backbone`, where that is, from this folder, and its `sha256`.
POINTER_FILE = "context_tower.json"


def find_backbone(folder: str | os.PathLike[str], backbone: str | os.PathLike[str] | None) -> Path | None:
    """The folder that completes a denoiser alone, checked by its SHA-256; None where nothing points to one.

    Args:
        backbone: in place of the folder that the pointer names, where it moved.
    """
    pointer = Path(folder) / POINTER_FILE
    if not pointer.is_file():
        _require(backbone is None, f"backbone: found {backbone}, expected None: {folder} has no {POINTER_FILE}")
        return None
    found = json.loads(pointer.read_text())
    home = Path(backbone or Path(folder) / found["backbone"])
    _require(home.is_dir(), f"{home}: not found, expected the backbone of {folder} (backbone=... names it if it moved)")
    digest = hashlib.sha256()
    for path in sorted([home / "config.json", *home.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    sha256, expected = digest.hexdigest(), found["sha256"]
    _require(sha256 == expected, f"{home}: found sha256 {sha256}, expected {expected}, the backbone of {folder}")
    return home


def context_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The context tower and its head, one tensor at a time, from two towers or a plain NemotronH in either spelling."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    two = any(key.startswith("context_tower.") for file in files for key in file.keys())  # noqa: SIM118
    for file in files:
        for key in sorted(file.keys()):
            if two:
                if key.startswith("context_"):
                    yield key, file.get_tensor(key)
                continue
            name = f"context_{key}" if key == "lm_head.weight" else f"context_tower.{key.partition('.')[2]}"
            before, experts, projection = name.partition(".mixer.experts.")
            if projection in ("up_proj", "down_proj"):  # of all experts, stacked
                rows = file.get_slice(key)
                for expert in range(rows.get_shape()[0]):
                    yield f"{before}{experts}{expert}.{projection}.weight", rows[expert]
            else:
                yield name, file.get_tensor(key)


UNSUPPORTED = {
    "moe_latent_size": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


class NemotronHTwoTowerForCausalLM(PreTrainedModel):
    """The two towers, their heads and the time conditioning, under the names of the released checkpoint.

    `forward` is the context tower's next-token prediction. Text is written by `generate_mask_diffusion`,
    `generate_mock_ar`, `generate_ar` or `generate_speculative`, which are made of `prefill`, `denoise_block`, `extend`,
    `verify` and `settle`.
    `model.denoise_hidden = torch.compile(model.denoise_hidden)` compiles the denoiser's step, in one graph.

    All that write share these arguments and results:
        input_ids: (b, l) prompts, l >= 1.
        max_new_tokens: any number from 1 on.
        temperature, top_k, top_p: see `Sampling`.
        eos_token_id: ends a row, while others go on; None writes on to `max_new_tokens`.
        attention_mask: (b, l), 0 for padding on the left of prompts that are shorter than others; None: no padding.
            Each row is written as if it were alone, up to rounding.
        generator: random numbers for temperature > 0, on the device of the tower that decides on tokens. Without one
            torch's own are used, seeded by `torch.manual_seed`. The same seed and batch give the same text.
        returns: (b, l + n) ids with the prompts as they were given, n <= max_new_tokens the new tokens of the longest
            row, ended rows padded with EOS. `last_generation` says what it took.
        raises: ArgumentError, naming an argument out of range.
    """

    config_class = NemotronHConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    # Tensors are read and written under their own names. transformers knows renamings for its own NemotronH by the
    # model type, which is the same, and before 5.17 one of them would be undone on saving: `embedding.weight`.
    _weight_conversions = property(lambda self: [], lambda self, value: None)
    # The released code rounds t to bfloat16 before its features; multiples of 1/16 are the same either way.
    round_time_to_bf16 = False
    # What the last call of a `generate_` method took.
    last_generation: GenerationStats | None = None

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        found = config.to_dict()
        for key, expected in UNSUPPORTED.items():
            value = found.get(key, expected)
            _require(value == expected, f"config.json: {key}: found {value!r}, expected {expected!r}")
        hidden = config.hidden_size
        self.context_tower = Tower(config)
        self.context_lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.denoiser_tower = Tower(config)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        tables = [nn.Parameter(torch.empty(3, hidden)) for _ in config.layers_block_type]
        self.scale_shift_tables = nn.ParameterList(tables)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *arguments: Any, backbone: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Any:  # fmt: skip
        """As of `PreTrainedModel`. A denoiser alone is completed by the context tower of the backbone that its folder
        points to, which must be the very one it was trained with.

        Args:
            backbone: the folder of that backbone, where it moved.

        Raises:
            ArgumentError: no such backbone, or another one. A context tower is never left random.
        """
        home = find_backbone(folder, backbone)
        wants_info = settings.pop("output_loading_info", False)
        ignored = cls._keys_to_ignore_on_load_missing
        try:
            if home is not None:
                cls._keys_to_ignore_on_load_missing = [r"^context_"]
            model, info = super().from_pretrained(folder, *arguments, output_loading_info=True, **settings)
        finally:
            cls._keys_to_ignore_on_load_missing = ignored
        if home is not None:
            model._take_context(home)
        lost = sorted(name for name in info["missing_keys"] if name.startswith("context_"))
        _require(not lost, f"{folder}: found no {', '.join(lost[:3])}, expected a context tower or {POINTER_FILE}")
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _take_context(self, folder: Path) -> None:
        """Fill the context tower and its head from a backbone's folder, all of them."""
        wanted = {name: tensor for name, tensor in self.state_dict().items() if name.startswith("context_")}
        for name, tensor in context_tensors(folder):
            target = wanted.pop(name, None)
            found = f"{folder}: found {name} {tuple(tensor.shape)}"
            _require(target is not None, f"{found}, expected no such tensor")
            assert target is not None
            _require(target.shape == tensor.shape, f"{found}, expected {tuple(target.shape)}")
            target.copy_(tensor)
        _require(not wanted, f"{folder}: found no {min(wanted, default='')}, expected the backbone of this denoiser")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba):
            init.copy_(module.A_log, torch.arange(1, module.heads + 1).float().log())
            init.ones_(module.D)
            init.ones_(module.dt_bias)
        elif isinstance(module, GatedNorm):
            init.ones_(module.weight)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, NemotronHTwoTowerForCausalLM):
            for table in module.scale_shift_tables:
                init.normal_(table, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.context_tower.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.context_tower.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.context_lm_head

    def place_towers_on_devices(
        self, context_device: str | torch.device, denoiser_device: str | torch.device
    ) -> "NemotronHTwoTowerForCausalLM":
        """Put the context tower and its head on one device, everything else on the other."""
        self.to(denoiser_device)
        self.context_tower.to(context_device)
        self.context_lm_head.to(context_device)
        return self

    def _read(self, input_ids: Tensor, text: Tensor | None) -> Tensor:
        """Final hidden states (b, l, h) of the context tower, which keeps nothing. text: (b, l) bool, None: all."""
        device, seen = self.context_tower.device, None
        if text is not None and text[:, 0].all():
            text = None  # padding on the right alone: nothing before it sees it
        if text is not None:
            text = text.to(device)
            seen = ContextCache([], [], starts=text.int().argmax(-1)).seen(text.shape[1], device, causal=True)
        how = Pass(causal=True, keep=True, seen=seen, text=text)
        hidden = self.context_tower(input_ids, [None] * len(self.context_tower.layers), how)
        return self.context_tower.norm_f(hidden)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:  # fmt: skip
        """Next-token logits of the context tower.

        Args:
            input_ids: (b, l) token ids.
            attention_mask: (b, l), 0 for padding on the left or the right.
            labels: (b, l) ids to score, shifted inside; -100 leaves a position out. The loss is in nats per token.
            logits_to_keep: give only that many last positions; 0 for all.

        Returns:
            logits (b, l, v) float32 (float64 of a float64 model), and the loss.
        """
        _check_ids(input_ids)
        hidden = self._read(input_ids, _checked_mask(attention_mask, input_ids, right=True))
        logits = _wide(self.context_lm_head(hidden[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            _require(logits_to_keep == 0, f"logits_to_keep: found {logits_to_keep}, expected 0 with labels")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability of each token given those before it, under the context tower.

        Args:
            input_ids: (b, l) token ids.
            attention_mask: (b, l), 0 for padding on the left or the right.

        Returns:
            (b, l) in nats, at most 0, float32 (float64 of a float64 model). The first token of a row, and padding, have
            0, so that a row's sum is the log-likelihood of its text behind the first token.
        """
        _check_ids(input_ids)
        text = _checked_mask(attention_mask, input_ids, right=True)
        hidden = self._read(input_ids, text)[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten().to(hidden.device)
        # A part at a time: the logits of all positions would be the largest tensor by far.
        parts = [
            -F.cross_entropy(_wide(self.context_lm_head(some)), wanted, reduction="none")
            for some, wanted in zip(hidden.split(SCORED_TOGETHER), targets.split(SCORED_TOGETHER), strict=True)
        ]
        scores = torch.cat(parts) if parts else hidden.new_zeros(0)
        scores = F.pad(scores.view(len(input_ids), -1), (1, 0)).to(input_ids.device)
        return scores if text is None else scores * (text & text.roll(1, dims=1))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ContextCache:
        """Read texts (b, l), l >= 0, with the context tower. attention_mask: (b, l), 0 for padding on the left."""
        context = self.context_tower.states()
        together = self.context_tower.device == self.denoiser_tower.device
        cache = ContextCache(context, context if together else self.context_tower.states())
        if input_ids.shape[1] == 0:
            return cache
        text = None
        if attention_mask is not None and not attention_mask.all():
            text = attention_mask.bool().to(self.context_tower.device)
            cache.starts = input_ids.shape[1] - text.sum(-1)
        return self._extend(cache, input_ids, text)

    @torch.no_grad()
    def extend(self, cache: ContextCache, ids: Tensor) -> ContextCache:
        """Read further ids (b, l), l >= 1, behind what the cache holds. Changes the cache and returns it."""
        return self._extend(cache, ids, None)

    def _extend(self, cache: ContextCache, ids: Tensor, text: Tensor | None) -> ContextCache:
        assert cache.ends is None, "rows of different ends are extended by `verify` and `settle`"
        seen = cache.seen(ids.shape[1], self.context_tower.device, causal=True)
        hidden = self.context_tower(ids, cache.context, Pass(causal=True, keep=True, seen=seen, text=text))
        cache.hidden = self.context_tower.norm_f(hidden[:, -1])
        start, cache.length = cache.length, cache.length + ids.shape[1]
        return self._mirrored(cache, start)

    def _mirrored(self, cache: ContextCache, start: int) -> ContextCache:
        if cache.denoiser is not cache.context:
            for source, target in zip(cache.context, cache.denoiser, strict=True):
                _mirror(source, target, self.denoiser_tower.device, start)
        return cache

    @torch.no_grad()
    def verify(self, cache: ContextCache, ids: Tensor) -> Tensor:
        """Next-token logits (b, l, v) behind each of further ids (b, l), which the cache holds back until `settle`."""
        seen = cache.seen(ids.shape[1], self.context_tower.device, causal=True)
        hidden = self.context_tower(ids, cache.context, Pass(causal=True, keep=False, seen=seen))
        return self.context_lm_head(self.context_tower.norm_f(hidden))

    @torch.no_grad()
    def settle(self, cache: ContextCache, counts: Tensor, verified: int) -> ContextCache:
        """Take up the first `counts` (b,) of the `verified` ids that `verify` has read last, as if only those had been
        read, and forget the others. Changes the cache and returns it; `hidden` is not kept."""
        device = self.context_tower.device
        counts = counts.to(device)
        before = cache.ends if cache.ends is not None else torch.full_like(counts, cache.length)
        ends = before + counts
        (first, _), (least, length) = (t.aminmax() for t in (before, ends))
        for state in cache.context:
            if isinstance(state, KeyValues):
                if cache.ends is not None:
                    state.pull(before, verified)
                state.length = int(length)
            elif isinstance(state, MambaState):
                state.settle(counts)
        cache.length, cache.ends, cache.hidden = int(length), None if least == length else ends, None
        return self._mirrored(cache, int(first))

    @torch.no_grad()
    def denoise_block(self, block_ids: Tensor, t: Tensor | None, cache: ContextCache) -> Tensor:
        """The denoiser's prediction of every token of the block behind the cached text.

        Args:
            block_ids: (b, s) ids, masked positions holding the mask token.
            t: (b,) noise levels; None leaves time conditioning and modulation out.

        Returns:
            (b, s, v) logits of the tokens at these same positions, in the model's dtype.
        """
        modulations = None if t is None else self.modulations(t)
        return self.lm_head(self.denoise_hidden(block_ids, modulations, cache))

    @torch.no_grad()
    def modulations(self, t: Tensor) -> Tensor:
        """Noise levels (b,) -> (layers, 3, b, 1, h), every layer's shift, 1 + scale and gate."""
        rounded = t.bfloat16() if self.round_time_to_bf16 else t
        features = time_features(rounded.to(self.denoiser_tower.device)).to(self.lm_head.weight.dtype)
        conditioning = self.t_block(self.t_embedder["mlp"](features)).unflatten(-1, (3, -1)).transpose(0, 1)
        modulations = (torch.stack(list(self.scale_shift_tables)).unsqueeze(2) + conditioning).unsqueeze(3)
        modulations[:, 1] += 1
        return modulations

    @torch.no_grad()
    def denoise_hidden(self, block_ids: Tensor, modulations: Tensor | None, cache: ContextCache) -> Tensor:
        """`denoise_block` before the head, of the `modulations` of noise levels: final hidden states (b, s, h)."""
        seen = cache.seen(block_ids.shape[1], self.denoiser_tower.device, causal=False)
        how = DENOISE if seen is None else Pass(causal=False, keep=False, seen=seen)
        hidden = self.denoiser_tower(block_ids, cache.denoiser, how, modulations=modulations)
        return self.denoiser_tower.norm_f(hidden)

    def _fill_block(
        self, cache: ContextCache, done: Tensor, settings: BlockSettings, levels: Tensor, number: int
    ) -> tuple[Tensor, int, Tensor]:
        """Write one block in the rows that are not done: ids (b, s), passes, and passes of each row (b,).

        levels: `modulations` of the noise level of 0 to s masked tokens.
        """
        masked = (~done).unsqueeze(-1).repeat(1, settings.size)
        ids = torch.full(masked.shape, settings.mask_token_id, device=done.device)
        passes, row_passes = 0, torch.zeros(len(done), dtype=torch.int64, device=done.device)
        for step in range(settings.steps):
            left = masked.sum(-1)
            if not left.any():
                break
            hidden = self.denoise_hidden(ids, levels[:, :, left], cache)
            # Of the positions that are still masked alone: the head is the largest matrix of the pass.
            logits = _wide(self.lm_head(hidden[masked]))
            logits[:, settings.mask_token_id] = -math.inf
            best = settings.sampling.choose(logits)
            sure = logits.softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
            predicted = ids.masked_scatter(masked, best)
            confidence = sure.new_zeros(ids.shape).masked_scatter(masked, sure)
            steps_left = settings.steps - step
            now = commit(masked, confidence, threshold=settings.threshold, steps_left=steps_left)
            passes, row_passes = passes + 1, row_passes + masked.any(-1)
            ids, masked = torch.where(now, predicted, ids), masked & ~now
            if settings.on_step is not None:
                settings.on_step(DenoisingStep(number, step, left / settings.size, ids, predicted, confidence, now))
        return ids, passes, row_passes

    @torch.no_grad()
    def generate_mask_diffusion(
        self, input_ids: Tensor, max_new_tokens: int = 128, block_size: int = 16, steps_per_block: int = 16,
        mask_token_id: int = 3, temperature: float = 0.0, top_k: int | None = None,
        confidence_threshold: float = 0.9, eos_token_id: int | None = None, *,
        attention_mask: Tensor | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, on_step: OnStep | None = None,
    ) -> Tensor:  # fmt: skip
        """Write block after block with the denoiser, each from all masks to none. See the class for the rest.

        A step predicts every masked token of the block, greedily or sampled, and commits those it is most sure of by
        the untempered probability (see `commit`); what is committed stays. t is each row's masked fraction. The mask
        token is never chosen. Rows stop by themselves. The last block is filled whole and cut.

        Args:
            steps_per_block: passes of the denoiser that a block takes at most.
            confidence_threshold: every token that is more probable than this is committed at once.
            on_step: called after every step with a `DenoisingStep`.
        """
        started = time.perf_counter()
        self._check_arguments(input_ids, max_new_tokens, eos_token_id, mask_token_id)
        sampling = Sampling(temperature, top_k, generator, top_p)
        settings = BlockSettings(block_size, steps_per_block, mask_token_id, confidence_threshold, sampling, on_step)
        device = self.denoiser_tower.device
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        blocks: list[Tensor] = []
        passes, row_passes = 0, torch.zeros(len(input_ids), dtype=torch.int64, device=device)
        cache = self.prefill(input_ids, _checked_mask(attention_mask, input_ids))
        levels = self.modulations(torch.arange(block_size + 1, device=device) / block_size)
        for number in range(-(-max_new_tokens // block_size)):
            if blocks:
                self.extend(cache, blocks[-1])
            ids, block_passes, block_row_passes = self._fill_block(cache, done, settings, levels, number)
            # The rows that have ended are read as EOS; what stands in them is not looked at again.
            blocks.append(ids if eos_token_id is None else ids.masked_fill(done.unsqueeze(-1), eos_token_id))
            passes, row_passes = passes + block_passes, row_passes + block_row_passes
            if eos_token_id is not None:
                done = done | (blocks[-1] == eos_token_id).any(-1)
                if done.all():
                    break
        new, count = end_rows(torch.cat(blocks, dim=1)[:, :max_new_tokens], eos_token_id)
        output = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
        self.last_generation = GenerationStats(passes, int(row_passes.sum()), count, time.perf_counter() - started)
        return output

    def _check_arguments(self, ids: Tensor, new: int, eos_token_id: int | None, mask_token_id: int = 0) -> None:
        _check_ids(ids, new)
        last = self.config.vocab_size - 1
        for name, value in (("mask_token_id", mask_token_id), ("eos_token_id", eos_token_id)):
            _require(value is None or 0 <= value <= last, f"{name}: found {value}, expected 0 to {last}")

    def _one_by_one(
        self, predict: Callable[[Tensor | None], Tensor], input_ids: Tensor, max_new_tokens: int,
        sampling: Sampling, eos_token_id: int | None, on_tokens: OnTokens | None, started: float,
    ) -> Tensor:  # fmt: skip
        """`predict` takes the token (b, 1) chosen last (None at first) and gives next-token logits (b, v)."""
        tokens: list[Tensor] = []
        done, row_passes = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device), 0
        for _ in range(max_new_tokens):
            row_passes += int((~done).sum())
            token = sampling.choose(predict(tokens[-1] if tokens else None)).unsqueeze(-1).to(done.device)
            tokens.append(token if eos_token_id is None else token.masked_fill(done, eos_token_id))
            if on_tokens is not None:
                on_tokens(tokens[-1], ~done)
            if eos_token_id is not None:
                done = done | (tokens[-1] == eos_token_id)
                if done.all():
                    break
        new, count = end_rows(torch.cat(tokens, dim=1), eos_token_id)
        self.last_generation = GenerationStats(len(tokens), row_passes, count, time.perf_counter() - started)
        return torch.cat([input_ids, new], dim=1)

    @torch.no_grad()
    def generate_mock_ar(
        self, input_ids: Tensor, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
        eos_token_id: int | None = None, *, attention_mask: Tensor | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, on_tokens: OnTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Write token by token with the denoiser as a next-token model, without time conditioning or modulation.

        It is fed the last token alone, beside the context tower's states before that token. A denoiser whose weights
        are the context tower's then writes what `generate_ar` writes. See the class for the rest.
        """
        started = time.perf_counter()
        self._check_arguments(input_ids, max_new_tokens, eos_token_id)
        text = _checked_mask(attention_mask, input_ids)
        cache, last = self.prefill(input_ids[:, :-1], None if text is None else text[:, :-1]), input_ids[:, -1:]

        def predict(token: Tensor | None) -> Tensor:
            nonlocal last
            if token is not None:
                self.extend(cache, last)
                last = token
            return self.denoise_block(last, None, cache)[:, -1]

        sampling = Sampling(temperature, top_k, generator, top_p)
        return self._one_by_one(predict, input_ids, max_new_tokens, sampling, eos_token_id, on_tokens, started)

    @torch.no_grad()
    def generate_ar(
        self, input_ids: Tensor, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
        eos_token_id: int | None = None, *, attention_mask: Tensor | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, on_tokens: OnTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Write token by token with the context tower and its own head, cached. See the class for the rest.

        The passes are the context tower's, the prefill one of them: the first token comes from it.
        """
        started = time.perf_counter()
        self._check_arguments(input_ids, max_new_tokens, eos_token_id)
        cache = self.prefill(input_ids, _checked_mask(attention_mask, input_ids))

        def predict(token: Tensor | None) -> Tensor:
            if token is not None:
                self.extend(cache, token)
            return self.context_lm_head(cache.hidden)

        sampling = Sampling(temperature, top_k, generator, top_p)
        return self._one_by_one(predict, input_ids, max_new_tokens, sampling, eos_token_id, on_tokens, started)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 128,
        do_sample: bool = False, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        eos_token_id: int | None = None, generator: torch.Generator | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """`generate_ar`, its arguments named and preset as in `transformers`. Without an EOS, the configuration's."""
        if eos_token_id is None and isinstance(self.config.eos_token_id, int):
            eos_token_id = self.config.eos_token_id
        return self.generate_ar(
            input_ids, max_new_tokens, temperature if do_sample else 0.0, top_k, eos_token_id,
            attention_mask=attention_mask, top_p=top_p, generator=generator, on_tokens=on_tokens,
        )  # fmt: skip

    @torch.no_grad()
    def generate_speculative(
        self, input_ids: Tensor, max_new_tokens: int = 128, block_size: int = 16, draft_steps: int = 1,
        mask_token_id: int = 3, temperature: float = 0.0, top_k: int | None = None,
        eos_token_id: int | None = None, *, attention_mask: Tensor | None = None, top_p: float | None = None,
        generator: torch.Generator | None = None, on_tokens: OnTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Write what `generate_ar` writes, in fewer passes of the context tower. See the class for the rest.

        The denoiser drafts a block behind the last token; the context tower reads both in one pass, and keeps the
        longest prefix that it accepts (see `Sampling.accept`) and a token of its own. Its states go back to there.
        Greedy, the ids are those of `generate_ar` (up to ties within rounding); sampled, their distribution is.

        Args:
            block_size: tokens that the denoiser sees, the last of the text and the drafted ones; at least 2.
            draft_steps: passes of the denoiser to a block. Each fixes the next tokens from the left, an equal share.
        """
        started = time.perf_counter()
        self._check_arguments(input_ids, max_new_tokens, eos_token_id, mask_token_id)
        _require(block_size > 1, f"block_size: found {block_size}, expected at least 2")
        steps_fit = 0 < draft_steps < block_size
        _require(steps_fit, f"draft_steps: found {draft_steps}, expected 1 to block_size - 1, {block_size - 1}")
        sampling, device = Sampling(temperature, top_k, generator, top_p), self.context_tower.device
        text = _checked_mask(attention_mask, input_ids)
        cache = self.prefill(input_ids[:, :-1], None if text is None else text[:, :-1])
        last, rows = input_ids[:, -1:].to(device, torch.int64), len(input_ids)
        new = torch.zeros(rows, max_new_tokens + block_size, dtype=torch.int64, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        done, steps = torch.zeros_like(lengths, dtype=torch.bool), torch.arange(block_size, device=device)
        passes = row_passes = kept = 0
        while not done.all():
            draft, draft_logits = self._draft(cache, last, block_size, draft_steps, mask_token_id, sampling)
            logits = self.verify(cache, torch.cat([last, draft], dim=1))
            accepted, own = sampling.accept(draft, draft_logits, logits)
            ids = F.pad(draft, (0, 1)).scatter(1, accepted.unsqueeze(-1), own.unsqueeze(-1))
            counts = (accepted + 1).masked_fill(done, 0)
            self.settle(cache, counts, block_size)
            is_new = (steps < counts.unsqueeze(-1)) & (lengths.unsqueeze(-1) + steps < max_new_tokens)
            if eos_token_id is not None:
                ended = (ids == eos_token_id).long()
                is_new = is_new & (ended.cumsum(-1) - ended == 0)
            added = is_new.sum(-1)
            # What stands behind a row's new tokens is overwritten by its next ones, or cut at the end.
            columns = lengths.unsqueeze(-1) + steps
            new = torch.where(done.unsqueeze(-1), new, new.scatter(1, columns, ids))
            passes, row_passes, kept = passes + 1, row_passes + int((~done).sum()), kept + int(accepted[~done].sum())
            if on_tokens is not None:
                on_tokens(ids, is_new)
            lengths, last = lengths + added, own.unsqueeze(-1)
            done = done | (added < counts) | (lengths == max_new_tokens)
            if eos_token_id is not None:
                done = done | (own == eos_token_id)
        new, count = end_rows(new[:, :max_new_tokens], eos_token_id)
        seconds = time.perf_counter() - started
        self.last_generation = GenerationStats(passes, row_passes, count, seconds, passes * draft_steps, kept)
        return torch.cat([input_ids, new.to(input_ids.device)], dim=1)

    def _draft(
        self, cache: ContextCache, last: Tensor, block_size: int, steps: int, mask_token_id: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Drafted ids (b, s - 1) behind the last one (b, 1), and the logits (b, s - 1, v) that each was drawn from."""
        count, all_logits = block_size - 1, []
        ids = torch.cat([last, last.new_full((len(last), count), mask_token_id)], dim=1)
        for step in range(steps):
            start, stop = 1 + step * count // steps, 1 + (step + 1) * count // steps
            t = torch.full((len(ids),), (block_size - start) / block_size, device=ids.device)
            logits = self.denoise_block(ids, t, cache)[:, start:stop].to(ids.device)
            logits[..., mask_token_id] = -math.inf
            ids[:, start:stop] = sampling.choose(logits)
            all_logits.append(logits)
        return ids[:, 1:], torch.cat(all_logits, dim=1)
