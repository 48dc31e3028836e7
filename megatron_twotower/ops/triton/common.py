"""What the Triton kernels of this folder share. Importing this module imports triton."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def narrow(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """To dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton 3.9's interpreter cuts off, or loses a carry into the exponent: round before it
        # does.
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits >> 16 << 16).to(tl.float32, bitcast=True)
    return values.to(dtype)


def padded(size: int) -> int:
    """tl.dot takes no dimension under 16, tl.arange powers of two."""
    return max(16, 1 << (size - 1).bit_length())


def last_dense(tensor: Tensor) -> Tensor:
    """As it is where the last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
