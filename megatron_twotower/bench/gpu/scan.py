"""The two-stream scan of a step: its time, and a lower bound from its memory traffic."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_twotower.bench import measure, ops
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.common import device
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length, chunk_scan, two_stream_scan
from megatron_twotower.plan.layout import GIB

# Scans, or copies, between two readings of the clock, so that the time to start one does not count.
CALLS_PER_READING = 10
CPU_COPY_BYTES, GPU_COPY_BYTES = 64 * 2**20, GIB


def scan_traffic(model: ModelConfig, *, length: int, block: int, element_bytes: int) -> int:
    """The least number of bytes that a two-stream scan reads and writes, forward and backward.

    Every input, output and gradient counts once in each pass that needs it, and one state per
    chunk. This is the traffic that `ops/triton/scan.py` states for its kernels, less what these
    kernels read twice.
    """
    x, bc = model.mamba_inner * element_bytes, model.n_groups * model.ssm_state_size * element_bytes
    dt = 4 * model.mamba_num_heads
    state = 4 * model.mamba_inner * model.ssm_state_size // chunk_length(block, preferred=model.chunk_size)
    forward = 3 * x + 3 * bc + 2 * dt + state  # x, clean x, C, B, clean B, both dt and the states; y
    backward = 4 * x + 5 * bc + 3 * dt + state  # the same without y, and y's gradient; gradients of x, B, C and dt
    return length * (forward + backward)


def _repeated(work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS_PER_READING):
            work()

    return run


def _median_seconds(work: Callable[[], Any], *, repeats: int, budget_seconds: float) -> float:
    """Median seconds of one call of the work."""
    case = measure.TimedCase("", {"all": _repeated(work)})
    times = measure.time_cases([case], repeats=repeats, budget_seconds=budget_seconds)[""]
    return times.summary()["median_seconds"] / CALLS_PER_READING


def copy_bytes_per_second(size: int) -> float:
    """The memory bandwidth of a plain copy of `size` bytes; reading and writing both count."""
    source = torch.ones(size, dtype=torch.uint8, device=device.device())
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), repeats=10, budget_seconds=2.0)


def scan_work(config: RunConfig) -> Callable[[], None]:
    """A two-stream scan, forward and backward, at the widths of the model."""
    dtype = "fp32" if config.train.precision == "fp32" else "bf16"
    model, block = config.model, config.noise.block_size_tokens
    shape = ops.OperationShape("scan", config.data.sequence_length_tokens, block, dtype, model)
    clean, noisy = (ops.scan_inputs(shape, trained=trained) for trained in (False, True))
    chunk, grad = chunk_length(block, preferred=model.chunk_size), torch.randn_like(noisy[0])
    with torch.no_grad():
        _, states, _ = chunk_scan(*clean, chunk=chunk)
    x, dt, A, B = clean[:4]

    def scan() -> None:
        y = two_stream_scan(
            *noisy, clean_x=x, clean_dt=dt, clean_A=A, clean_B=B, states=states, block=block, chunk=chunk
        )
        torch.autograd.grad(y, noisy, grad)

    return scan


def measure_scan(config: RunConfig, *, repeats: int, budget_seconds: float) -> dict[str, Any]:
    """The time of the scan and of its kernels, and of its traffic at the speed of a copy.

    `times_bound`, the time of the kernels over that bound, is `None` if the profiler saw no kernel.

    Args:
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`.
    """
    scan = scan_work(config)
    seconds = _median_seconds(scan, repeats=repeats, budget_seconds=budget_seconds)
    kernel_seconds = sum(time_by_class(_repeated(scan)).seconds.values()) / CALLS_PER_READING
    length, block = config.data.sequence_length_tokens, config.noise.block_size_tokens
    element_bytes = 4 if config.train.precision == "fp32" else 2
    traffic = scan_traffic(config.model, length=length, block=block, element_bytes=element_bytes)
    speed = copy_bytes_per_second(CPU_COPY_BYTES if device.is_cpu() else GPU_COPY_BYTES)
    bound = traffic / speed
    return {
        "length": length,
        "block": block,
        "seconds": seconds,
        "kernel_seconds": kernel_seconds,
        "traffic_bytes": traffic,
        "copy_bytes_per_second": speed,
        "bound_seconds": bound,
        "times_bound": kernel_seconds / bound if kernel_seconds else None,
    }
