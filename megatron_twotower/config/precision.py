"""Precisions by name, and the shapes that FP8 needs.

With FP8, projections and experts multiply in it. Parameters, activations between layers, norms,
routers, scans and the loss are as with bf16. The three ways of scaling for Hopper are Transformer
Engine's: `delayed` takes the scale of a tensor from the largest values of previous steps, `current`
takes it from the tensor itself, `blockwise` has one scale for every 128 values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """A precision of training.

    Attributes:
        bytes: Of a parameter, and of an activation between layers.
        recipe: The FP8 recipe under Megatron's name; None without FP8.
        capability: Compute capability of the oldest CUDA device that multiplies in it.
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
# Of the frozen tower: that of its parameters, or FP8; then its weights are stored in FP8.
# `delayed` is not possible here: a stored FP8 weight takes its scale from its own values.
CONTEXT_PRECISIONS = {"wide": None, "fp8_current": "tensorwise", "fp8_blockwise": "blockwise"}

# What FP8 needs of the sides of every matrix, and of the tokens of a micro-batch:
# transformer-engine 2.11, pytorch/utils.py, assert_dim_for_fp8_exec, rows by 8 and columns by 16;
# rows are columns in the backward pass.
FP8_MULTIPLE = 16
# What `blockwise` needs of the tokens of each rank if ranks gather the parts of a sequence, which
# are scaled in squares before: the same file, assert_dim_for_all_gather.
FP8_SQUARE = 128
