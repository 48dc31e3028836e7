"""Cross-entropy of a vocabulary-parallel head, with the logits of one chunk of positions at a time.

The forward pass computes the gradients too, while it has the logits of a chunk. The backward pass
only scales them. The memory beyond inputs and gradients is one chunk of logits. On CUDA with
triton, the kernel of `ops.triton.cross_entropy` overwrites each chunk of logits with its gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.ops import dispatch

# Positions of a chunk in torch: 512 x 131072 logits in fp32 are 256 MiB.
POSITION_CHUNK = 512
# Positions of a chunk with the Triton kernel, which needs only the logits: 1 GiB in bf16. Chunks
# are few, because each of them reads and writes the complete gradient of the head.
KERNEL_CHUNK = 4096


class Teacher(NamedTuple):
    """A frozen head whose distribution replaces a share of each one-hot target.

    Attributes:
        hidden: (m, h) final hidden states that the distribution of each position follows from.
        weight: (v / tensor parallel size, h), this rank's slice of the head.
        shares: (m,) float32 share of the distribution in the target of each position, in [0, 1].
    """

    hidden: Tensor
    weight: Tensor
    shares: Tensor


def _is_divided(group: Any) -> bool:
    """Whether the vocabulary is divided over several ranks."""
    return group is not None and dist.get_world_size(group) > 1


def _highest(logits: Tensor, group: Any) -> Tensor:
    """The highest logit of each position over the complete vocabulary (m, 1)."""
    highest = logits.max(dim=-1, keepdim=True).values
    if _is_divided(group):
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return highest


def _places(targets: Tensor, *, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Where the targets are in this rank's slice of the vocabulary.

    Returns:
        Whether each is in the slice (m,), and an index into the slice (m, 1), any if it is not.
    """
    local = targets - first
    return (local >= 0) & (local < size), local.clamp(0, size - 1).unsqueeze(-1)


