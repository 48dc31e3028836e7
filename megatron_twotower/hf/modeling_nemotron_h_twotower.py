"""A two-tower NemotronH: an autoregressive context tower, and a denoiser that writes text in blocks beside it.

This file ships inside the model's folder and needs only torch and transformers (5.3 or newer):

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate_mask_diffusion(input_ids, max_new_tokens=128)

The context tower reads clean text, causally, and keeps for every layer what its denoiser twin starts from: keys and
values of attention layers, convolution and scan states of Mamba layers. The denoiser sees one block of tokens, partly
masked, and predicts all of them at once; a block that is done is read by the context tower.

Dimensions: b batch, l length, s block size, h hidden size, v vocabulary; Mamba: g groups of r heads, p head size,
d state size, c convolution channels, k taps. Norms, convolutions, scans and routers work in float32, or in float64 in
a float64 model.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NemotronHConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput

TIME_FEATURES, TIME_SCALE, TIME_PERIOD = 256, 1000.0, 10000.0

# Called with: block, step, ids (b, s), committed in this step (b, s) bool, confidence (b, s) float.
OnStep = Callable[[int, int, Tensor, Tensor, Tensor], None]


class ArgumentError(ValueError):
    """An argument, or a field of the configuration, that this model cannot work with."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- what the context tower keeps ---------------------------------------------------------------------------------


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


class MambaState:
    """The last k - 1 inputs of the convolution (b, k - 1, c), and the state of the scan (b, g, r, p, d)."""

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.ssm: Tensor | None = None


State = KeyValues | MambaState | None


@dataclass
class ContextCache:
    """What the context tower has kept of the text it has read, for each layer.

    denoiser: the same states where the denoiser stands; the very same objects on one device, copies on two.
    hidden: (b, h) final hidden state of the last position, which predicts the next token.
    """

    context: list[State]
    denoiser: list[State]
    hidden: Tensor | None = None
    length: int = 0


def _mirror(source: State, target: State, device: torch.device) -> None:
    """Bring the denoiser's copy of a layer's state up to date: of keys and values, only what is new moves."""
    if isinstance(source, KeyValues) and isinstance(target, KeyValues):
        target.write(*(view.to(device) for view in source.views(target.length)))
        target.length = source.length
    elif isinstance(source, MambaState) and isinstance(target, MambaState):
        target.conv, target.ssm = (None if t is None else t.to(device) for t in (source.conv, source.ssm))


