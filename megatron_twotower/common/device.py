"""The device that this process computes on: its CUDA device, or the CPU."""

import torch

# Where tensors are without CUDA. Tests put a pretended device in its place.
CPU = torch.device("cpu")


def is_cpu() -> bool:
    """True where training runs on the CPU: no CUDA device is present."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its current CUDA device, or the host."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """The `torch.distributed` backend that goes with `device()`."""
    return "gloo" if is_cpu() else "nccl"