def chunk_cross_entropy_torch(
    logits: Tensor, targets: Tensor, weights: Tensor, *, group: Any, first: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one chunk of logits, and its gradient.

    The vocabulary is divided among the ranks of `group`.

    Args:
        logits: (m, v / tensor parallel size).
        targets: (m,) int64 token ids.
        weights: (m,) float32 weight of each position in the sum of losses.
        group: Tensor-parallel process group, or `None`.
        first: First vocabulary entry of this rank's slice.
        gradient: Whether to compute the gradient of the weighted sum.

    Returns:
        The losses (m,) float32, and the gradient of the logits in their dtype, undefined if
        `gradient` is false.
    """
    wide = logits.float()
    wide -= _highest(wide, group)
    in_slice, index = _places(targets, first=first, size=wide.shape[1])
    at_target = wide.gather(1, index).squeeze(-1) * in_slice
    probabilities = wide.exp_()
    total = probabilities.sum(-1)
    if _is_divided(group):
        dist.all_reduce(at_target, group=group)
        dist.all_reduce(total, group=group)
    losses = total.log() - at_target
    if gradient:
        probabilities /= total.unsqueeze(-1)
        probabilities.scatter_add_(1, index, -in_slice.to(probabilities.dtype).unsqueeze(-1))
        probabilities *= weights.unsqueeze(-1)
    return losses, probabilities.to(logits.dtype) if gradient else logits


def chunk_soft_targets(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, shares: Tensor, *, group: Any, first: int
) -> tuple[Tensor, Tensor]:
    """What a teacher's distribution changes that replaces a share a of a one-hot target.

    With target (1 - a) e_y + a q and logits z, the cross-entropy grows by a (z_y - sum_v q_v z_v),
    and its gradient by a (e_y - q).

    Args:
        logits: (m, v / tensor parallel size).
        teacher_logits: (m, v / tensor parallel size) of the same slice of the vocabulary.
        targets: (m,) int64 token ids.
        shares: (m,) float32.
        group: Tensor-parallel process group, or `None`.
        first: First vocabulary entry of this rank's slice.

    Returns:
        The growth of the losses (m,) and of the gradient of the logits, both float32.
    """
    teacher, wide = teacher_logits.float(), logits.float()
    teacher = (teacher - _highest(teacher, group)).exp_()
    in_slice, index = _places(targets, first=first, size=wide.shape[1])
    at_target = wide.gather(1, index).squeeze(-1) * in_slice
    sums = torch.stack([teacher.sum(-1), (teacher * wide).sum(-1), at_target])
    if _is_divided(group):
        dist.all_reduce(sums, group=group)
    total, weighted, at_target = sums
    growth = shares * (at_target - weighted / total)
    gradient = teacher.mul_((-shares / total).unsqueeze(-1))
    gradient.scatter_add_(1, index, (shares * in_slice).unsqueeze(-1))
    return growth, gradient


def chunk_certainty(logits: Tensor, targets: Tensor, *, group: Any, first: int) -> tuple[Tensor, Tensor]:
    """The entropy H of each distribution whose most probable token is the target; 0 of the others.

    With logits z and probabilities p, dH / dz_v = -p_v (z_v - sum_u p_u z_u).

    Args:
        logits: (m, v / tensor parallel size).
        targets: (m,) int64 token ids.
        group: Tensor-parallel process group, or `None`.
        first: First vocabulary entry of this rank's slice.

    Returns:
        The entropies (m,) in nats and the gradient of the logits, both float32.
    """
    wide = logits.float()
    wide = wide - _highest(wide, group)
    in_slice, index = _places(targets, first=first, size=wide.shape[1])
    at_target = wide.gather(1, index).squeeze(-1) * in_slice
    probabilities = wide.exp()
    sums = torch.stack([probabilities.sum(-1), (probabilities * wide).sum(-1), at_target])
    if _is_divided(group):
        dist.all_reduce(sums, group=group)
    total, weighted, at_target = sums
    right, mean = at_target == 0, weighted / total
    scale = torch.where(right, -1 / total, 0)
    gradient = probabilities.mul_(wide.sub_(mean.unsqueeze(-1))).mul_(scale.unsqueeze(-1))
    return torch.where(right, total.log() - mean, 0), gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total`, in float32.

    CUDA multiplies bfloat16 directly and sums in float32. With casts to float32 first, the product
    would take fifteen times as long on Hopper, by the data sheet.
    """
    if left.is_cuda and left.dtype == torch.bfloat16:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.t().float(), right.float())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        group: Any,
        first: int,
        teacher: Teacher | None,
        certainty: float,
    ) -> tuple[Tensor, Tensor]:
        compute, chunk = chunk_cross_entropy_torch, POSITION_CHUNK
        if dispatch.uses_triton(hidden, "cross-entropy"):
            from megatron_twotower.ops.triton.cross_entropy import chunk_cross_entropy_triton as compute

            # What is added to the loss is in fp32, beside the logits.
            chunk = KERNEL_CHUNK if teacher is None and not certainty else POSITION_CHUNK
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        growth = torch.zeros_like(losses)
        needed = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits, added = F.linear(hidden[part], weight), []
            if teacher is not None:
                teacher_logits = F.linear(teacher.hidden[part], teacher.weight)
                grown, soft = chunk_soft_targets(
                    logits, teacher_logits, targets[part], teacher.shares[part], group=group, first=first
                )
                growth[part] += grown
                added.append(soft)
            if certainty:
                entropies, soft = chunk_certainty(logits, targets[part], group=group, first=first)
                growth[part] += certainty * entropies
                added.append(soft.mul_(certainty))
            # From here on the logits may be overwritten.
            losses[part], gradient = compute(
                logits, targets[part], weights[part], group=group, first=first, gradient=needed
            )
            if added and needed:
                soft = sum(added[1:], start=added[0])
                gradient = (gradient + soft.mul_(weights[part].unsqueeze(-1))).to(gradient.dtype)
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[part] = gradient @ weight
                _add_product(grad_weight, gradient, hidden[part])
        if grad_hidden is not None and _is_divided(group):
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        ctx.weight_dtype = weight.dtype
        return ((losses + growth) * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a second tensor of the size of the head would need as much memory as everything
        # else together. Autograd itself refuses a second backward pass, because a saved tensor has
        # changed.
        scaled = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad.to(grad_hidden.dtype)), scaled, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    group: Any = None,
    first: int = 0,
    teacher: Teacher | None = None,
    certainty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of `hidden @ weight.T`, and the losses of the positions.

    With a teacher the sum is that of the cross-entropies with its soft targets. With `certainty` it
    grows by `certainty` times the entropy of each position whose most probable token is the target.
    The losses of the positions are those of the tokens in any case.

    Args: hidden: (m, h), of the scored positions only. weight: (v / tensor parallel size, h), this
        rank's slice of the head. targets: (m,) int64 token ids. weights: (m,) float32 weight of
        each position in the sum. group: Tensor-parallel process group, or `None`. first: First
        vocabulary entry of this rank's slice. teacher: Whose distribution replaces a share of the
        targets; `None`: the targets are one-hot. certainty: Weight of the entropy.

    Returns:
        The sum, a float32 scalar with gradients into `hidden` and `weight`; the losses (m,) in
        nats, without gradients.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights.float(), group, first, teacher, certainty)


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    teacher: Teacher | None = None,
    certainty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Reference implementation of `linear_cross_entropy`: all logits at once, by autograd."""
    logits = F.linear(hidden, weight)
    losses = trained = F.cross_entropy(logits, targets, reduction="none")
    if teacher is not None:
        shares = teacher.shares.unsqueeze(-1)
        distribution = F.linear(teacher.hidden, teacher.weight).softmax(-1)
        target = (1 - shares) * F.one_hot(targets, len(weight)) + shares * distribution
        trained = F.cross_entropy(logits, target, reduction="none")
    if certainty and len(targets):
        probabilities = logits.softmax(-1)
        entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
        trained = trained + certainty * entropy * (logits.argmax(-1) == targets)
    return (trained * weights).sum(), losses.detach()