# --- mixers: each maps (b, l, h) to (b, l, h), from a state (None: no past) that it updates if `keep` ----------------


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

    def forward(self, x: Tensor, state: State, *, keep: bool) -> Tensor:
        projected = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        past = 0
        if isinstance(state, KeyValues):
            past = state.length
            key, value = state.write(key, value)
            state.length += x.shape[1] if keep else 0
        mask = None
        if keep and past and x.shape[1] > 1:
            mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(past)
        causal = keep and not past and x.shape[1] > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
    r, p, q = x.shape[3], x.shape[4], x.shape[1]
    if q == 1:
        dtx = (x * dt.unsqueeze(-1))[:, 0]
        state = (dt[:, 0] * A).exp()[..., None, None] * state + dtx.unsqueeze(-1) * B[:, 0, :, None, None]
        return (state.flatten(2, 3) @ C[:, 0].unsqueeze(-1)).view(x.shape), state
    decay = (dt * A).permute(0, 2, 3, 1).cumsum(-1)
    dtx = (x * dt.unsqueeze(-1)).permute(0, 2, 3, 1, 4)
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    later = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    steps = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, -math.inf).exp()
    within = (steps * (C @ B.mT).unsqueeze(2)) @ dtx
    before = (C @ state.flatten(2, 3).mT).unflatten(-1, (r, p)).transpose(2, 3)
    y = torch.addcmul(within, before, decay.exp().unsqueeze(-1)).permute(0, 3, 1, 2, 4)
    if update:
        last = decay[..., -1:]
        added = (dtx * (last - decay).exp().unsqueeze(-1)).transpose(2, 3).flatten(3).mT @ B
        state = last.exp().unsqueeze(-1) * state + added.unflatten(2, (r, p))
    return y, state


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

    def forward(self, x: Tensor, state: State, *, keep: bool) -> Tensor:
        past = state if isinstance(state, MambaState) else MambaState()
        z, conv_input, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.bc, self.heads], dim=-1)
        values, B, C = self._convolve(conv_input, past, keep=keep).split([self.inner, self.bc, self.bc], dim=-1)
        values = values.unflatten(-1, (self.groups, -1, self.head_dim))
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        # transformers' own model also clamps at time_step_min, but only in its chunked path; training never does.
        dt = F.softplus(_wide(dt) + _wide(self.dt_bias)).clamp(*self.step_limit).unflatten(-1, (self.groups, -1))
        A, D = (t.unflatten(0, (self.groups, -1)) for t in (-_wide(self.A_log).exp(), _wide(self.D)))
        ssm = past.ssm if past.ssm is not None else values.new_zeros(*values[:, 0].shape, B.shape[-1])
        parts, length = [], x.shape[1]
        for start in range(0, length, self.chunk):
            chunk = slice(start, start + self.chunk)
            update = keep or start + self.chunk < length
            y, ssm = scan_chunk(values[:, chunk], dt[:, chunk], A, B[:, chunk], C[:, chunk], ssm, update=update)
            parts.append(y)
        if keep:
            past.ssm = ssm
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)) + D.unsqueeze(-1) * values
        return self.out_proj(self.norm(y.flatten(2), z).to(x.dtype))

    def _convolve(self, x: Tensor, past: MambaState, *, keep: bool) -> Tensor:
        """silu of the causal convolution of (b, l, c), in the wide dtype: shifted copies, summed."""
        weight, length = _wide(self.conv1d.weight.squeeze(1)), x.shape[1]
        history = weight.shape[1] - 1
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if past.conv is None else past.conv
        padded = torch.cat([before, x], dim=1)
        if keep:
            past.conv = padded[:, length:].clone()
        padded = _wide(padded)
        out = padded[:, :length] * weight[:, 0]
        for tap in range(1, history + 1):
            out = torch.addcmul(out, padded[:, tap : tap + length], weight[:, tap])
        return F.silu(out if self.conv1d.bias is None else out + _wide(self.conv1d.bias))


class SquaredReluMLP(nn.Module):
    def __init__(self, config: NemotronHConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, state: State = None, *, keep: bool = False) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


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


