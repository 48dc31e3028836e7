"""Context-parallel ranks as threads of this process, for `ops.context_parallel`."""

import threading
import types

import torch

from megatron_twotower.config.context_split import in_sequence_order, stretches
from megatron_twotower.ops import context_parallel


class ContextThreads:
    """A number of ranks that share sequences. Collectives pass tensors between threads.

    Attributes:
        sent: (rank, name of the collective, elements that it gathers or reduces), in any order.
    """

    group = "context"

    def __init__(self, monkeypatch, ranks):
        self.ranks, self.sent = ranks, []
        self._here, self._values = threading.local(), [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=60)
        collectives = types.SimpleNamespace(
            get_world_size=lambda group: ranks,
            get_rank=lambda group: self._here.rank,
            all_gather_into_tensor=self._all_gather,
            reduce_scatter_tensor=self._reduce_scatter,
        )
        monkeypatch.setattr(context_parallel, "dist", collectives)

    def _exchange(self, name, value):
        assert value.is_contiguous()
        self.sent.append((self._here.rank, name, value.numel()))
        self._values[self._here.rank] = value.detach().clone()
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def _all_gather(self, out, own, group, async_op):
        gathered = torch.cat(self._exchange("all_gather", own))
        if not async_op:
            out.copy_(gathered)
        return types.SimpleNamespace(wait=lambda: out.copy_(gathered))

    def _reduce_scatter(self, out, parts, group):
        total = torch.stack(self._exchange("reduce_scatter", parts)).sum(0)
        out.copy_(total.chunk(self.ranks)[self._here.rank])

    def run(self, function):
        """Call a function with the number of each rank. Returns what each returned."""
        results, errors = [None] * self.ranks, []

        def rank(number):
            self._here.rank = number
            try:
                results[number] = function(number)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def rows_of_rank(tensor, ranks, rank):
    """Sequences (b, l, ...) -> the rows of one rank."""
    return context_parallel.rows_of_stretches(tensor, stretches(tensor.shape[1], ranks=ranks, rank=rank))


def whole(rows_of_ranks):
    """Rows (b k, l, ...) of all ranks -> sequences (b, k C l, ...)."""
    if len(rows_of_ranks) == 1:
        return rows_of_ranks[0]
    parts = in_sequence_order([[rows[place::2] for place in range(2)] for rows in rows_of_ranks])
    return torch.cat(parts, dim=1)
