"""Root-mean-square norms that keep only their inputs for the backward pass.

Shapes: x, y, z (..., h); weight (h,), or (groups, h / groups) for a norm over groups. Everything is
computed in float32, or in float64 if the input is float64. Results have the dtype of the input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch


def _widen(x: Tensor) -> Tensor:
    """Cast x to the working dtype."""
    return x if x.dtype == torch.float64 else x.float()


def _scale(x: Tensor, epsilon: float) -> Tensor:
    """1 / rms of the last dimension: (..., 1)."""
    return (torch.linalg.vecdot(x, x) / x.shape[-1] + epsilon).rsqrt_().unsqueeze(-1)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradients of x * scale * weight into x and the weight; x (..., h) in the working dtype."""
    scale = _scale(x, epsilon)
    normed = x * scale
    grad_weight = (grad * normed).flatten(0, -1 - weight.dim()).sum(0)
    upstream = grad * weight
    mean_product = torch.linalg.vecdot(upstream, normed).unsqueeze(-1) / x.shape[-1]
    return upstream.addcmul_(normed, mean_product, value=-1).mul_(scale), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        wide = _widen(x)
        return (wide * _scale(wide, epsilon)).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(_widen(grad), _widen(x), _widen(weight), ctx.epsilon)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon = epsilon
        gated = _widen(y * F.silu(z)).unflatten(-1, weight.shape)
        return (gated.mul_(_scale(gated, epsilon)).to(y.dtype) * weight).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        gate = F.silu(z)
        gated = _widen(y * gate).unflatten(-1, weight.shape)
        upstream = _widen(grad).unflatten(-1, weight.shape)
        grad_gated, grad_weight = _norm_backward(upstream, gated, _widen(weight), ctx.epsilon)
        grad_gated = grad_gated.flatten(-2).to(y.dtype)
        return grad_gated * gate, torch.ops.aten.silu_backward(grad_gated * y, z), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute x / rms(x) * weight over the last dimension, for weight (h,)."""
    return _RMSNorm.apply(x, weight, epsilon)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of y * silu(z) over groups of the last dimension, for weight (groups, h / groups).

    The gate is applied before the norm. On CUDA with triton, the kernels of `ops.triton.norm`
    compute it.
    """
    if dispatch.uses_triton(y, "gated norm"):
        from megatron_twotower.ops.triton.norm import gated_rms_norm_triton

        return gated_rms_norm_triton(y, z, weight, epsilon)
    return _GatedRMSNorm.apply(y, z, weight, epsilon)


def rms_norm_ref(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Reference implementation of `rms_norm`."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def gated_rms_norm_ref(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Reference implementation of `gated_rms_norm`."""
    gated = (y * F.silu(z)).unflatten(-1, weight.shape)
    return rms_norm_ref(gated, weight, epsilon).flatten(-2)
