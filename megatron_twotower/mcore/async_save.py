"""Megatron's asynchronous save of a distributed checkpoint, as steps that the caller runs itself.

Megatron returns an `AsyncRequest` and normally forks a process that writes (megatron-core 0.16.1,
dist_checkpointing/strategies/async_utils.py and filesystem_async.py). That process survives a
training process that is killed, and then writes into the folder of the next run. `AsyncSave` takes
the request apart, so that a thread of the training process can write instead. No other module knows
what a request contains.
"""

import contextlib
import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.releases import installed_release

# Every release reads the common state, which is the same on all ranks, from this file. 0.16 writes
# it, later releases do not: `prepare_save` does it for them.
COMMON_FILE = "common.pt"
# What the first rank writes besides the data files.
INDEX_FILES = (".metadata", "metadata.json", COMMON_FILE)


class AsyncSave:
    """A save that Megatron has prepared.

    The caller runs `copy_to_host`, `write` and `finalise` in this order.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        if request.async_fn is not None:
            _forget(request.async_fn_args[2])

    def copy_to_host(self) -> None:
        """Copy this rank's CUDA tensors to host memory. CPU tensors are not copied."""
        if self._request.preload_fn is not None:
            buckets = self._request.preload_fn()
            self._request = self._request._replace(async_fn_args=(None, buckets, self._request.async_fn_args[2]))

    @property
    def files(self) -> list[Path]:
        """The data files of this rank, after `copy_to_host`; none if it has nothing to write."""
        return [] if self._request.async_fn is None else [Path(file) for file, _, _ in self._request.async_fn_args[1]]

    def write(self) -> list[Path]:
        """Write this rank's data files. This may run in another thread.

        Returns:
            The files; none if this rank has nothing to write.

        Raises:
            Exception: The error that Megatron's writer reports, such as a full disk.
        """
        if self._request.async_fn is None:
            return []
        transforms, _ = self._request.async_fn.args
        _, buckets, results = self._request.async_fn_args
        written: dict[int, Any] = {}
        for number, bucket in enumerate(buckets):
            outcome: queue.Queue[Any] = queue.Queue()
            busy: queue.Queue[int] = queue.Queue()
            busy.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcome, busy, True)
            _, found = outcome.get()
            if isinstance(found, Exception):
                raise found
            written[number] = found
        results.put(written)
        return self.files

    def finalise(self) -> None:
        """Write the index when every rank has written its files. All ranks call this."""
        for function in self._request.finalize_fns:
            function()


def _forget(results: "queue.Queue[Any]") -> None:
    """Empty the queue of results, which all saves of a process share.

    A run that ended with an error has left those of a save that it did not finalise. The next save
    would take them for its own.
    """
    with contextlib.suppress(queue.Empty):
        while True:
            results.get_nowait()


def prepare_save(
    sharded_state: dict[str, Any], folder: Path, *, common: dict[str, Any], validate: bool = True
) -> AsyncSave:
    """Agree with all ranks on which rank writes what into an existing empty folder.

    All ranks call this.

    Args:
        sharded_state: This rank's `ShardedTensor` and `ShardedObject`, under unique names.
        folder: The folder of the checkpoint.
        common: What is the same on all ranks and not sharded.
        validate: Whether to check that the shards of all ranks make up every tensor once. Rank 0
            gathers the metadata of all shards for this, which takes seconds on many ranks.
    """
    request = dist_checkpointing.save(
        sharded_state | common,
        str(folder),
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        async_sharded_save=True,
        validate_access_integrity=validate,
        **installed_release().save_arguments,
    )
    if parallel.is_main() and not (folder / COMMON_FILE).exists():
        torch.save(common, folder / COMMON_FILE)
    return AsyncSave(request)
