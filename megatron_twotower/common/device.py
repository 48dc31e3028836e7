"""The device that this process computes on: its CUDA device, or the CPU."""

import torch

# The device without CUDA. Tests replace it with a pretended device.
CPU = torch.device("cpu")


def is_cpu() -> bool:
    """Whether this process computes on the CPU: no CUDA device is present."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The current CUDA device of this process, or the CPU."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """The `torch.distributed` backend for tensors on `device()`."""
    return "gloo" if is_cpu() else "nccl"
