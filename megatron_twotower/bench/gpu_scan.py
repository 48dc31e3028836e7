"""The two-stream scan of a step by the clock and by its kernels, against the least memory traffic that it can have."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_twotower.bench import measure, ops
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.common import device
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.ops.scan import chunk_length, chunk_scan, two_stream_scan
from megatron_twotower.plan.layout import GIB

# Scans, or copies, between two looks at the clock, so that the time to start one does not count.
TOGETHER = 10
COPIED_BYTES = {True: 64 * 2**20, False: GIB}


def scan_traffic(model: ModelConfig, *, length: int, block: int, element_bytes: int) -> int:
    """Bytes that a two-stream scan, forward and backward, has to read and write at the least: every input, output and
    gradient once in each pass that needs it, and one state a chunk. The sum of what stands in
    `ops/scan_triton.py`, less what these kernels read twice."""
    x, bc = model.mamba_inner * element_bytes, model.n_groups * model.ssm_state_size * element_bytes
    dt = 4 * model.mamba_num_heads
    state = 4 * model.mamba_inner * model.ssm_state_size // chunk_length(block, preferred=model.chunk_size)
    forward = 3 * x + 3 * bc + 2 * dt + state  # x, clean x, C, B, clean B, both dt and the states; y
    backward = 4 * x + 5 * bc + 3 * dt + state  # the same without y, and y's gradient; gradients of x, B, C and dt
    return length * (forward + backward)


def copy_bytes_per_second(size: int) -> float:
    """What memory gives to a plain copy, reading and writing counted."""
    source = torch.ones(size, dtype=torch.uint8, device=device.device())
    target = torch.empty_like(source)

    def some() -> None:
        for _ in range(TOGETHER):
            target.copy_(source)

    times = measure.in_turns([measure.Case("copy", {"all": some})], repeats=10, budget_seconds=2.0)["copy"]
    return 2 * size * TOGETHER / times.figures()["median_seconds"]


def scan_work(config: RunConfig) -> Callable[[], None]:
    """A two-stream scan, forward and backward, at the widths of the model."""
    dtype = "fp32" if config.train.precision == "fp32" else "bf16"
    model, block = config.model, config.noise.block_size_tokens
    shape = ops.Shape("scan", config.data.sequence_length_tokens, block, dtype, model)
    clean, noisy = (ops.scan_inputs(shape, trained=trained) for trained in (False, True))
    chunk, grad = chunk_length(block, preferred=model.chunk_size), torch.randn_like(noisy[0])
    with torch.no_grad():
        _, states, _ = chunk_scan(*clean, chunk=chunk)
    x, dt, A, B = clean[:4]

    def once() -> None:
        y = two_stream_scan(
            *noisy, clean_x=x, clean_dt=dt, clean_A=A, clean_B=B, states=states, block=block, chunk=chunk
        )
        torch.autograd.grad(y, noisy, grad)

    return once


def measure_scan(config: RunConfig, *, repeats: int, budget_seconds: float) -> dict[str, Any]:
    """The scan by the clock and by its kernels, and the time that its memory traffic takes at the speed of a copy.
    times_bound: None where the profiler saw no kernel."""
    once = scan_work(config)

    def some() -> None:
        for _ in range(TOGETHER):
            once()

    case = measure.Case("scan", {"all": some})
    times = measure.in_turns([case], repeats=repeats, budget_seconds=budget_seconds)["scan"]
    in_kernels = sum(time_by_class(some).seconds.values()) / TOGETHER
    length, block = config.data.sequence_length_tokens, config.noise.block_size_tokens
    traffic = scan_traffic(
        config.model, length=length, block=block, element_bytes=4 if config.train.precision == "fp32" else 2
    )
    speed = copy_bytes_per_second(COPIED_BYTES[device.is_cpu()])
    return {
        "length": length,
        "block": block,
        "seconds": times.figures()["median_seconds"] / TOGETHER,
        "kernel_seconds": in_kernels,
        "traffic_bytes": traffic,
        "copy_bytes_per_second": speed,
        "bound_seconds": traffic / speed,
        "times_bound": in_kernels / (traffic / speed) if in_kernels else None,
    }
