"""The two-tower model, one block at a time, from Hugging Face tensors and explicit caches.

Written apart from the package, in float64 and by the recurrences, to be compared with the one-pass
training forward. Weights are looked up by their released names through `w(name)`.
"""

import math

import torch
import torch.nn.functional as F


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def mamba(w, p, m, x, state):
    """Mamba for x (t, h) and a state (conv inputs (3, c), ssm (heads, e, d)).

    Returns output (t, h) and the state after it.
    """
    inner, bc, heads = m.mamba_num_heads * m.mamba_head_dim, m.n_groups * m.ssm_state_size, m.mamba_num_heads
    conv_state, ssm = state
    z, xbc, dt = (x @ w(f"{p}in_proj.weight").T).split([inner, inner + 2 * bc, heads], dim=-1)
    A, D = -torch.exp(w(f"{p}A_log")), w(f"{p}D")
    filters, bias, norm = w(f"{p}conv1d.weight")[:, 0], w(f"{p}conv1d.bias"), w(f"{p}norm.weight")
    outs = []
    for i in range(x.shape[0]):
        window = torch.cat([conv_state, xbc[i : i + 1]])
        conv_state = window[1:]
        u = F.silu((window * filters.T).sum(0) + bias)
        xs = u[:inner].view(heads, -1)
        B, C = (u[inner + j * bc : inner + (j + 1) * bc].view(m.n_groups, -1) for j in (0, 1))
        B, C = (t.repeat_interleave(heads // m.n_groups, dim=0) for t in (B, C))
        step = F.softplus(dt[i] + w(f"{p}dt_bias"))
        ssm = torch.exp(step * A)[:, None, None] * ssm + (step[:, None] * xs)[:, :, None] * B[:, None, :]
        y = ((ssm * C[:, None, :]).sum(-1) + D[:, None] * xs).flatten() * F.silu(z[i])
        y = rms(y.view(m.n_groups, -1), norm.view(m.n_groups, -1), m.layer_norm_epsilon).flatten()
        outs.append(y @ w(f"{p}out_proj.weight").T)
    return torch.stack(outs), (conv_state, ssm)


def attention(w, p, m, x, past, *, causal):
    """Attention of x (t, h) to past keys and values and to its own.

    Returns the output, and keys and values of x.
    """
    q, k, v = ((x @ w(f"{p}{n}_proj.weight").T).view(x.shape[0], -1, m.head_dim) for n in "qkv")
    keys, values = torch.cat([past[0], k]), torch.cat([past[1], v])
    group = m.num_attention_heads // m.num_key_value_heads
    outs = []
    for head in range(m.num_attention_heads):
        scores = q[:, head] @ keys[:, head // group].T / math.sqrt(m.head_dim)
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(past[0].shape[0] + 1)
            scores = scores.masked_fill(hidden, -math.inf)
        outs.append(scores.softmax(-1) @ values[:, head // group])
    return torch.cat(outs, dim=-1) @ w(f"{p}o_proj.weight").T, (keys, values)


def mlp(x, up, down):
    return F.relu(x @ up.T).square() @ down.T


def experts(w, p, m, x):
    scores = torch.sigmoid(x @ w(f"{p}gate.weight").T)
    chosen = (scores + w(f"{p}gate.e_score_correction_bias")).topk(m.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * m.routed_scaling_factor
    out = mlp(x, w(f"{p}shared_experts.up_proj.weight"), w(f"{p}shared_experts.down_proj.weight"))
    rows = []
    for i in range(x.shape[0]):
        row = out[i]
        for weight, e in zip(weights[i], chosen[i].tolist(), strict=True):
            q = f"{p}experts.{e}."
            row = row + weight * mlp(x[i], w(f"{q}up_proj.weight"), w(f"{q}down_proj.weight"))
        rows.append(row)
    return torch.stack(rows)


def mixer(w, prefix, m, i, kind, x, cache, *, causal=True):
    p = f"{prefix}layers.{i}.mixer."
    if kind == "M":
        return mamba(w, p, m, x, cache)
    if kind == "*":
        return attention(w, p, m, x, cache, causal=causal)
    if kind == "E":
        return experts(w, p, m, x), None
    return mlp(x, w(f"{p}up_proj.weight"), w(f"{p}down_proj.weight")), None


def empty_cache(m, kind):
    if kind == "M":
        channels = m.mamba_num_heads * m.mamba_head_dim + 2 * m.n_groups * m.ssm_state_size
        ssm = torch.zeros(m.mamba_num_heads, m.mamba_head_dim, m.ssm_state_size, dtype=torch.float64)
        return torch.zeros(m.conv_kernel - 1, channels, dtype=torch.float64), ssm
    if kind == "*":
        return (torch.zeros(0, m.num_key_value_heads, m.head_dim, dtype=torch.float64),) * 2
    return None


def context_caches(w, m, tokens):
    """Run the context tower on tokens (t,).

    Returns the cache of every layer after them, and final hidden states.
    """
    x = w("context_tower.embeddings.weight")[tokens]
    caches = []
    for i, kind in enumerate(m.hybrid_override_pattern):
        cache = empty_cache(m, kind)
        if len(tokens):
            normed = rms(x, w(f"context_tower.layers.{i}.norm.weight"), m.layer_norm_epsilon)
            out, cache = mixer(w, "context_tower.", m, i, kind, normed, cache)
            x = x + out
        caches.append(cache)
    return caches, rms(x, w("context_tower.norm_f.weight"), m.layer_norm_epsilon)


def conditioning(w, frequencies, t):
    half = frequencies // 2
    angles = 1000.0 * t.float() * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    features = torch.cat([angles.cos(), angles.sin()]).double()
    x = features @ w("t_embedder.mlp.0.weight").T + w("t_embedder.mlp.0.bias")
    x = F.silu(x) @ w("t_embedder.mlp.2.weight").T + w("t_embedder.mlp.2.bias")
    return F.silu(x) @ w("t_block.1.weight").T + w("t_block.1.bias")


def denoise_block(w, m, frequencies, block, t, caches):
    """Logits (s, v) of one noisy block (s,) at noise level t, given the caches before it."""
    c = conditioning(w, frequencies, t)
    x = w("denoiser_tower.embeddings.weight")[block]
    for i, kind in enumerate(m.hybrid_override_pattern):
        shift, scale, gate = (c + w(f"scale_shift_tables.{i}").flatten()).chunk(3)
        norm = w(f"denoiser_tower.layers.{i}.norm.weight")
        if kind in "M*":
            inside = rms(x * (1 + scale) + shift, norm, m.layer_norm_epsilon)
        else:
            inside = rms(x, norm, m.layer_norm_epsilon) * (1 + scale) + shift
        out, _ = mixer(w, "denoiser_tower.", m, i, kind, inside, caches[i], causal=False)
        x = x + gate * out
    return rms(x, w("denoiser_tower.norm_f.weight"), m.layer_norm_epsilon) @ w("lm_head.weight").T


def block_by_block(w, m, frequencies, tokens, noisy, times, block):
    """Logits (l, v) of all blocks of one sequence, each computed separately."""
    logits = []
    for b, start in enumerate(range(0, len(tokens), block)):
        caches, _ = context_caches(w, m, tokens[:start])
        t = times[b if len(times) > 1 else 0]
        logits.append(denoise_block(w, m, frequencies, noisy[start : start + block], t, caches))
    return torch.cat(logits)
