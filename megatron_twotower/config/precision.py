"""Precisions by name, and the shapes that FP8 asks for.

FP8 is what projections and experts multiply in; parameters, what is between layers, norms, routers,
scans and the loss are as in bf16. Hopper's three ways of scaling are Transformer Engine's:
`delayed` takes the scale of a tensor from the largest values of the steps before, `current` from
the tensor itself, `blockwise` has one for every 128 values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """bytes: of a parameter, and of an activation between layers. recipe: of FP8, as Megatron calls it, or None.

    capability: of the oldest CUDA device that multiplies in it.
    """

    bytes: int
    recipe: str | None = None
    capability: tuple[int, int] = (0, 0)


PRECISIONS = {
    "fp32": Precision(4),
    "bf16": Precision(2),
    "fp8_delayed": Precision(2, "delayed", (8, 9)),
    "fp8_current": Precision(2, "tensorwise", (8, 9)),
    "fp8_blockwise": Precision(2, "blockwise", (9, 0)),
}
# Of the frozen tower: as its parameters, or FP8, and then its weights are held in it. `delayed` is
# none of them: what is held in FP8 has its scale from its own values.
CONTEXT_PRECISIONS = {"wide": None, "fp8_current": "tensorwise", "fp8_blockwise": "blockwise"}

# What FP8 asks of the sides of every matrix, and of the tokens of a micro-batch: transformer-engine
# 2.11, pytorch/utils.py, assert_dim_for_fp8_exec, rows by 8 and columns by 16; rows are columns in
# the backward pass.
FP8_MULTIPLE = 16
# What `blockwise` asks of the tokens of each rank where ranks gather the parts of a sequence, which
# are scaled in squares before: the same file, assert_dim_for_all_gather.
FP8_SQUARE = 128
