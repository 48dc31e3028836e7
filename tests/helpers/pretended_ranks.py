"""Ranks as threads of one process, to count what each of them does at a start.

They exchange objects through `mcore.parallel` as real ranks do, but nothing else: no tensor.
"""

import threading

from megatron_twotower.mcore import parallel


class Group:
    """A process group that only knows its size and the rank of the thread."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def on_ranks(monkeypatch, count, function):
    """Call `function(rank)` on every rank. Returns the result, or the exception, of each."""
    own, barrier = threading.local(), threading.Barrier(count, timeout=60)
    given, results = [None] * count, [None] * count

    def gather(value):
        given[own.rank] = value
        barrier.wait()
        values = list(given)
        barrier.wait()
        return values

    def called(rank):
        own.rank = rank
        try:
            results[rank] = function(rank)
        except Exception as error:
            results[rank] = error

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: count)
        patch.setattr(parallel, "rank", lambda: own.rank)
        patch.setattr(parallel, "is_main", lambda: own.rank == 0)
        patch.setattr(parallel, "gather_objects", gather)
        patch.setattr(parallel, "broadcast_from_main", lambda value: gather(value)[0])
        threads = [threading.Thread(target=called, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
