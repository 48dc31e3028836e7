"""The records that pass from room to room, and the legend of their dimensions.

Dimension legend, used in names and docstrings everywhere:

    b  sequences in a micro-batch        h  hidden size
    l  sequence length in tokens         v  vocabulary size
    s  block size in tokens              c  channels of the Mamba convolution
    n  blocks in a sequence, n = l / s   k  noise buckets of a report
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class UserError(ValueError):
    """A mistake the user can mend. The command line prints its one line and exits with status 2."""


@dataclass(frozen=True)
class Batch:
    """Clean sequences and what identifies them.

    tokens: (b, l) int64 token ids.
    samples: (b,) int64 index of each sequence within its corpus, the same in every epoch.
    epochs: (b,) int64 how often the corpus had been read before.
    positions: (b,) int64 place of each sequence in the global order of the run.
    """

    tokens: Tensor
    samples: Tensor
    epochs: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        fields = (self.tokens, self.samples, self.epochs, self.positions)
        return Batch(*(field.to(device, non_blocking=True) for field in fields))


@dataclass(frozen=True)
class NoisyBatch:
    """Clean sequences beside their corrupted copies.

    tokens: (b, l) int64 clean token ids, the targets.
    noisy: (b, l) int64, masked positions replaced by the mask token.
    masked: (b, l) bool, the scored positions.
    times: (b, n) float32 noise level of each block, or (b, 1) where a sequence has one for all.
    """

    tokens: Tensor
    noisy: Tensor
    masked: Tensor
    times: Tensor


@dataclass(frozen=True)
class AttentionHandoff:
    """What a context attention layer gives its denoiser twin: key and value (b, kv heads, l, head size)."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class MambaHandoff:
    """What a context Mamba layer gives its denoiser twin.

    conv_input: (b, l, c) inputs of the convolution. x (b, l, heads, head size), dt (b, l, heads) and B (b, l, groups,
    state size): inputs of the scan; A (heads,). states: (b, chunks, heads, head size, state size), the state at the
    start of each chunk.
    """

    conv_input: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    states: Tensor


Handoff = AttentionHandoff | MambaHandoff | None


@dataclass(frozen=True)
class LossReport:
    """Sums and counts of one forward pass, never means: they add up over micro-batches and ranks.

    total: () float32, the weighted sum that is trained on, in nats. count: () int32, what its global sum is divided
    by. bucket_sums (k,) float32 and bucket_counts (k,) float32: unweighted cross-entropy and scored positions by
    noise level, in k equal buckets of (0, 1]; one bucket for the `ar` objective.
    """

    total: Tensor
    count: Tensor
    bucket_sums: Tensor
    bucket_counts: Tensor
