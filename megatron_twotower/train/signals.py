"""Signals that ask a run to stop."""

import signal
from types import FrameType

from megatron_twotower.mcore import parallel


class StopSignal:
    """Remembers SIGTERM, and SIGUSR1, which Slurm sends before the time of a job ends."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def __call__(self) -> bool:
        """Return whether any rank received a signal; all ranks call it together."""
        return parallel.any_rank(self.received is not None)
