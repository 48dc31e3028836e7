"""Helpers of the Triton kernels in this folder. Importing this module imports triton."""

import os

import triton
import triton.language as tl
from torch import Tensor

# Whether Triton's interpreter runs the kernels. Triton reads the same variable when it is imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(values, dtype: tl.constexpr):
    """The float32 values in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter of Triton 3.9 truncates, or loses a carry into the exponent. Round here,
        # before it converts.
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits >> 16 << 16).to(tl.float32, bitcast=True)
    return values.to(dtype)


def padded_size(size: int) -> int:
    """The next power of two, at least 16.

    `tl.arange` takes powers of two, and `tl.dot` no dimension under 16.
    """
    return max(16, 1 << (size - 1).bit_length())


def dense_last_dimension(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
