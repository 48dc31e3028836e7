"""Uniform numbers that are a hash of integer keys: no generator, no state."""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# The increment and the two multipliers of splitmix64 (Steele, Lea and Flood 2014).
_GOLDEN, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def keyed_uniform(seed: int, *keys: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each element of the broadcast integer keys."""
    state = torch.tensor(_signed(seed), dtype=torch.int64, device=device)
    for key in keys:
        state = _mix((state ^ key) * _GOLDEN + _GOLDEN)
    return _shift(_mix(state + _GOLDEN), 11).to(torch.float64) * 2.0**-53
