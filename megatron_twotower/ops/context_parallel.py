"""What context-parallel ranks tell each other: keys and values, states, and inputs at seams.

Each sequence is cut into stretches over the ranks of a group (`config.context_split`). On a rank
every stretch is a row of its own: b sequences are (b k, l, ...) with k stretches each, one sequence
after the other, and the l positions of a stretch. All operations but those of this module treat the
rows as independent sequences.

Whatever crosses a seam is gathered from all ranks by one collective. Its gradient, if it has one,
goes back by one collective. No gradient crosses a seam of the denoiser: what it reads of other
stretches comes from the frozen context tower.

Whoever gathers can do other work while the message is under way. So a computation that gathers is a
generator, `Steps`: it pauses after it has sent a message, and its next step waits for the answer.
`finish` runs such a computation without a pause.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_twotower.config.context_split import PER_RANK, in_sequence_order, stretch_numbers

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
# A computation that yields None whenever a message to other ranks is under way.
Steps = Generator[None, None, Result]


def finish(steps: Steps[Result]) -> Result:
    """Run a computation to its end. Returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def without_pauses(computation: Callable[Arguments, Steps[Result]]) -> Callable[Arguments, Result]:
    """A computation as a function that runs it to its end."""

    @functools.wraps(computation)
    def run(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
        return finish(computation(*arguments, **settings))

    return run


def steps_under(context: Callable[[], AbstractContextManager[Any]], steps: Steps[Result]) -> Steps[Result]:
    """A computation under a context that is left at each pause."""
    while True:
        with context():
            try:
                next(steps)
            except StopIteration as end:
                return end.value
        yield


def rows_of_stretches(tensor: Tensor, stretches: Sequence[slice]) -> Tensor:
    """Cut sequences (b, l, ...) along l into rows (b k, ...), one for each of k stretches."""
    if len(stretches) == 1:
        return tensor[:, stretches[0]]
    return torch.stack([tensor[:, stretch] for stretch in stretches], dim=1).flatten(0, 1)


def _order(ranks: int) -> list[int]:
    """Where each stretch of a sequence is among the stretches of all ranks, rank after rank."""
    places = torch.arange(PER_RANK * ranks).view(ranks, PER_RANK).tolist()
    return in_sequence_order(places)


def _start_gather(rows: Tensor, group: Any, *, async_op: bool) -> tuple[Tensor, Any]:
    """Send rows (b k, ...) to all ranks. Returns all stretches, rank after rank, and the work."""
    ranks = dist.get_world_size(group)
    own = rows.unflatten(0, (-1, PER_RANK)).transpose(0, 1).contiguous()
    gathered = own.new_empty(ranks * PER_RANK, *own.shape[1:])
    return gathered, dist.all_gather_into_tensor(gathered, own, group=group, async_op=async_op)


def _by_sequence(gathered: Tensor) -> Tensor:
    """(stretches, b, ...), rank after rank -> (b, stretches of a sequence, ...)."""
    # Not by an index tensor, which the host would copy to the device, and wait.
    return torch.stack([gathered[place] for place in _order(len(gathered) // PER_RANK)], dim=1)


class _Gather(torch.autograd.Function):
    """`ContextRanks.gather` with gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered, _ = _start_gather(rows, group, async_op=False)
        return _by_sequence(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        order = _order(dist.get_world_size(ctx.group))
        number_at = sorted(range(len(order)), key=order.__getitem__)
        stretches = torch.stack([grad[:, number] for number in number_at])
        own = stretches.new_empty(PER_RANK, *stretches.shape[1:])
        dist.reduce_scatter_tensor(own, stretches, group=ctx.group)
        return own.transpose(0, 1).flatten(0, 1), None


@dataclass(frozen=True)
class ContextRanks:
    """The ranks that share sequences, and the documents of the complete sequences.

    Attributes:
        group: The process group of two or more ranks.
        documents: (b, k C l) int32, growing along the sequence; None: each sequence is one
            document.
    """

    group: Any
    documents: Tensor | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of this rank's stretches in their sequence."""
        return stretch_numbers(ranks=dist.get_world_size(self.group), rank=dist.get_rank(self.group))

    def _documents_of_stretches(self) -> Tensor:
        """(b, stretches, l)."""
        assert self.documents is not None
        return self.documents.unflatten(1, (PER_RANK * dist.get_world_size(self.group), -1))

    def gather(self, rows: Tensor) -> Steps[Tensor]:
        """The rows (b k, ...) of all ranks, as (b, stretches of a sequence, ...)."""
        if torch.is_grad_enabled() and rows.requires_grad:
            return _Gather.apply(rows, self.group)
        gathered, work = _start_gather(rows, self.group, async_op=True)
        yield
        work.wait()
        return _by_sequence(gathered)

    def _own(self, stretches: Tensor) -> Tensor:
        """What (b, stretches of a sequence, ...) has of this rank: (b k, ...)."""
        return torch.stack([stretches[:, number] for number in self.numbers], dim=1).flatten(0, 1)

    def whole_sequences(self, key: Tensor, value: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Keys and values (b k, heads, l, e) of stretches -> of sequences: (b, heads, k C l, e)."""
        both = yield from self.gather(torch.stack([key, value], dim=1))
        key, value = both.movedim(1, 3).flatten(3, 4).unbind(1)
        return key, value

    def before(self, x: Tensor, width: int) -> Steps[Tensor]:
        """The `width` positions before each row: (b k, l, ...) -> (b k, width, ...).

        They are zeros before a sequence and in another document than the first of the row.
        """
        ends = yield from self.gather(x[:, x.shape[1] - width :])
        seen = torch.ones(ends.shape[:3], dtype=torch.bool, device=x.device)
        if self.documents is not None:
            documents = self._documents_of_stretches()
            seen[:, :-1] = documents[:, :-1, -width:] == documents[:, 1:, :1]
        ends = torch.where(seen.view(*seen.shape, *[1] * (x.dim() - 2)), ends, 0)
        return self._own(torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1))

    def states_before(self, final: Tensor, keep: Tensor) -> Steps[Tensor]:
        """The state that each row starts from.

        Args:
            final: (b k, heads, p, d), the state after each row if it starts from zeros.
            keep: (b k, heads), the factor of the start state in the state after the row.

        Returns:
            (b k, heads, p, d), zeros for a row that begins a sequence or a document.
        """
        return self._along_sequence(final, keep, forward=True)

    def gradients_after(self, gradient: Tensor, keep: Tensor) -> Steps[Tensor]:
        """The gradient of the state after each row, from the rows that follow.

        Args:
            gradient: (b k, heads, p, d), the gradient of the start state of each row, from that row
                alone.
            keep: As in `states_before`.
        """
        return self._along_sequence(gradient, keep, forward=False)

    def _along_sequence(self, own: Tensor, keep: Tensor, *, forward: bool) -> Steps[Tensor]:
        """The recurrence over stretches, which every rank computes from what all have gathered."""
        heads, size = own.shape[1], own[0, 0].numel()
        both = yield from self.gather(torch.cat([own.flatten(2), keep.unsqueeze(-1).to(own.dtype)], dim=-1))
        added, kept = both.split([size, 1], dim=-1)
        count = added.shape[1]
        joined = torch.ones(len(added), count, 1, 1, dtype=own.dtype, device=own.device)
        if self.documents is not None:  # whether a state passes from the stretch before it
            documents = self._documents_of_stretches()
            joined[:, 1:, 0, 0] = (documents[:, 1:, 0] == documents[:, :-1, -1]).to(own.dtype)
        numbers = range(count) if forward else range(count - 1, -1, -1)
        states: dict[int, Tensor] = {}
        state = torch.zeros_like(added[:, 0])
        for number in numbers:
            if forward and number:
                state = state * joined[:, number]
            states[number] = state
            state = added[:, number] + kept[:, number] * state
            if not forward:
                state = state * joined[:, number]
        rows = torch.stack([states[number] for number in self.numbers], dim=1)
        return rows.flatten(0, 1).view(-1, heads, *own.shape[2:])


def context_ranks(group: Any, documents: Tensor | None) -> ContextRanks | None:
    """The ranks that share sequences, or `None` if this rank has complete sequences.

    Args:
        group: The context-parallel process group, or `None`.
        documents: Of complete sequences, as in `ContextRanks`.
    """
    if group is None or dist.get_world_size(group) == 1:
        return None
    return ContextRanks(group, documents)