class MixtureOfExperts(nn.Module):
    """Routed experts, each run once over its tokens, and a shared one."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        width, experts = config.moe_intermediate_size, range(config.n_routed_experts)
        self.experts = nn.ModuleList([SquaredReluMLP(config, width) for _ in experts])
        self.shared_experts = SquaredReluMLP(config, config.moe_shared_expert_intermediate_size)

    def forward(self, x: Tensor, state: State, *, keep: bool) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        order = chosen.flatten().argsort(stable=True)
        rows, weights = order // chosen.shape[1], weights.flatten()[order].unsqueeze(-1)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        out = torch.zeros(tokens.shape, dtype=weights.dtype, device=tokens.device)
        for expert, own, weight in zip(self.experts, rows.split(counts), weights.split(counts), strict=True):
            if len(own):
                out = out.index_add(0, own, expert(tokens[own]) * weight)
        return out.to(x.dtype).view(x.shape) + self.shared_experts(x)


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

    def forward(self, x: Tensor, state: State, *, keep: bool, modulation: Tensor | None = None) -> Tensor:
        """`modulation`: (b, 3h), the layer's shift, scale and gate; None for a plain layer."""
        if modulation is None:
            return x + self.mixer(self.norm(x), state, keep=keep)
        shift, scale, gate = modulation.unsqueeze(1).chunk(3, dim=-1)
        if self.modulated_first:
            inputs = self.norm(torch.addcmul(x + shift, x, scale))
        else:
            normed = self.norm(x)
            inputs = torch.addcmul(normed + shift, normed, scale)
        return torch.addcmul(x, gate, self.mixer(inputs, state, keep=keep))


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

    def forward(
        self, ids: Tensor, states: list[State], *, keep: bool, modulations: list[Tensor] | None = None
    ) -> Tensor:
        """Ids (b, l) -> hidden states (b, l, h), before the final norm."""
        x = self.embeddings(ids.to(self.device))
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            x = layer(x, state, keep=keep, modulation=None if modulations is None else modulations[i])
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
    """What a generation took. passes: of the tower that predicts, each over the whole batch; row_passes: summed over
    rows, counting those in which the row still had something to predict (NFE); new_tokens: summed over rows, up to
    and with EOS; seconds: wall-clock, the prompt's prefill included."""

    passes: int
    row_passes: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_pass(self) -> float:
        return self.new_tokens / self.row_passes


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits. temperature 0: greedily; top_k: among so many, None for all."""

    temperature: float = 0.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature: found {self.temperature}, expected at least 0")
        _require(self.top_k is None or self.top_k > 0, f"top_k: found {self.top_k}, expected at least 1")

    def choose(self, logits: Tensor) -> Tensor:
        """(..., v) -> (...) ids. Sampling adds Gumbel noise, so that the highest sum is a sample."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = _wide(logits) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        return (scores - torch.empty_like(scores).exponential_(generator=self.generator).log()).argmax(-1)


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
    rank = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return masked & (rank < count.unsqueeze(-1))


def end_rows(new: Tensor, eos_token_id: int | None) -> tuple[Tensor, int]:
    """New tokens (b, n) with everything after a row's first EOS made EOS, cut to the longest row; tokens in all."""
    if eos_token_id is None:
        return new, new.numel()
    ends = new == eos_token_id
    after = ends.cumsum(-1) - ends.long() > 0
    lengths = (~after).sum(-1)
    return new.masked_fill(after, eos_token_id)[:, : int(lengths.max())], int(lengths.sum())


def _check_ids(ids: Tensor, new: int) -> None:
    shape = tuple(ids.shape)
    _require(len(shape) == 2 and 0 not in shape, f"input_ids: found shape {shape}, expected (rows, tokens), none 0")
    _require(not ids.is_floating_point(), f"input_ids: found {ids.dtype}, expected integers")
    _require(new > 0, f"max_new_tokens: found {new}, expected at least 1")


