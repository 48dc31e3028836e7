"""Ranks as threads of this process, with collectives that pass Python objects between them.

For code that communicates only by the functions of `mcore.parallel` named in `ThreadRanks`.
"""

import socket
import threading

from megatron_twotower.mcore import parallel


class ThreadRanks:
    """A number of ranks, `per_node` of them on each node.

    Attributes:
        collectives: The name and the value of each collective of the first rank.
    """

    def __init__(self, monkeypatch, count, *, per_node=1):
        self.count, self.per_node, self.collectives = count, per_node, []
        self._here = threading.local()
        self._values, self._barrier = [None] * count, threading.Barrier(count, timeout=60)
        for function in (self.world_size, self.rank, self.is_main, self.gather_objects, self.broadcast_from_main):
            monkeypatch.setattr(parallel, function.__name__, function)
        monkeypatch.setattr(socket, "gethostname", lambda: f"node{self.rank() // per_node}")

    def world_size(self):
        return self.count

    def rank(self):
        return self._here.rank

    def is_main(self):
        return self._here.rank == 0

    def first_of_node(self):
        return self._here.rank % self.per_node == 0

    def gather_objects(self, value):
        return self._all("gather", value)

    def broadcast_from_main(self, value):
        return self._all("broadcast", value)[0]

    def _all(self, name, value):
        if self.is_main():
            self.collectives.append((name, value))
        self._values[self.rank()] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, function):
        """Call a function with the number of each rank. Returns what each returned or raised."""
        results = [None] * self.count

        def rank(number):
            self._here.rank = number
            try:
                results[number] = function(number)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
