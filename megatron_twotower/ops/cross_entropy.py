"""Cross-entropy of a vocabulary-parallel head, without ever holding all logits.

Positions go through the head a chunk at a time, and the gradients are made while a chunk's logits are there: the
backward pass only scales them. Memory beyond inputs and gradients is one chunk of logits.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Positions per chunk: 512 x 131072 logits in fp32 are 256 MiB.
POSITION_CHUNK = 512


def _chunk_loss(logits: Tensor, targets: Tensor, group: Any, first: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy (m,) of fp32 logits (m, v/tp) and their softmax, over all ranks' vocabulary slices.

    `first` is the first vocabulary entry of this rank's slice. `logits` is overwritten.
    """
    shared = group is not None and dist.get_world_size(group) > 1
    highest = logits.max(dim=-1).values
    if shared:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    logits -= highest.unsqueeze(-1)
    local = targets - first
    here = (local >= 0) & (local < logits.shape[1])
    target_logits = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1) * here
    probabilities = logits.exp_()
    total = probabilities.sum(-1)
    if shared:
        dist.all_reduce(target_logits, group=group)
        dist.all_reduce(total, group=group)
    return total.log() - target_logits, probabilities.div_(total.unsqueeze(-1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, group: Any, first: int
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        needs = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs else None
        for start in range(0, len(targets), POSITION_CHUNK):
            part = slice(start, start + POSITION_CHUNK)
            logits = F.linear(hidden[part], weight).float()
            loss, gradient = _chunk_loss(logits, targets[part], group, first)
            losses[part] = loss
            if grad_hidden is None or grad_weight is None:
                continue
            local = targets[part] - first
            here = ((local >= 0) & (local < gradient.shape[1])).to(gradient.dtype)
            index = local.clamp(0, gradient.shape[1] - 1).unsqueeze(-1)
            gradient.scatter_add_(1, index, -here.unsqueeze(-1))
            gradient *= weights[part].unsqueeze(-1)
            cast = gradient.to(hidden.dtype)
            grad_hidden[part] = cast @ weight
            grad_weight.addmm_(cast.t().float(), hidden[part].float())
        if grad_hidden is not None and group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        ctx.weight_dtype = weight.dtype
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a second one of the size of the head would be as large as all else together. Autograd refuses a
        # second backward pass of its own accord, since what it saved has changed.
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

    Returns:
        the sum, a float32 scalar with gradients into `hidden` and `weight`; and losses (m,) in nats, without.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights.float(), group, first)


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same with all logits at once, by autograd."""
    losses = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()
