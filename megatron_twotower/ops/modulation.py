"""Modulation and gate of adaLN: apply shift, scale and gate to hidden states."""

import torch
from torch import Tensor

from megatron_twotower.ops import dispatch


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute x * (1 + scale) + shift, for x (l, b, h), shift and scale (k, b, h).

    Each row of shift and scale is applied to l / k positions. On CUDA with triton, the kernels of
    `ops.triton.modulation` compute it.
    """
    if dispatch.uses_triton(x, "modulation"):
        from megatron_twotower.ops.triton.modulation import modulate_triton

        return modulate_triton(x, shift, scale)
    segments = x.unflatten(0, (len(scale), -1))
    return torch.addcmul(shift.unsqueeze(1), segments, 1 + scale.unsqueeze(1)).flatten(0, 1)


def add_gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """Compute x + gate * out, for x and out (l, b, h), gate (k, b, h).

    Each row of the gate is applied to l / k positions. On CUDA with triton, the kernels of
    `ops.triton.modulation` compute it.
    """
    if dispatch.uses_triton(x, "modulation"):
        from megatron_twotower.ops.triton.modulation import add_gated_triton

        return add_gated_triton(x, gate, out)
    segments = (len(gate), -1)
    return torch.addcmul(x.unflatten(0, segments), gate.unsqueeze(1), out.unflatten(0, segments)).flatten(0, 1)
