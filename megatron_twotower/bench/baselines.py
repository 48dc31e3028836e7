"""What the benchmarks compare with: the same results by the means that published trainers use, in plain torch.

Shapes are those of `ops`; each is written as well as its idea allows, and tests hold each against
the operation that it rivals, gradients included. Nothing here is used in training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- scan: a state at every block ---------------------------------------------------------------------------------


def _grouped(tensor: Tensor, chunk: int, groups: int) -> Tensor:
    """(b, l, m, ...) -> (b, c, g, m/g, q, ...): heads beside their group, positions last but features."""
    split = tensor.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
    return split.permute(0, 1, 3, 4, 2, *range(5, split.dim()))


def _features(tensor: Tensor, chunk: int) -> Tensor:
    """(b, l, g, d) -> (b, c, g, 1, q, d)."""
    return tensor.unflatten(1, (-1, chunk)).transpose(2, 3).unsqueeze(3)


def _ungrouped(y: Tensor) -> Tensor:
    """(b, c, g, r, q, p) -> (b, l, m, p)."""
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)


def _chunk_outputs(dtx: Tensor, decay: Tensor, B: Tensor, C: Tensor, before: Tensor) -> Tensor:
    """What a chunk's positions read of its own inputs and of the state before it (b, c, g, r, p, d)."""
    later = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).tril()
    steps = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~later, float("-inf"))
    within = ((C @ B.transpose(-1, -2)) * steps.exp()) @ dtx
    return within + (C @ before.transpose(-1, -2)) * decay.exp().unsqueeze(-1)


def _running(steps: Tensor, chunk: int, groups: int) -> Tensor:
    """Running sums of log decays (b, l, m) within each chunk: (b, c, g, r, q)."""
    return _grouped(steps.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2), chunk, groups)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, initial: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan of whole sequences in chunks (Mamba-2, section 6), by autograd; chunk divides l.

    Returns:
        y (b, l, m, p), the state before every chunk (b, c, m, p, d), and the last one (b, m, p, d).
    """
    dtype, groups = x.dtype, B.shape[2]
    x, dt, A, B, C, D = _wide(x, dt, A, B, C, D)
    dtx, decay = _grouped(x * dt.unsqueeze(-1), chunk, groups), _running(dt * A, chunk, groups)
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
    """The noisy blocks as a batch of sequences, each started from its materialised state (b, n, m, p, d)."""
    own = (tensor.unflatten(1, (-1, block)).flatten(0, 1) for tensor in (x, dt, B, C))
    xs, dts, Bs, Cs = own
    y, _, _ = chunked_scan(xs, dts, A, Bs, Cs, D, chunk=block, initial=states.flatten(0, 1))
    return y.reshape(x.shape)


def scan_of_sequences_lean(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, states: Tensor, block: int
) -> Tensor:
    """The same without the states after the blocks, which a scan of sequences makes and nobody reads here."""
    dtype, groups = x.dtype, B.shape[2]
    x, dt, A, B, C, D = _wide(x, dt, A, B, C, D)
    dtx, decay = _grouped(x * dt.unsqueeze(-1), block, groups), _running(dt * A, block, groups)
    before = states.to(x.dtype).unflatten(2, (groups, -1))
    y = _chunk_outputs(dtx, decay, _features(B, block), _features(C, block), before)
    return (_ungrouped(y) + D.unsqueeze(-1) * x).to(dtype)


# --- convolution: shifted copies ----------------------------------------------------------------------------------


def shifted_block_conv(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`seeded_block_conv` as a sum of shifted copies of every block behind its history."""
    (b, l, c), n = x.shape, history.shape[1]
    blocks = torch.cat([history, x.view(b, n, -1, c)], dim=2)
    out = bias + sum(blocks[:, :, i : i + l // n] * weight[:, i] for i in range(weight.shape[1]))
    return F.silu(out).view(b, l, c)


# --- attention: a dense mask --------------------------------------------------------------------------------------


def dense_mask(length: int, block: int, *, device: torch.device) -> Tensor:
    """(l, 2 l) bool: what each noisy query sees of the clean keys, then of the noisy ones."""
    of_block = torch.arange(length, device=device) // block
    own = of_block.unsqueeze(-1)
    return torch.cat([of_block < own, of_block == own], dim=-1)


def dense_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, *, clean_key: Tensor, clean_value: Tensor, mask: Tensor
) -> Tensor:
    """`block_attention` as torch's scaled dot-product attention over 2 l keys."""
    keys, values = torch.cat([clean_key, key], dim=2), torch.cat([clean_value, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


# --- head: all logits ---------------------------------------------------------------------------------------------


def full_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies (m,) from all logits (m, v) at once; weights are 0 where nothing is masked."""
    losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    return (losses * weights).sum()


def gathered_logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """The same of the positions `places` alone, gathered before the head."""
    return F.cross_entropy(F.linear(hidden[places], weight).float(), targets[places], reduction="sum")
