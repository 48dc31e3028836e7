"""What a denoiser can go without (`conditioning.without`), to measure what it is worth."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_twotower.types import AttentionHandoff, Handoff, MambaHandoff


def seen_times(times: Tensor, without: str) -> Tensor:
    """The noise levels that the denoiser is told: without `time` 1 everywhere."""
    return torch.ones_like(times) if without == "time" else times


def seen_handoffs(handoffs: Sequence[Handoff], without: str) -> list[Handoff]:
    """The handoffs of all layers, as the denoiser reads them.

    Without `states` each block of a Mamba layer starts as a text does: no state, and zeros before
    its convolution. Without `aligned_attention` all attention layers read the last one's.
    """
    if without == "states":
        return [_empty(each) if isinstance(each, MambaHandoff) else each for each in handoffs]
    if without == "aligned_attention":
        last = [each for each in handoffs if isinstance(each, AttentionHandoff)][-1:]
        return [last[0] if isinstance(each, AttentionHandoff) else each for each in handoffs]
    return list(handoffs)


def _empty(handoff: MambaHandoff) -> MambaHandoff:
    nothing = {name: torch.zeros_like(getattr(handoff, name)) for name in ("history", "x", "states")}
    return dataclasses.replace(handoff, **nothing)
