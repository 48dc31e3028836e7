"""Which part of each sequence a context-parallel rank has.

A sequence is cut into 2 C stretches of equal length over C ranks. Rank c has stretch c and stretch
2 C - 1 - c. In causal attention the second of them reads many keys and the first reads few, so all
ranks have the same work.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# Stretches of each sequence on each of several ranks.
PER_RANK = 2
# The stretches of a rank that has complete sequences.
COMPLETE = (slice(None),)


def stretches_per_rank(ranks: int) -> int:
    """The number of stretches that a rank has of each sequence; without other ranks one."""
    return PER_RANK if ranks > 1 else 1


def num_stretches(ranks: int) -> int:
    """The number of stretches into which ranks cut each sequence; without other ranks one."""
    return ranks * stretches_per_rank(ranks)


def stretch_numbers(*, ranks: int, rank: int) -> tuple[int, ...]:
    """The numbers of the stretches of a rank, in the order in which it has them."""
    return (rank, num_stretches(ranks) - 1 - rank) if ranks > 1 else (0,)


def stretches(length: int, *, ranks: int, rank: int) -> tuple[slice, ...]:
    """The positions of each stretch of a rank, in a sequence of `length` positions."""
    if ranks == 1:
        return COMPLETE
    size = length // num_stretches(ranks)
    return tuple(slice(k * size, (k + 1) * size) for k in stretch_numbers(ranks=ranks, rank=rank))


def in_sequence_order(stretches_of_ranks: Sequence[Sequence[T]]) -> list[T]:
    """The stretches of all ranks, of each rank in its own order -> in the order of the sequence."""
    ranks = len(stretches_of_ranks)
    numbered = {
        number: stretch
        for rank, own in enumerate(stretches_of_ranks)
        for number, stretch in zip(stretch_numbers(ranks=ranks, rank=rank), own, strict=True)
    }
    return [numbered[number] for number in sorted(numbered)]
