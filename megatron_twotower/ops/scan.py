"""State-space scan of Mamba-2, for one stream and for a noisy stream seeded by a clean one.

Dimensions: b batch, l length, m heads, p head size, g groups, d state size, q chunk, s block, n = l / s blocks.
Shapes: x (b, l, m, p); dt (b, l, m), positive; A (m,), negative; B, C (b, l, g, d); D (m,); states (b, l/q, m, p, d).
Head i belongs to group i // (m / g). Everything is computed in float32, or in float64 when x is float64.

The recurrence of one head (Mamba-2, Dao and Gu 2024, section 6; model layout of NemotronH):

    h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T,    y_i = h_i C_i + D x_i

Block b of the noisy stream starts from the clean stream's h after position b s - 1, block 0 from zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_length(block: int, *, preferred: int) -> int:
    """Tokens per chunk: the largest multiple of the block size up to `preferred`, and at least one block."""
    return max(block, preferred - preferred % block)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(tensor: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(b, l, ...) -> (b, l/q, q, ...), padded with zeros: dt = 0 neither decays nor adds."""
    b, l = tensor.shape[:2]
    short = -l % chunk
    if short:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, short))
    return tensor.to(dtype).reshape(b, (l + short) // chunk, chunk, *tensor.shape[2:])


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(b, c, q, m, ...) -> (b, c, g, m/g, q, ...): heads beside their group, positions last but features."""
    b, c, q, m = tensor.shape[:4]
    split = tensor.reshape(b, c, q, groups, m // groups, *tensor.shape[4:])
    return split.permute(0, 1, 3, 4, 2, *range(5, split.dim()))


def _within(dtx: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What the positions of one chunk give to its later positions and themselves.

    dtx (b, c, g, r, q, p); decay (b, c, g, r, q), running sums of log decays; B, C (b, c, g, q, d).
    """
    q = decay.shape[-1]
    scores = C @ B.transpose(-1, -2)
    later = torch.ones(q, q, dtype=torch.bool, device=decay.device).tril()
    steps = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~later, float("-inf"))
    return (scores.unsqueeze(3) * steps.exp()) @ dtx


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk: int, initial: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan of one stream, chunk by chunk.

    Returns:
        y (b, l, m, p) in x's dtype; the state at the start of every chunk (b, ceil(l/q), m, p, d); and the final
        state (b, m, p, d). States are in the working dtype.
    """
    dtype, groups, (b, l, m, p) = _working_dtype(x), B.shape[2], x.shape
    xs, dts = _chunks(x, chunk, dtype), _chunks(dt, chunk, dtype)
    Bs, Cs = (_chunks(t, chunk, dtype).transpose(2, 3) for t in (B, C))
    dtx = _by_group(xs * dts.unsqueeze(-1), groups)
    decay = _by_group((dts * A.to(dtype)).cumsum(2), groups)
    total = decay[..., -1:]

    added = (dtx * (total - decay).exp().unsqueeze(-1)).transpose(-1, -2) @ Bs.unsqueeze(3)
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(dtype).reshape(added[:, 0].shape)
    states, kept = [], total.exp().unsqueeze(-1)
    for c in range(added.shape[1]):
        states.append(state)
        state = kept[:, c] * state + added[:, c]
    before = torch.stack(states, dim=1)

    y = _within(dtx, decay, Bs, Cs) + (Cs.unsqueeze(3) @ before.transpose(-1, -2)) * decay.exp().unsqueeze(-1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, -1, m, p)[:, :l] + D.to(dtype).unsqueeze(-1) * x
    return y.to(x.dtype), before.reshape(b, -1, m, p, B.shape[-1]), state.reshape(b, m, p, -1)


def two_stream_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
    clean_x: Tensor, clean_dt: Tensor, clean_A: Tensor, clean_B: Tensor, states: Tensor, block: int, chunk: int,
) -> Tensor:  # fmt: skip
    """The scan of every block of the noisy stream, each started from the clean stream, in one pass.

    Three sums per position: the clean state at the chunk's start, the clean positions between it and the block, and
    the noisy positions of the block. Only one state per chunk is ever held, whatever the block size. Clean tensors
    must not require gradients.

    Args:
        states: the clean stream's state at the start of each chunk, from `chunk_scan` with the same `chunk`.
        block: block size s; `chunk` must be a multiple of it, and l a multiple of s.

    Returns:
        y (b, l, m, p) in x's dtype.
    """
    dtype, groups, (b, l, m, p), d = _working_dtype(x), B.shape[2], x.shape, B.shape[-1]
    assert chunk % block == 0 and l % block == 0, (chunk, block, l)
    nb = chunk // block

    # The noisy positions of each block: an ordinary scan with chunks of one block and no state between them.
    xs, dts = _chunks(x, block, dtype), _chunks(dt, block, dtype)
    Bs, Cs = (_chunks(t, block, dtype).transpose(2, 3) for t in (B, C))
    decay = _by_group((dts * A.to(dtype)).cumsum(2), groups)
    y = _within(_by_group(xs * dts.unsqueeze(-1), groups), decay, Bs, Cs)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, l, m, p)

    # What the clean stream has left in the state where the block begins, read through C.
    clean_dts = _chunks(clean_dt, chunk, dtype)
    clean_dtx = _by_group(_chunks(clean_x, chunk, dtype) * clean_dts.unsqueeze(-1), groups)
    clean_Bs = _chunks(clean_B, chunk, dtype).transpose(2, 3)
    clean_decay = _by_group((clean_dts * clean_A.to(dtype)).cumsum(2), groups)
    starts = F.pad(clean_decay, (1, 0))[..., 0:chunk:block]
    before = torch.arange(chunk, device=x.device) < torch.arange(0, chunk, block, device=x.device).unsqueeze(-1)
    reach = (starts.unsqueeze(-1) - clean_decay.unsqueeze(-2)).masked_fill(~before, float("-inf")).exp()

    reads = _chunks(C, chunk, dtype).transpose(2, 3)
    scores = (reads @ clean_Bs.transpose(-1, -2)).unflatten(3, (nb, block)).unsqueeze(3)
    left = (scores * reach.unsqueeze(-2)).flatten(4, 5) @ clean_dtx
    carried = reads.unsqueeze(3) @ states.to(dtype).unflatten(2, (groups, m // groups)).transpose(-1, -2)
    left = left + carried * starts.exp().repeat_interleave(block, dim=-1).unsqueeze(-1)
    left = left.permute(0, 1, 4, 2, 3, 5).reshape(b, -1, m, p)[:, :l]

    since = decay.permute(0, 1, 4, 2, 3).reshape(b, l, m, 1).exp()
    assert states.shape[-1] == d
    return (y + left * since + D.to(dtype).unsqueeze(-1) * x).to(x.dtype)


def scan_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position at a time: y (b, l, m, p) and the final state (b, m, p, d)."""
    b, l, m, p = x.shape
    B, C = (t.repeat_interleave(m // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, m, p, B.shape[-1]) if initial is None else initial
    ys = []
    for i in range(l):
        kept = (dt[:, i] * A).exp()[..., None, None] * state
        state = kept + (dt[:, i].unsqueeze(-1) * x[:, i]).unsqueeze(-1) * B[:, i].unsqueeze(-2)
        ys.append((state * C[:, i].unsqueeze(-2)).sum(-1) + D.unsqueeze(-1) * x[:, i])
    return torch.stack(ys, dim=1), state


def two_stream_scan_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
    clean_x: Tensor, clean_dt: Tensor, clean_A: Tensor, clean_B: Tensor, block: int,
) -> Tensor:  # fmt: skip
    """Every block by itself: the clean recurrence up to the block, then the noisy one through it."""
    ys = []
    for start in range(0, x.shape[1], block):
        own, past = slice(start, start + block), slice(0, start)
        state = None
        if start:
            clean = (clean_x[:, past], clean_dt[:, past], clean_A, clean_B[:, past])
            _, state = scan_ref(*clean, clean_B[:, past], torch.zeros_like(D))
        ys.append(scan_ref(x[:, own], dt[:, own], A, B[:, own], C[:, own], D, initial=state)[0])
    return torch.cat(ys, dim=1)
