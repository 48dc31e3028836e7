"""Corpora in memory, for tests of the reading order."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_twotower.common.errors import UserError


@dataclass(frozen=True)
class MemoryCorpus:
    """Replaces `shards.Corpus`: token i is `base + i`, and every document ends with `end`.

    mask: what is scored of all tokens; None of texts. damaged: shards that cannot be read, and why.
    shard_tokens: of each shard.
    """

    lengths: np.ndarray
    base: int = 0
    shard_tokens: int = 1000
    damaged: dict[int, str] = field(default_factory=dict)
    reads: list[tuple[int, int]] = field(default_factory=list)
    folder: Path = Path("memory/train")
    vocab_size: int = 1 << 40
    tokenizer_fingerprint: str = "memory"
    mask: np.ndarray | None = None

    @property
    def starts(self):
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def total_tokens(self):
        return int(self.lengths.sum())

    def tokens(self, start, count):
        assert 0 <= start <= start + count <= self.total_tokens
        self.reads.append((start, count))
        for shard in range(self.shard_of(start), self.shard_of(start + count - 1) + 1):
            if shard in self.damaged:
                raise UserError(f"shard {shard}: {self.damaged[shard]}")
        return self.base + np.arange(start, start + count)

    def scored(self, start, count):
        return None if self.mask is None else self.mask[start : start + count]

    @property
    def scored_offsets(self):
        return None if self.mask is None else np.arange(len(self.lengths))

    def shard_of(self, position):
        return position // self.shard_tokens


def corpus_of(documents, *, longest, seed=0, **changes):
    """Documents of random lengths from 1 to `longest`."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, documents)
    return MemoryCorpus(lengths, **changes)
