"""Uniform numbers that are a hash of integer keys: no generator, no state."""

import torch
from torch import Tensor

from megatron_twotower.common.splitmix64 import INCREMENT, MULTIPLIER_1, MULTIPLIER_2


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _MIX_1, _MIX_2 = (_signed(c) for c in (INCREMENT, MULTIPLIER_1, MULTIPLIER_2))


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
