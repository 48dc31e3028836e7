"""The rows of logits of `ops.cross_entropy` in Triton. Importing this module imports triton.

Tested in Triton's interpreter, and compiled for compute capability 9.0; not yet run or timed on a
GPU.

One program per row reads its logits, in whatever dtype the head's product gave them, adds up in
float32, reads them again while they are near, and writes the gradient over them. In torch the same
reads and writes 23 tensors of the size of bfloat16 logits; here it is three.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_twotower.ops.triton.common import narrow, padded

# Logits that a program holds at a time.
LONGEST = 4096


@triton.jit
def cross_entropy_kernel(
    logits,
    targets,
    weights,
    found,
    first,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A row of this rank's logits (rows, COLUMNS). found (3, rows): largest logit, sum of exponentials less that one,
    and the target's logit, 0 where another rank has it; written with SUM, else read. GRADIENT: over the logits."""
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
        tl.store(found + row, highest)
        tl.store(found + rows + row, total)
        tl.store(found + 2 * rows + row, at_target)
    else:
        highest, total = tl.load(found + row), tl.load(found + rows + row)
    if GRADIENT:
        weight = tl.load(weights + row)
        for start in range(0, COLUMNS, STEP):
            ok = start + cols < COLUMNS
            values = tl.load(base + start + cols, mask=ok, other=0.0).to(tl.float32)
            share = tl.exp(values - highest) / total - tl.where(start + cols == target, 1.0, 0.0)
            tl.store(base + start + cols, narrow(weight * share, logits.dtype.element_ty, INTERPRETED), mask=ok)


def rows_triton(
    logits: Tensor, targets: Tensor, weights: Tensor, *, group: Any, first: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`ops.cross_entropy.rows_torch` of contiguous bfloat16 or float32 logits, in place."""
    assert logits.is_contiguous()
    (rows, columns), shared = logits.shape, group is not None and dist.get_world_size(group) > 1
    found = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    step = min(LONGEST, padded(columns))

    def run(*, sum_: bool, gradient: bool) -> None:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets, weights, found, first, columns, step, sum_, gradient, not logits.is_cuda, num_warps=8
            )

    run(sum_=True, gradient=gradient and not shared)
    highest, total, at_target = found
    if shared:
        own = highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total *= (own - highest).exp()
        dist.all_reduce(found[1:], group=group)
        if gradient:
            run(sum_=False, gradient=True)
    return total.log() + highest - at_target, logits
