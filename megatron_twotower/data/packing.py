"""Documents padded to complete blocks, one after another, and any window of that stream.

With document boundaries respected, each document is padded to a multiple of the block size. The
padded documents make one stream, which is cut into sequences. What is at a position is found from
prefix sums of the padded lengths, in O(log documents): nothing is packed in advance, and nothing is
stored. A document that does not fit in a sequence continues in the next one, as a document of its
own there. Padding is less than a block per document.
"""

from dataclasses import dataclass, field

import numpy as np

# The documents between two of the stored sums. The sums of 10^9 documents take 16 MB.
_GROUP = 512
_GROUPS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class PackedWindow:
    """A window of `count` positions of the padded stream.

    Attributes:
        documents: (count,) int32, the number of each position's document, counted from 0 in the
            window.
        sources: (count,) int64, never falling: the position in the corpus's own stream whose token
            is here.
        padding: (count,) bool, true where that token is the document's last one, repeated.
    """

    documents: np.ndarray
    sources: np.ndarray
    padding: np.ndarray


@dataclass(frozen=True)
class Packing:
    """The stream of a corpus's documents, each padded to a multiple of `alignment` tokens.

    Attributes:
        starts: (documents + 1,) int64, where each document begins in the corpus's own stream; it
            may be a memory map.
        sums: (groups + 1,) int64, padded tokens before each group of documents.
    """

    starts: np.ndarray = field(repr=False)
    alignment: int
    sums: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, starts: np.ndarray, *, alignment: int) -> "Packing":
        """The packing of documents: sums all lengths once, in bounded memory.

        This takes under a second for 10^8 documents.
        """
        assert alignment > 0 and len(starts) > 0, (alignment, len(starts))
        documents, step = len(starts) - 1, _GROUP * _GROUPS_AT_ONCE
        sizes = [np.zeros(1, dtype=np.int64)]
        for first in range(0, documents, step):
            padded = _padded(np.diff(starts[first : first + step + 1]), alignment)
            sizes.append(np.add.reduceat(padded, np.arange(0, len(padded), _GROUP)))
        return cls(starts, alignment, np.cumsum(np.concatenate(sizes)))

    @property
    def total_tokens(self) -> int:
        """The length of the padded stream."""
        return int(self.sums[-1])

    @property
    def padding_fraction(self) -> float:
        """The share of padding in the padded stream."""
        return 1 - int(self.starts[-1]) / max(self.total_tokens, 1)

    def window(self, first: int, count: int) -> PackedWindow:
        """What is at positions first .. first + count - 1 of the padded stream."""
        assert 0 <= first < first + count <= self.total_tokens, (first, count, self.total_tokens)
        group = int(np.searchsorted(self.sums, first, side="right")) - 1
        end = int(np.searchsorted(self.sums, first + count, side="left"))
        starts = np.asarray(self.starts[group * _GROUP : end * _GROUP + 1])
        lengths = np.diff(starts)
        edges = np.concatenate([[0], np.cumsum(_padded(lengths, self.alignment))]) + self.sums[group]
        begin = int(np.searchsorted(edges, first, side="right")) - 1
        stop = int(np.searchsorted(edges, first + count, side="left"))
        inside = np.diff(np.clip(edges[begin : stop + 1], first, first + count))  # positions of each document
        offsets = np.arange(first, first + count) - np.repeat(edges[begin:stop], inside)
        last = np.repeat(lengths[begin:stop] - 1, inside)
        return PackedWindow(
            documents=np.repeat(np.arange(stop - begin, dtype=np.int32), inside),
            sources=np.repeat(starts[begin:stop], inside) + np.minimum(offsets, last),
            padding=offsets > last,
        )


def _padded(lengths: np.ndarray, alignment: int) -> np.ndarray:
    return -(-lengths // alignment) * alignment
