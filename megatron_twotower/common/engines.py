"""Who does the work of a command: the processes of this machine, or a Ray cluster.

`ENGINES` is the table of both. Nothing of Ray is imported unless it is chosen.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.workers import Engine, local_engine

LOCAL, RAY = "local", "ray"


@dataclass(frozen=True)
class EngineSettings:
    """Where a command works.

    Attributes:
        engine: "local" or "ray".
        workers: How many workers; None for one for each core of this machine, or with Ray for as
            many as the cluster has room for, now or later.
        address: HOST:PORT of a Ray cluster, or "auto" for that of this machine; None for
            `RAY_ADDRESS`, and without it for a Ray that this process starts and ends.
    """

    engine: str = LOCAL
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine: found {self.engine}, expected one of {', '.join(ENGINES)}")
        require(self.workers is None or self.workers >= 1, f"workers {self.workers}: expected at least 1")
        require(
            self.address is None or self.engine == RAY, f"address: found {self.address}, expected it with engine ray"
        )


@dataclass(frozen=True)
class Needs:
    """What every worker needs.

    Attributes:
        files: Small files that each node must have with the same content as here. They show that
            the file system is shared.
        gpus: GPUs of a worker on Ray; None for one, if the cluster has any.
    """

    files: Sequence[Path] = ()
    gpus: int | None = 0


@contextlib.contextmanager
def _local(settings: EngineSettings, needs: Needs) -> Iterator[Engine]:
    with local_engine(settings.workers or len(os.sched_getaffinity(0))) as engine:
        yield engine


@contextlib.contextmanager
def _ray(settings: EngineSettings, needs: Needs) -> Iterator[Engine]:
    from megatron_twotower.common.ray_engine import ray_engine

    with ray_engine(settings.address, workers=settings.workers, files=needs.files, gpus=needs.gpus) as engine:
        yield engine


ENGINES: Mapping[str, Callable[[EngineSettings, Needs], AbstractContextManager[Engine]]] = {LOCAL: _local, RAY: _ray}
ONE_PROCESS = EngineSettings(workers=1)


def started(settings: EngineSettings, needs: Needs = Needs()) -> AbstractContextManager[Engine]:
    """A context that yields the engine of `settings`. Its workers end with the context.

    Raises:
        UserError: The engine cannot start, or a node lacks something of `needs`.
    """
    return ENGINES[settings.engine](settings, needs)
