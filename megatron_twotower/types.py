"""The records that pass from room to room, and the legend of their dimensions.

Dimension legend, used in names and docstrings everywhere:

    b  sequences in a micro-batch        h  hidden size
    l  sequence length in tokens         v  vocabulary size
    s  block size in tokens              c  channels of the Mamba convolution
    n  blocks in a sequence, n = l / s   k  noise buckets of a report
    r  noise draws per sequence          w  clean inputs kept before a block (convolution width - 1)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Clean sequences and what identifies them.

    tokens: (b, l) int64 token ids.
    samples: (b,) int64 index of each sequence within its corpus, the same in every epoch.
    epochs: (b,) int64 how often the corpus had been read before.
    positions: (b,) int64 place of each sequence in the global order of the run.
    documents: (b, l) int32 number of each position's document, growing along l; None to see across
    boundaries.
    padding: (b, l) bool, positions that fill up a block and are never scored; None where there are
    none.
    corpora: (b,) int64 number of the corpus each sequence is from; None with one corpus.
    """

    tokens: Tensor
    samples: Tensor
    epochs: Tensor
    positions: Tensor
    documents: Tensor | None = None
    padding: Tensor | None = None
    corpora: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return _moved(self, device)


@dataclass(frozen=True)
class NoisyBatch:
    """Clean sequences beside their corrupted copies, of which there are r for each: draw by draw, (r b, ...).

    tokens: (b, l) int64 clean token ids, the targets.
    noisy: (r b, l) int64, masked positions replaced by the mask token.
    times: (r b, n) float32 noise level of each block, or (r b, 1) where a sequence has one for all.
    scored_positions: (m,) int64 places in the flattened (r b, l) that are masked and not padding,
        the first `num_scored`, and any places behind them. Made on the host with the noise, so that
        no step waits for a count; rounded up, so that shapes are few.
    num_scored: () int32, how many positions are scored. num_tokens: () int32, how many of all r b l
    are not padding.
    block: block size s.
    documents, padding: (b, l) as in `Batch`.
    sequence_weights: (r b,) float32, what each copy adds to the count that the loss is divided by;
    None for its real positions.
    """

    tokens: Tensor
    noisy: Tensor
    times: Tensor
    scored_positions: Tensor
    num_scored: Tensor
    num_tokens: Tensor
    block: int
    documents: Tensor | None = None
    padding: Tensor | None = None
    sequence_weights: Tensor | None = None

    def to(self, device: torch.device) -> "NoisyBatch":
        return _moved(self, device)


def _moved(record: Any, device: torch.device) -> Any:
    """A record with its tensors on another device; on CUDA from pinned memory, so that no step waits for it."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if device.type == "cuda":
        tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return dataclasses.replace(record, **moved)


@dataclass(frozen=True)
class Blocks:
    """How a stream is cut, and what of it counts.

    size: block size s, None where nothing is handed on. documents, padding: (b, l) as in `Batch`.
    sequence_weights: (r b,) as in `NoisyBatch`.
    attention_mask: that of `ops.attention.block_mask`, or `None`.
    """

    size: int | None = None
    documents: Tensor | None = None
    padding: Tensor | None = None
    sequence_weights: Tensor | None = None
    attention_mask: Any = None


@dataclass(frozen=True)
class AttentionHandoff:
    """What a context attention layer gives its denoiser twin: key and value (b, kv heads, l, head size)."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class MambaHandoff:
    """What a context Mamba layer gives its denoiser twin.

    history: (b, n, w, c) the inputs of the convolution just before each block. x (b, l, heads, head
    size), dt (b, l, heads) and B (b, l, groups, state size): inputs of the scan; A (heads,).
    states: (b, chunks, heads, head size, state size), the state at the start of each chunk.
    conv_input: (b, l, c), what history, x and B come from.
    """

    conv_input: Tensor
    history: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    states: Tensor


Handoff = AttentionHandoff | MambaHandoff | None


@dataclass(frozen=True)
class LossReport:
    """Sums and counts of one forward pass, never means: they add up over micro-batches and ranks.

    total: () float32, the weighted sum that is trained on, in nats. count: () int32, what its
    global sum is divided by. bucket_sums (k,) float32 and bucket_counts (k,) float32: unweighted
    cross-entropy and scored positions by noise level, in k equal buckets of (0, 1]; one bucket for
    the `ar` objective.
    """

    total: Tensor
    count: Tensor
    bucket_sums: Tensor
    bucket_counts: Tensor
