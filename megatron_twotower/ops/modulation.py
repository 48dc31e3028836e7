"""Modulation and gate of adaLN: shift, scale and gate applied to hidden states."""

import torch
from torch import Tensor

from megatron_twotower.ops import dispatch


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift: x (l, b, h), shift and scale (k, b, h), each row for l / k positions.

    On CUDA, with triton, by the kernels of `modulation_triton`, as `add_gated`.
    """
    if dispatch.triton_serves(x, "modulation"):
        from megatron_twotower.ops.triton.modulation import modulate_triton

        return modulate_triton(x, shift, scale)
    stretches = x.unflatten(0, (len(scale), -1))
    return torch.addcmul(shift.unsqueeze(1), stretches, 1 + scale.unsqueeze(1)).flatten(0, 1)


def add_gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """x + gate * out: x and out (l, b, h), gate (k, b, h), each row for l / k positions."""
    if dispatch.triton_serves(x, "modulation"):
        from megatron_twotower.ops.triton.modulation import add_gated_triton

        return add_gated_triton(x, gate, out)
    stretches = (len(gate), -1)
    return torch.addcmul(x.unflatten(0, stretches), gate.unsqueeze(1), out.unflatten(0, stretches)).flatten(0, 1)
