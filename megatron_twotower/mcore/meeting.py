"""Where the ranks of a job meet, and how they wait for each other without a collective."""

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_twotower.common.errors import require

# The store of this job, and how many runs have started on it.
_job_store: dist.Store | None = None
_runs_started = 0


def place() -> dict[str, Any]:
    """Return rank, world size and a store for the next run of this process.

    Every run of a sweep has its own part of the store: on the keys of the previous run its ranks
    would read addresses that nobody answers at. All ranks start the same runs in the same order.

    Raises:
        UserError: torchrun may start ranks again, on a store with the addresses of those that
            ended: they would never meet.
    """
    global _job_store, _runs_started
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    require(
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or restarts == "0",
        f"torchrun --max-restarts: found {restarts} with a store that ranks and agents share, on which ranks that "
        "start again do not meet; expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (launch/torchrun.sh sets it)",
    )
    if _job_store is None:
        _job_store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=30)))
    _runs_started += 1
    return {
        "store": dist.PrefixStore(f"run-{_runs_started}", _job_store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def wait_for_all(name: str) -> None:
    """Wait until every rank has called this with the same name, for as long as it takes.

    A collective has a time limit. Before one whose ranks arrive at very different times, such as
    after each has written its part of a checkpoint, they wait here.
    """
    if dist.get_world_size() == 1 or dist.get_backend() == "fake":  # of `pretend_rank`
        return
    store: Any = dist.distributed_c10d._get_default_store()
    arrived, pause = store.add(name, 1), 0.001
    while arrived < dist.get_world_size():
        time.sleep(pause)
        arrived, pause = store.add(name, 0), min(2 * pause, 1.0)
