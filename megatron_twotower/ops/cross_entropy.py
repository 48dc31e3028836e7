"""Cross-entropy of a vocabulary-parallel head, without ever holding all logits.

Positions go through the head a chunk at a time, and the gradients are made while a chunk's logits
are there: the backward pass only scales them. Memory beyond inputs and gradients is one chunk of
logits. On CUDA, with triton, each chunk of logits becomes its gradient in place, by the kernel of
`cross_entropy_triton`.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Positions per chunk in torch: 512 x 131072 logits in fp32 are 256 MiB.
POSITION_CHUNK = 512
# And with the kernels, which need no more than the logits as the head's product gives them: 1 GiB
# in bf16. Each chunk reads and writes the sum of the head's gradient once, which is larger than
# that.
KERNEL_CHUNK = 4096


def rows_torch(
    logits: Tensor, targets: Tensor, weights: Tensor, *, group: Any, first: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (m,) float32 of logits (m, v / tp) over all ranks' vocabulary slices, and what follows.

    Args:
        first: the first vocabulary entry of this rank's slice.
        gradient: whether the gradient of the weighted sum into the logits is wanted.

    Returns: the losses; and the gradient, in the dtype of the logits, or anything where it is not
        wanted.
    """
    wide, shared = logits.float(), group is not None and dist.get_world_size(group) > 1
    highest = wide.max(dim=-1).values
    if shared:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    wide -= highest.unsqueeze(-1)
    local = targets - first
    here, index = (local >= 0) & (local < wide.shape[1]), local.clamp(0, wide.shape[1] - 1).unsqueeze(-1)
    at_target = wide.gather(1, index).squeeze(-1) * here
    probabilities = wide.exp_()
    total = probabilities.sum(-1)
    if shared:
        dist.all_reduce(at_target, group=group)
        dist.all_reduce(total, group=group)
    losses = total.log() - at_target
    if gradient:
        probabilities /= total.unsqueeze(-1)
        probabilities.scatter_add_(1, index, -here.to(probabilities.dtype).unsqueeze(-1))
        probabilities *= weights.unsqueeze(-1)
    return losses, probabilities.to(logits.dtype) if gradient else logits


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, in float32. CUDA multiplies bfloat16 as it is and sums in float32; cast before that, it
    would take ten times as long there."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.t().float(), right.float())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, group: Any, first: int
    ) -> tuple[Tensor, Tensor]:
        rows, chunk = rows_torch, POSITION_CHUNK
        if dispatch.triton_serves(hidden, "cross-entropy"):
            from megatron_twotower.ops.triton.cross_entropy import rows_triton as rows

            chunk = KERNEL_CHUNK
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        needs = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            losses[part], gradient = rows(
                F.linear(hidden[part], weight), targets[part], weights[part], group=group, first=first, gradient=needs
            )
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[part] = gradient @ weight
                _add_product(grad_weight, gradient, hidden[part])
        if grad_hidden is not None and group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        ctx.weight_dtype = weight.dtype
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a second one of the size of the head would be as large as all else together.
        # Autograd refuses a second backward pass of its own accord, since what it saved has
        # changed.
        scaled = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad.to(grad_hidden.dtype)), scaled, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, group: Any = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies of `hidden @ weight.T`, and each position's own.

    Args:
        hidden: (m, h), the scored positions only.
        weight: (v / tensor parallel size, h), this rank's slice of the head.
        targets: (m,) int64 token ids.
        weights: (m,) float32 weight of each position in the sum.
        group: tensor-parallel process group, or None.
        first: first vocabulary entry of this rank's slice.

    Returns: the sum, a float32 scalar with gradients into `hidden` and `weight`; and losses (m,) in
        nats, without.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights.float(), group, first)


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same with all logits at once, by autograd."""
    losses = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()
