"""Documents padded to complete blocks, one after another, and any window of that stream.

With document boundaries respected, each document is padded to a multiple of the block size. The
padded documents make one stream, which is cut into sequences. What is at a position is found from
prefix sums of the padded lengths, in O(log documents): nothing is packed in advance, and nothing is
stored. A document that does not fit in a sequence continues in the next one, as a document of its
own there. Padding is less than a block per document.

Conversations (`WholePacking`) are never cut in this way: one that does not fit any more begins the
next sequence. Of one that is longer than a sequence, the end is left out.
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


@dataclass(frozen=True)
class WholePacking:
    """Sequences of whole documents in their order, each padded to a multiple of `alignment` tokens.

    A sequence takes documents as long as they fit. What fills up the block at the end of a document
    repeats its last token and counts as text: the end of an answer is then learnt as it is
    generated, with nothing visible after it. What fills up the sequence is padding.

    Attributes:
        starts: As in `Packing`.
        alignment: The tokens that documents are padded to a multiple of.
        length: The tokens of a sequence, a multiple of `alignment`.
        firsts: (sequences + 1,) int64, the first document of each sequence.
    """

    starts: np.ndarray = field(repr=False)
    alignment: int
    length: int
    firsts: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, starts: np.ndarray, *, alignment: int, length: int) -> "WholePacking":
        """The packing of documents; takes 16 bytes for each, and microseconds for each sequence."""
        assert alignment > 0 and length % alignment == 0, (alignment, length)
        sizes = np.minimum(_padded(np.diff(starts), alignment), length)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        firsts = [0]
        while firsts[-1] < len(sizes):
            firsts.append(int(np.searchsorted(ends, ends[firsts[-1]] + length, side="right")) - 1)
        return cls(starts, alignment, length, np.array(firsts, dtype=np.int64))

    @property
    def total_tokens(self) -> int:
        """The length of all sequences."""
        return (len(self.firsts) - 1) * self.length

    @property
    def padding_fraction(self) -> float:
        """The share of positions that repeat a token."""
        kept = int(np.minimum(np.diff(self.starts), self.length).sum())
        return 1 - kept / max(self.total_tokens, 1)

    @property
    def cut_documents(self) -> int:
        """The number of documents that are longer than a sequence."""
        return int((np.diff(self.starts) > self.length).sum())

    def window(self, first: int, count: int) -> PackedWindow:
        """What is at the positions of one sequence, which begins at `first`."""
        assert first % self.length == 0 and count == self.length, (first, count, self.length)
        begin, stop = self.firsts[first // self.length : first // self.length + 2].tolist()
        starts = np.asarray(self.starts[begin : stop + 1])
        lengths = np.minimum(np.diff(starts), self.length)
        inside = _padded(lengths, self.alignment)
        filler = self.length - int(inside.sum())
        offsets = np.arange(self.length - filler) - np.repeat(np.cumsum(inside) - inside, inside)
        sources = np.repeat(starts[:-1], inside) + np.minimum(offsets, np.repeat(lengths - 1, inside))
        documents = np.repeat(np.arange(stop - begin, dtype=np.int32), inside)
        return PackedWindow(
            documents=np.pad(documents, (0, filler), mode="edge"),
            sources=np.pad(sources, (0, filler), mode="edge"),
            padding=np.arange(self.length) >= self.length - filler,
        )


def _padded(lengths: np.ndarray, alignment: int) -> np.ndarray:
    return -(-lengths // alignment) * alignment
