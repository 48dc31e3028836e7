"""Root-mean-square norms that keep their inputs alone for the backward pass.

Shapes: x, y, z (..., h); weight (h,), or (groups, h / groups) for a norm over groups. Computed in
float32, or in float64 when the input is float64; results are in the input's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(x: Tensor, epsilon: float) -> Tensor:
    """1 / rms over the last dimension (..., 1)."""
    return (torch.linalg.vecdot(x, x) / x.shape[-1] + epsilon).rsqrt_().unsqueeze(-1)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradients of x * scale * weight into x and the weight; x (..., h) wide."""
    scale = _scale(x, epsilon)
    normed = x * scale
    grad_weight = (grad * normed).flatten(0, -1 - weight.dim()).sum(0)
    upstream = grad * weight
    along = torch.linalg.vecdot(upstream, normed).unsqueeze(-1) / x.shape[-1]
    return upstream.addcmul_(normed, along, value=-1).mul_(scale), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        wide = _wide(x)
        return (wide * _scale(wide, epsilon)).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(_wide(grad), _wide(x), _wide(weight), ctx.epsilon)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon = epsilon
        gated = _wide(y * F.silu(z)).unflatten(-1, weight.shape)
        return (gated.mul_(_scale(gated, epsilon)).to(y.dtype) * weight).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        gate = F.silu(z)
        gated = _wide(y * gate).unflatten(-1, weight.shape)
        upstream = _wide(grad).unflatten(-1, weight.shape)
        into, grad_weight = _norm_backward(upstream, gated, _wide(weight), ctx.epsilon)
        into = into.flatten(-2).to(y.dtype)
        return into * gate, torch.ops.aten.silu_backward(into * y, z), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; weight (h,)."""
    return _RMSNorm.apply(x, weight, epsilon)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of y * silu(z) over groups of the last dimension; weight (groups, h / groups). Gate first, then norm.

    On CUDA, with triton, by the kernels of `norm_triton`.
    """
    if dispatch.triton_serves(y, "gated norm"):
        from megatron_twotower.ops.triton.norm import gated_rms_norm_triton

        return gated_rms_norm_triton(y, z, weight, epsilon)
    return _GatedRMSNorm.apply(y, z, weight, epsilon)


def rms_norm_ref(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def gated_rms_norm_ref(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    gated = (y * F.silu(z)).unflatten(-1, weight.shape)
    return rms_norm_ref(gated, weight, epsilon).flatten(-2)
