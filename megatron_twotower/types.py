"""The records that pass between folders, and the legend of their dimensions.

Dimension legend, used in names and docstrings everywhere:

    b  sequences in a micro-batch        h  hidden size
    l  sequence length in tokens         v  vocabulary size
    s  block size in tokens              c  channels of the Mamba convolution
    n  blocks in a sequence, n = l / s   k  noise buckets of a report
    r  noise draws per sequence          w  clean inputs kept before a block (convolution width - 1)

With context parallelism each sequence is cut into stretches, of which a rank has some
(`config.context_split`). From the noise on, each stretch is a row of its own: b then counts rows,
and l is the length of a stretch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Clean sequences, and what identifies them.

    Attributes:
        tokens: (b, l) int64 token ids.
        samples: (b,) int64 index of each sequence within its corpus, the same in every epoch.
        epochs: (b,) int64 number of times that the corpus had been read before.
        positions: (b,) int64 position of each sequence in the global order of the run.
        documents: (b, l) int32 number of the document of each position, growing along l. None:
            tokens see across document boundaries.
        padding: (b, l) bool, positions that fill up a block and are never scored; None without
            padding.
        corpora: (b,) int64 number of the corpus of each sequence; None with one corpus.
        scored: (b, l) bool, the only positions that may be masked or scored, such as the answers
            of conversations; never padding. None: all positions.
    """

    tokens: Tensor
    samples: Tensor
    epochs: Tensor
    positions: Tensor
    documents: Tensor | None = None
    padding: Tensor | None = None
    corpora: Tensor | None = None
    scored: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class TargetBatch:
    """Clean sequences, and the token that follows each position.

    Attributes:
        tokens: (b, l) int64 token ids.
        targets: (b, l) int64 token ids.
        weights: (b, l) float32 weight of each target: 1, or 0 if it is not scored.
        documents: (b, l), see `Batch`.
        padding: (b, l), see `Batch`.
        sequence_documents: Documents of complete sequences, see `Batch`; None if documents do not
            matter, or without context parallelism.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    documents: Tensor | None = None
    padding: Tensor | None = None
    sequence_documents: Tensor | None = None

    def to(self, device: torch.device) -> "TargetBatch":
        """Return a copy on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class NoisyBatch:
    """Clean sequences with their r corrupted copies, ordered by draw: (r b, ...).

    Attributes:
        tokens: (b, l) int64 clean token ids.
        noisy: (r b, l) int64, with masked tokens replaced by the mask token.
        targets: (b, l) int64, the clean token that each position predicts: that at the same
            position, or the next one (`noise.token_shift`).
        times: (r b, n) float32 noise level of each block, or (r b, 1) with one level per sequence.
        scored_positions: (m,) int64 positions in the flattened (r b, l) whose targets are masked
            and not padding; only the first `num_scored` count. Computed on the host with the noise,
            so that no step waits for a count. m is rounded up, so that there are few shapes.
        num_scored: () int32 number of scored positions.
        num_tokens: () int32 number of all r b l targets that are not padding, and may be scored.
        block: Block size s.
        documents: (b, l), see `Batch`.
        padding: (b, l), see `Batch`.
        sequence_documents: See `TargetBatch`.
        sequence_weights: Of each copy of a complete sequence, float32, what it adds to the count
            that the loss is divided by. None: the number of its positions that are not padding.
        teacher_shares: (m,) float32 share of the context tower's next-token distribution in the
            target of each scored position. None: it gives no targets.
        distance_weights: (m,) float32 weight of each scored position by its distance from the last
            visible token. None: all have the same.
    """

    tokens: Tensor
    noisy: Tensor
    targets: Tensor
    times: Tensor
    scored_positions: Tensor
    num_scored: Tensor
    num_tokens: Tensor
    block: int
    documents: Tensor | None = None
    padding: Tensor | None = None
    sequence_documents: Tensor | None = None
    sequence_weights: Tensor | None = None
    teacher_shares: Tensor | None = None
    distance_weights: Tensor | None = None

    @property
    def position_times(self) -> Tensor:
        """(r b, l) float32, the noise level of each position."""
        return self.times.repeat_interleave(self.noisy.shape[1] // self.times.shape[1], dim=1)

    def to(self, device: torch.device) -> "NoisyBatch":
        """Return a copy on another device."""
        return _moved(self, device)


def noise_buckets(times: Tensor, buckets: int) -> Tensor:
    """Return the bucket of each noise level.

    Buckets are equal parts of (0, 1]; the first is (0, 1 / buckets].
    """
    return (times * buckets).ceil().long().clamp(1, buckets) - 1


def _moved(record: Any, device: torch.device) -> Any:
    """Copy a record to another device; to CUDA from pinned memory, so that no step waits."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if device.type == "cuda":
        tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return dataclasses.replace(record, **moved)


@dataclass(frozen=True)
class Blocks:
    """The blocks and documents of a stream of tokens, and the weights of its sequences.

    Attributes:
        size: Block size s; None in a stream that passes nothing to a denoiser.
        documents: (b, l), see `Batch`.
        padding: (b, l), see `Batch`.
        sequence_weights: See `NoisyBatch`.
        attention_masks: What `ops.attention.block_mask` built for all attention layers, for each
            stretch that a rank has of a sequence; empty if there is nothing to build.
        context: The `ops.context_parallel.ContextRanks` that share the sequences, or None.
        noise_buckets: (r b, l) int64, the range of noise levels of each position, for which routers
            balance or count; None: they do not.
    """

    size: int | None = None
    documents: Tensor | None = None
    padding: Tensor | None = None
    sequence_weights: Tensor | None = None
    attention_masks: tuple[Any, ...] = ()
    context: Any = None
    noise_buckets: Tensor | None = None


@dataclass(frozen=True)
class AttentionHandoff:
    """What an attention layer of the context tower passes to the same layer of the denoiser.

    Attributes:
        key: (b, kv heads, l, head size); with context parallelism of complete sequences.
        value: Likewise.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class MambaHandoff:
    """What a Mamba layer of the context tower passes to the same layer of the denoiser.

    Attributes:
        conv_input: (b, l, c), from which history, x and B are computed.
        history: (b, n, w, c) inputs of the convolution just before each block.
        x: (b, l, heads, head size) input of the scan.
        dt: (b, l, heads) input of the scan.
        A: (heads,) input of the scan.
        B: (b, l, groups, state size) input of the scan.
        states: (b, chunks, heads, head size, state size) state at the start of each chunk.
        before: (b, w, c) inputs of the convolution before each stretch; None without context
            parallelism.
    """

    conv_input: Tensor
    history: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    states: Tensor
    before: Tensor | None = None


Handoff = AttentionHandoff | MambaHandoff | None


@dataclass(frozen=True)
class LossReport:
    """Sums and counts of one forward pass, never means: they add up over micro-batches and ranks.

    Attributes:
        total: () float32, the weighted sum that is trained on, in nats.
        count: () int32, the number whose global sum divides `total`.
        bucket_sums: (k,) float32 unweighted cross-entropy by noise level, in k equal buckets of
            (0, 1]; one bucket for the `ar` objective.
        bucket_counts: (k,) float32 number of scored positions in each bucket.
    """

    total: Tensor
    count: Tensor
    bucket_sums: Tensor
    bucket_counts: Tensor


@dataclass(frozen=True)
class LogWindow:
    """What a checkpoint stores of the steps since the last log record, summed over all ranks.

    With it the next record of a resumed run is that of an uninterrupted run. The field names are
    the keys in `state.json`.

    Attributes:
        sums: (2 + 2k,) total, count, bucket sums and bucket counts of `LossReport`; None without a
            finite step.
        expert_tokens: (layers, experts) tokens of each expert; None as for `sums`, and without
            experts.
        sequences: Sequences consumed.
        skipped: Sequences in damaged shards.
        nonfinite: Steps whose loss or gradients were not finite.
        in_a_row: Such steps without interruption up to the checkpoint.
        unscored: Steps that were skipped because no position was scored.
    """

    sums: list[float] | None = None
    expert_tokens: list[list[float]] | None = None
    sequences: int = 0
    skipped: int = 0
    nonfinite: int = 0
    in_a_row: int = 0
    unscored: int = 0
