"""Environment variables that follow from the configuration of a run."""

import os

from megatron_twotower.config.schema import ParallelConfig


def cuda_environment(parallel: ParallelConfig) -> dict[str, str]:
    """The variables that a process needs before it first uses CUDA.

    With one queue to the GPU, the collective of a tensor-parallel layer starts before the matrix
    product that it overlaps with: Megatron requires it before Blackwell. Without tensor parallelism
    it would only keep gradients and experts waiting for each other.
    """
    one_queue = parallel.tensor > 1 and parallel.card != "b200"
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if one_queue else {}


def set_cuda_environment(parallel: ParallelConfig) -> None:
    """Set these variables, except those that the user has set."""
    for name, value in cuda_environment(parallel).items():
        os.environ.setdefault(name, value)
