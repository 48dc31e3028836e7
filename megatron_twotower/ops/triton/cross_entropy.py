"""Cross-entropy of a chunk of logits and its gradient in Triton, for `ops.cross_entropy`.

Importing this module imports triton. The kernel is tested in Triton's interpreter and compiled for
compute capability 9.0. It has not yet been run or timed on a GPU.

One program per row reads the logits in their own dtype, sums in float32, reads them again while
they are still in the cache, and overwrites them with the gradient. Memory traffic, in tensors of
the size of bfloat16 logits: 3, where the same in torch needs 23.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import padded_size, round_to

# The most logits that a program keeps in registers at a time.
MAX_COLUMNS = 4096


@triton.jit
def cross_entropy_kernel(
    logits,
    targets,
    weights,
    stats,
    first,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One row of this rank's logits (rows, COLUMNS).

    stats (3, rows) float32: the largest logit, the sum of exponentials relative to it, and the
    logit of the target, 0 if another rank has it. They are written with SUM and read without it.
    With GRADIENT the gradient overwrites the logits.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    base, cols = logits + row.to(tl.int64) * COLUMNS, tl.arange(0, STEP)
    target = tl.load(targets + row) - first
    target = tl.where(target < COLUMNS, target, -1)
    if SUM:
        highest, total, at_target = float("-inf"), 0.0, 0.0
        for start in range(0, COLUMNS, STEP):
            values = tl.load(base + start + cols, mask=start + cols < COLUMNS, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(values, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
            at_target += tl.sum(tl.where(start + cols == target, values, 0.0), 0)
            highest = higher
        tl.store(stats + row, highest)
        tl.store(stats + rows + row, total)
        tl.store(stats + 2 * rows + row, at_target)
    else:
        highest, total = tl.load(stats + row), tl.load(stats + rows + row)
    if GRADIENT:
        weight = tl.load(weights + row)
        for start in range(0, COLUMNS, STEP):
            ok = start + cols < COLUMNS
            values = tl.load(base + start + cols, mask=ok, other=0.0).to(tl.float32)
            probability_error = tl.exp(values - highest) / total - tl.where(start + cols == target, 1.0, 0.0)
            tl.store(base + start + cols, round_to(weight * probability_error, logits.dtype.element_ty), mask=ok)


def chunk_cross_entropy_triton(
    logits: Tensor, targets: Tensor, weights: Tensor, *, group: Any, first: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`chunk_cross_entropy_torch` of contiguous bfloat16 or float32 logits, in place."""
    assert logits.is_contiguous()
    (rows, columns), shared = logits.shape, group is not None and dist.get_world_size(group) > 1
    stats = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    step = min(MAX_COLUMNS, padded_size(columns))

    def launch(*, sum_: bool, gradient: bool) -> None:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets, weights, stats, first, columns, step, sum_, gradient, num_warps=8
            )

    launch(sum_=True, gradient=gradient and not shared)
    highest, total, at_target = stats
    if shared:
        own_highest = highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total *= (own_highest - highest).exp()
        dist.all_reduce(stats[1:], group=group)
        if gradient:
            launch(sum_=False, gradient=True)
    return total.log() + highest - at_target, logits