UNSUPPORTED = {
    "moe_latent_size": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


class NemotronHTwoTowerForCausalLM(PreTrainedModel):
    """The two towers, their heads and the time conditioning, under the names of the released checkpoint.

    `forward` is the context tower's next-token prediction. Text is written by `generate_mask_diffusion`,
    `generate_mock_ar` or `generate_ar`, which are made of `prefill`, `denoise_block` and `extend`.
    """

    config_class = NemotronHConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
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

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:  # fmt: skip
        """Next-token logits of the context tower, for scoring.

        Args:
            input_ids: (b, l) token ids.
            attention_mask: (b, l), 1 for text; padding must stand on the right, where nothing before it sees it.
            labels: (b, l) ids to score, shifted inside; -100 leaves a position out. The loss is in nats per token.
            logits_to_keep: give only that many last positions; 0 for all.

        Returns:
            logits (b, l, v) float32 (float64 of a float64 model), and the loss.
        """
        _check_ids(input_ids, 1)
        if attention_mask is not None:
            right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
            _require(right, "attention_mask: found text behind padding, expected padding on the right only")
        hidden = self.context_tower(input_ids, [None] * len(self.context_tower.layers), keep=True)
        logits = _wide(self.context_lm_head(self.context_tower.norm_f(hidden[:, -logits_to_keep:])))
        loss = None
        if labels is not None:
            _require(logits_to_keep == 0, f"logits_to_keep: found {logits_to_keep}, expected 0 with labels")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> ContextCache:
        """Read a text (b, l), l >= 0, with the context tower."""
        context = self.context_tower.states()
        together = self.context_tower.device == self.denoiser_tower.device
        cache = ContextCache(context, context if together else self.context_tower.states())
        return self.extend(cache, input_ids) if input_ids.shape[1] else cache

    @torch.no_grad()
    def extend(self, cache: ContextCache, ids: Tensor) -> ContextCache:
        """Read further ids (b, l), l >= 1, behind what the cache holds. Changes the cache and returns it."""
        hidden = self.context_tower(ids, cache.context, keep=True)
        cache.hidden, cache.length = self.context_tower.norm_f(hidden[:, -1]), cache.length + ids.shape[1]
        if cache.denoiser is not cache.context:
            for source, target in zip(cache.context, cache.denoiser, strict=True):
                _mirror(source, target, self.denoiser_tower.device)
        return cache

    @torch.no_grad()
    def denoise_block(self, block_ids: Tensor, t: Tensor | None, cache: ContextCache) -> Tensor:
        """The denoiser's prediction of every token of the block behind the cached text.

        Args:
            block_ids: (b, s) ids, masked positions holding the mask token.
            t: (b,) noise levels; None leaves time conditioning and modulation out.

        Returns:
            (b, s, v) logits of the tokens at these same positions, in the model's dtype.
        """
        modulations = None
        if t is not None:
            rounded = t.bfloat16() if self.round_time_to_bf16 else t
            features = time_features(rounded.to(self.denoiser_tower.device)).to(self.lm_head.weight.dtype)
            conditioning = self.t_block(self.t_embedder["mlp"](features))
            modulations = [conditioning + table.flatten() for table in self.scale_shift_tables]
        hidden = self.denoiser_tower(block_ids, cache.denoiser, keep=False, modulations=modulations)
        return self.lm_head(self.denoiser_tower.norm_f(hidden))

    def _fill_block(
        self, cache: ContextCache, done: Tensor, settings: BlockSettings, number: int
    ) -> tuple[Tensor, int, Tensor]:
        """Write one block in the rows that are not done: ids (b, s), passes, and passes of each row (b,)."""
        masked = (~done).unsqueeze(-1).repeat(1, settings.size)
        ids = torch.full(masked.shape, settings.mask_token_id, device=done.device)
        passes, row_passes = 0, torch.zeros(len(done), dtype=torch.int64, device=done.device)
        for step in range(settings.steps):
            if not masked.any():
                break
            logits = _wide(self.denoise_block(ids, masked.float().mean(-1), cache))
            logits[..., settings.mask_token_id] = -math.inf
            chosen = settings.sampling.choose(logits)
            confidence = (logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()
            steps_left = settings.steps - step
            now = commit(masked, confidence, threshold=settings.threshold, steps_left=steps_left)
            passes, row_passes = passes + 1, row_passes + masked.any(-1)
            ids, masked = torch.where(now, chosen, ids), masked & ~now
            if settings.on_step is not None:
                settings.on_step(number, step, ids, now, confidence)
        return ids, passes, row_passes

    @torch.no_grad()
    def generate_mask_diffusion(
        self, input_ids: Tensor, max_new_tokens: int = 128, block_size: int = 16, steps_per_block: int = 16,
        mask_token_id: int = 3, temperature: float = 0.0, top_k: int | None = None,
        confidence_threshold: float = 0.9, eos_token_id: int | None = None, *,
        generator: torch.Generator | None = None, on_step: OnStep | None = None,
    ) -> Tensor:  # fmt: skip
        """Write block after block with the denoiser, each from all masks to none.

        A step predicts every masked token of the block, greedily or sampled, and commits those it is most sure of by
        the untempered probability (see `commit`); what is committed stays. t is each row's masked fraction. The mask
        token is never chosen. Rows stop by themselves.

        Args:
            input_ids: (b, l) prompts of one length, l >= 1.
            max_new_tokens: any number; the last block is filled whole and cut.
            steps_per_block: passes of the denoiser that a block takes at most.
            confidence_threshold: every token that is more probable than this is committed at once.
            eos_token_id: ends a row; None writes on to `max_new_tokens`.
            generator: random numbers for temperature > 0, on the denoiser's device.
            on_step: called after every step, see `OnStep`.

        Returns:
            ids (b, l + new), prompts included, ended rows padded with EOS. `last_generation` says what it took.

        Raises:
            ArgumentError: an argument out of range.
        """
        started = time.perf_counter()
        _check_ids(input_ids, max_new_tokens)
        vocabulary = self.config.vocab_size
        in_range = 0 <= mask_token_id < vocabulary
        _require(in_range, f"mask_token_id: found {mask_token_id}, expected 0 to {vocabulary - 1}")
        sampling = Sampling(temperature, top_k, generator)
        settings = BlockSettings(block_size, steps_per_block, mask_token_id, confidence_threshold, sampling, on_step)
        device = self.denoiser_tower.device
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        blocks: list[Tensor] = []
        passes, row_passes = 0, torch.zeros(len(input_ids), dtype=torch.int64, device=device)
        cache = self.prefill(input_ids)
        for number in range(-(-max_new_tokens // block_size)):
            if blocks:
                self.extend(cache, blocks[-1])
            ids, block_passes, block_row_passes = self._fill_block(cache, done, settings, number)
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

    def _one_by_one(
        self, predict: Callable[[Tensor | None], Tensor], input_ids: Tensor, max_new_tokens: int,
        sampling: Sampling, eos_token_id: int | None, started: float,
    ) -> Tensor:  # fmt: skip
        """`predict` takes the token (b, 1) chosen last (None at first) and gives next-token logits (b, v)."""
        tokens: list[Tensor] = []
        done, row_passes = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device), 0
        for _ in range(max_new_tokens):
            row_passes += int((~done).sum())
            token = sampling.choose(predict(tokens[-1] if tokens else None)).unsqueeze(-1).to(done.device)
            tokens.append(token if eos_token_id is None else token.masked_fill(done, eos_token_id))
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
        eos_token_id: int | None = None, *, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Write token by token with the denoiser as a next-token model, without time conditioning or modulation.

        It is fed the last token alone, beside the context tower's states before that token. A denoiser whose weights
        are the context tower's then writes what `generate_ar` writes. Arguments, returns and errors are those of
        `generate_mask_diffusion`.
        """
        started = time.perf_counter()
        _check_ids(input_ids, max_new_tokens)
        cache, last = self.prefill(input_ids[:, :-1]), input_ids[:, -1:]

        def predict(token: Tensor | None) -> Tensor:
            nonlocal last
            if token is not None:
                self.extend(cache, last)
                last = token
            return self.denoise_block(last, None, cache)[:, -1]

        sampling = Sampling(temperature, top_k, generator)
        return self._one_by_one(predict, input_ids, max_new_tokens, sampling, eos_token_id, started)

    @torch.no_grad()
    def generate_ar(
        self, input_ids: Tensor, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
        eos_token_id: int | None = None, *, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Write token by token with the context tower and its own head, cached.

        Arguments, returns and errors are those of `generate_mask_diffusion`; the generator is on the context tower's
        device, and the passes are the context tower's (the first token comes from the prefill).
        """
        started = time.perf_counter()
        _check_ids(input_ids, max_new_tokens)
        cache = self.prefill(input_ids)

        def predict(token: Tensor | None) -> Tensor:
            if token is not None:
                self.extend(cache, token)
            return self.context_lm_head(cache.hidden)

        sampling = Sampling(temperature, top_k, generator)
        return self._one_by_one(predict, input_ids, max_new_tokens, sampling, eos_token_id, started)
