"""Baselines of the operations in `ops`: the same results, computed as published trainers do.

They are plain torch, optimised as far as each algorithm allows. Shapes are those of `ops`. Tests
compare each baseline with its operation, gradients included. Training uses nothing of this module.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- scan: a state at every block ---


def _grouped(tensor: Tensor, chunk: int, groups: int) -> Tensor:
    """(b, l, m, ...) -> (b, c, g, m/g, q, ...): heads by group, features last."""
    split = tensor.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
    return split.permute(0, 1, 3, 4, 2, *range(5, split.dim()))


def _features(tensor: Tensor, chunk: int) -> Tensor:
    """(b, l, g, d) -> (b, c, g, 1, q, d)."""
    return tensor.unflatten(1, (-1, chunk)).transpose(2, 3).unsqueeze(3)


def _ungrouped(y: Tensor) -> Tensor:
    """(b, c, g, r, q, p) -> (b, l, m, p)."""
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)


def _chunk_outputs(dtx: Tensor, decay: Tensor, B: Tensor, C: Tensor, before: Tensor) -> Tensor:
    """Outputs of each chunk from its own inputs and the state before it (b, c, g, r, p, d)."""
    causal = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).tril()
    segments = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf"))
    intra_chunk = ((C @ B.transpose(-1, -2)) * segments.exp()) @ dtx
    return intra_chunk + (C @ before.transpose(-1, -2)) * decay.exp().unsqueeze(-1)


def _cumulative_decay(steps: Tensor, chunk: int, groups: int) -> Tensor:
    """Cumulative sums of log decays (b, l, m) within each chunk: (b, c, g, r, q)."""
    return _grouped(steps.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2), chunk, groups)


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, initial: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunked scan of complete sequences (Mamba-2, section 6), with gradients by autograd.

    Args:
        chunk: Positions per chunk; it divides l.
        initial: The state before the first chunk (b, m, p, d); zero if `None`.

    Returns:
        y (b, l, m, p), the state before every chunk (b, c, m, p, d), the final state (b, m, p, d).
    """
    dtype, groups = x.dtype, B.shape[2]
    x, dt, A, B, C, D = _at_least_float32(x, dt, A, B, C, D)
    dtx, decay = _grouped(x * dt.unsqueeze(-1), chunk, groups), _cumulative_decay(dt * A, chunk, groups)
    Bs, Cs, total = _features(B, chunk), _features(C, chunk), decay[..., -1:]
    added = (dtx * (total - decay).exp().unsqueeze(-1)).transpose(-1, -2) @ Bs
    kept, before = total.exp().unsqueeze(-1), []
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(x.dtype).view_as(added[:, 0])
    for c in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, c], kept[:, c], state)
    states = torch.stack(before, dim=1)
    y = _ungrouped(_chunk_outputs(dtx, decay, Bs, Cs, states)) + D.unsqueeze(-1) * x
    return y.to(dtype), states.flatten(2, 3), state.flatten(1, 2)


def scan_of_sequences(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, states: Tensor, block: int
) -> Tensor:
    """The noisy blocks as a batch of sequences, each with its materialised initial state.

    Args:
        states: The state before every block (b, n, m, p, d).
    """
    xs, dts, Bs, Cs = (tensor.unflatten(1, (-1, block)).flatten(0, 1) for tensor in (x, dt, B, C))
    y, _, _ = chunked_scan(xs, dts, A, Bs, Cs, D, chunk=block, initial=states.flatten(0, 1))
    return y.reshape(x.shape)


def scan_of_sequences_lean(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, states: Tensor, block: int
) -> Tensor:
    """`scan_of_sequences` without the final states of the blocks, which are not needed."""
    dtype, groups = x.dtype, B.shape[2]
    x, dt, A, B, C, D = _at_least_float32(x, dt, A, B, C, D)
    dtx, decay = _grouped(x * dt.unsqueeze(-1), block, groups), _cumulative_decay(dt * A, block, groups)
    before = states.to(x.dtype).unflatten(2, (groups, -1))
    y = _chunk_outputs(dtx, decay, _features(B, block), _features(C, block), before)
    return (_ungrouped(y) + D.unsqueeze(-1) * x).to(dtype)


# --- convolution: shifted copies ---


def shifted_block_conv(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`seeded_block_conv` as a sum of shifted copies of every block, each after its history."""
    (b, l, c), n = x.shape, history.shape[1]
    blocks = torch.cat([history, x.view(b, n, -1, c)], dim=2)
    out = bias + sum(blocks[:, :, i : i + l // n] * weight[:, i] for i in range(weight.shape[1]))
    return F.silu(out).view(b, l, c)


# --- attention: a dense mask ---


def dense_mask(length: int, block: int, *, device: torch.device) -> Tensor:
    """(l, 2 l) bool: which clean keys, then which noisy keys, each noisy query sees."""
    block_numbers = torch.arange(length, device=device) // block
    own = block_numbers.unsqueeze(-1)
    return torch.cat([block_numbers < own, block_numbers == own], dim=-1)


def dense_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, *, clean_key: Tensor, clean_value: Tensor, mask: Tensor
) -> Tensor:
    """`block_attention` as torch's scaled dot-product attention over 2 l keys."""
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


# --- head: all logits ---


def full_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies over all m positions, from all logits (m, v) at once.

    Args:
        weights: (m,), 0 at positions that are not masked.
    """
    losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    return (losses * weights).sum()


def gathered_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """Sum of cross-entropies at the positions `places` only, which are gathered before the head."""
    return F.cross_entropy(F.linear(hidden[places], weight).float(), targets[places], reduction="sum")
