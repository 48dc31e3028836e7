"""Documents padded to complete blocks, one after another, and any window of that stream.

With document boundaries respected, each document is padded to a multiple of the block size. The
padded documents make one stream, which is cut into sequences. What is at a position is found from
prefix sums of the padded lengths, in O(log documents): nothing is packed in advance, and nothing is
stored. A document that does not fit in a sequence continues in the next one, as a document of its
own there. Padding is less than a block per document.

Conversations (`WholePacking`) are never cut in this way: one that does not fit any more begins the
next sequence. Of one that is longer than a sequence, the end is left out.
"""

import dataclasses
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
        sources: (count,) int64: the position in the corpus's own stream whose token is here. It
            never falls, unless a conversation comes once for each of its answers.
        padding: (count,) bool, true where that token is the document's last one, repeated.
        scored: (count,) bool, the positions that are scored; None if the corpus alone says it.
    """

    documents: np.ndarray
    sources: np.ndarray
    padding: np.ndarray
    scored: np.ndarray | None = None


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

    With `of_answers`, a conversation comes once for each of its answers, with what is before that
    answer. Padding before it, a document of its own, makes the answer begin a block, as in
    generation. Only that answer is scored.

    Attributes:
        alignment: The tokens that documents are padded to a multiple of.
        length: The tokens of a sequence, a multiple of `alignment`.
        begins: (documents,) int64, where each begins in the corpus's own stream.
        sizes: (documents,) int64, the tokens of each that are kept.
        answers: (documents,) int64, the tokens of each before its answer; None if the corpus says
            what is scored.
        firsts: (sequences + 1,) int64, the first document of each sequence.
        cut_documents: The number of documents that are longer than a sequence.
    """

    alignment: int
    length: int
    begins: np.ndarray = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    answers: np.ndarray | None = field(repr=False)
    firsts: np.ndarray = field(repr=False)
    cut_documents: int

    @classmethod
    def of(cls, starts: np.ndarray, *, alignment: int, length: int) -> "WholePacking":
        """The packing of documents that begin at `starts`, as in `Packing`.

        It takes some 32 bytes for each document, and microseconds for each sequence.
        """
        return cls._of(np.asarray(starts[:-1]), np.diff(starts), None, alignment=alignment, length=length)

    @classmethod
    def of_answers(
        cls, begins: np.ndarray, answers: np.ndarray, ends: np.ndarray, *, alignment: int, length: int
    ) -> "WholePacking":
        """The packing of answers, (answers,) int64 each in the corpus's own stream.

        An answer that begins after the end of a sequence is left out.

        Args:
            begins: Where the conversation of each answer begins.
            answers: Where the answer begins.
            ends: Where it ends.
            alignment: The tokens of a block.
            length: The tokens of a sequence.
        """
        kept = _padded(answers - begins, alignment) < length
        before, sizes = (answers - begins)[kept], (ends - begins)[kept]
        packing = cls._of(begins[kept], sizes, before, alignment=alignment, length=length)
        return dataclasses.replace(packing, cut_documents=packing.cut_documents + int((~kept).sum()))

    @classmethod
    def _of(
        cls, begins: np.ndarray, sizes: np.ndarray, answers: np.ndarray | None, *, alignment: int, length: int
    ) -> "WholePacking":
        assert alignment > 0 and length % alignment == 0, (alignment, length)
        room = length - _shifts(answers, alignment)
        cut, kept = int((sizes > room).sum()), np.minimum(sizes, room)
        ends = np.concatenate([[0], np.cumsum(_padded(kept + length - room, alignment))])
        firsts = [0]
        while firsts[-1] < len(kept):
            firsts.append(int(np.searchsorted(ends, ends[firsts[-1]] + length, side="right")) - 1)
        return cls(alignment, length, begins, kept, answers, np.array(firsts, dtype=np.int64), cut)

    @property
    def total_tokens(self) -> int:
        """The length of all sequences."""
        return (len(self.firsts) - 1) * self.length

    @property
    def padding_fraction(self) -> float:
        """The share of positions that repeat a token."""
        return 1 - int(self.sizes.sum()) / max(self.total_tokens, 1)

    def window(self, first: int, count: int) -> PackedWindow:
        """What is at the positions of one sequence, which begins at `first`."""
        assert first % self.length == 0 and count == self.length, (first, count, self.length)
        here = slice(*self.firsts[first // self.length : first // self.length + 2].tolist())
        begins, sizes = self.begins[here], self.sizes[here]
        answers = None if self.answers is None else self.answers[here]
        shifts = np.broadcast_to(_shifts(answers, self.alignment), sizes.shape)
        inside = _padded(shifts + sizes, self.alignment)
        filler = self.length - int(inside.sum())

        def each(values: np.ndarray) -> np.ndarray:
            return np.repeat(values, inside)

        # Of each position: its place in the document, below 0 in the padding before it.
        offsets = np.arange(self.length - filler) - each(np.cumsum(inside) - inside) - each(shifts)
        sources = each(begins) + np.clip(offsets, 0, each(sizes - 1))
        documents = 2 * each(np.arange(len(sizes), dtype=np.int32)) + (offsets >= 0)
        before = offsets < 0
        scored = None if answers is None else np.pad((offsets >= each(answers)) & ~before, (0, filler))
        return PackedWindow(
            documents=np.pad(documents, (0, filler), mode="edge").astype(np.int32),
            sources=np.pad(sources, (0, filler), mode="edge"),
            padding=np.pad(before, (0, filler), constant_values=True),
            scored=scored,
        )


def _shifts(answers: np.ndarray | None, alignment: int) -> np.ndarray:
    """The padding before each document that makes its answer begin a block; 0 without answers."""
    return np.zeros(1, dtype=np.int64) if answers is None else -answers % alignment


def _padded(lengths: np.ndarray, alignment: int) -> np.ndarray:
    return -(-lengths // alignment) * alignment
