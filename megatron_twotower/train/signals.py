"""Signals that ask a run to stop."""

import signal
from types import FrameType

from megatron_twotower.mcore import parallel


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, which Slurm sends ahead of the end of a job's time."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def __call__(self) -> bool:
        return parallel.any_rank(self.received is not None)
