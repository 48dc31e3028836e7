"""One objective on one GPU: times, memory, and time by class of kernel."""

import dataclasses
import gc
import re
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_twotower.bench import measure, training_steps
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.bench.training_steps import AR, FORWARD_BACKWARD, TWO_TOWER, UPDATE
from megatron_twotower.common import device
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import initial_weights, tensors
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes
from megatron_twotower.plan.estimate import Memory, estimate
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.plan.layout import ACCELERATORS, Accelerator
from megatron_twotower.train.loop import Trainer
from megatron_twotower.types import Batch

# The objective of each case.
OBJECTIVES = {AR: "ar", TWO_TOWER: "two_tower"}
# Steps before any is counted. The optimizer allocates its state at the end of the first.
WARM_UP_STEPS = 2


def known_accelerator(name: str) -> Accelerator | None:
    """The data sheet of an accelerator by the name that its driver reports; `None` if unknown.

    PCIe and NVL variants and MIG partitions are unknown: their peaks are below the data sheet's.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"pcie", "nvl", "mig"}:
        return None
    return next((found for key, found in ACCELERATORS.items() if key in words), None)


def peak_flops() -> float | None:
    """The bf16 peak of this process's accelerator in FLOP/s; `None` on a CPU or if unknown."""
    known = None if device.is_cpu() else known_accelerator(torch.cuda.get_device_name())
    return None if known is None else known.bf16_flops


def planned_memory(config: RunConfig) -> Memory:
    """The memory of a two-tower step on one rank, as `twotower plan` estimates it."""
    return estimate(dataclasses.replace(config, objective="two_tower"), ranks=1).memory


def random_on_device(model: ModelConfig, *, seed: int) -> tensors.TensorSource:
    """Random NemotronH weights whose matrices are drawn on the device, keyed by name.

    This is fast for billions of numbers. The numbers differ from those of
    `initial_weights.random_backbone`, which are the same on every device.
    """
    shapes, on_cpu = hf_shapes(backbone_entries(model), model), initial_weights.random_backbone(model, seed=seed)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) != 2:
            return on_cpu(name)
        generator = torch.Generator(device.device()).manual_seed(seed + zlib.crc32(name.encode()))
        return model.initializer_range * torch.randn(shape, generator=generator, device=device.device())

    return source


def release_memory() -> None:
    """Free unreachable tensors.

    DDP wrappers and their hooks refer to each other, so only the garbage collector frees them.
    """
    gc.collect()
    torch.cuda.empty_cache()


def measure_trainer(
    config: RunConfig,
    case: str,
    groups: ProcessGroupCollection,
    measurement: Callable[[Trainer, Batch, int], dict[str, Any]],
) -> dict[str, Any]:
    """Build and warm up the trainer of a case, measure it, and free it.

    Args:
        case: A key of `OBJECTIVES`.
        measurement: Called with the trainer, a micro-batch, and the peak memory in bytes of
            building the trainer and of `WARM_UP_STEPS` steps.

    Returns:
        The result of `measurement`.
    """
    config = dataclasses.replace(config, objective=OBJECTIVES[case])
    validate(config, world_size=parallel.world_size())
    batch = training_steps.random_batch(config, length=config.data.sequence_length_tokens)
    trainers: list[Trainer] = []

    def build_and_warm_up() -> None:
        source = random_on_device(config.model, seed=config.seed)
        trainers.append(training_steps.build_trainer(config, groups, backbone_source=source))
        for _ in range(WARM_UP_STEPS):
            training_steps.step_case(case, trainers[0], batch).run()

    release_memory()  # the frames of an earlier step that ran out of memory are gone only now
    try:
        peak = measure.extra_peak_bytes(build_and_warm_up)
        return measurement(trainers[0], batch, peak)
    finally:
        while trainers:
            trainers.pop().model.release()
        release_memory()


def busiest_expert(trainer: Trainer) -> float | None:
    """Tokens of the busiest expert over those of the average one, in the most unbalanced layer."""
    counts = trainer.model.expert_tokens
    return None if counts is None else (counts.max(dim=1).values / counts.mean(dim=1)).max().item()


def step_row(config: RunConfig, case: str, batch: Batch, times: measure.CaseTimes, peak: int) -> dict[str, Any]:
    """The row of one objective.

    `flops_per_token` has the model's operations, and the executed ones, which include recompute.
    """
    summary, objective = times.summary(), OBJECTIVES[case]
    flops, tokens = step_flops(config, objective=objective), batch.tokens.numel()
    seconds, peak_rate = summary["stage_seconds"][FORWARD_BACKWARD], peak_flops()
    memory = planned_memory(config)
    return {
        "case": case,
        "tokens": tokens,
        "seconds": seconds,
        "update_seconds": summary["stage_seconds"][UPDATE],
        "rounds": summary["rounds"],
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_update": tokens / summary["median_seconds"],
        "flops_per_token": {"model": flops.model, "executed": flops.executed},
        "model_tflops": flops.model * tokens / seconds / 1e12,
        "executed_tflops": flops.executed * tokens / seconds / 1e12,
        "utilisation": None if peak_rate is None else flops.executed * tokens / seconds / peak_rate,
        "peak_bytes": peak,
        "planned_bytes": memory.total - memory.reserve if objective == "two_tower" else None,
    }


def measure_objective(
    config: RunConfig, case: str, groups: ProcessGroupCollection, *, repeats: int, budget_seconds: float
) -> dict[str, Any]:
    """The row of one objective, with its time by class of kernel.

    Args:
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`.
    """

    def measurement(trainer: Trainer, batch: Batch, peak: int) -> dict[str, Any]:
        step = training_steps.step_case(case, trainer, batch)
        times = measure.time_cases([step], repeats=repeats, budget_seconds=budget_seconds)[case]
        by_class = time_by_class(step.run)
        row = step_row(config, case, batch, times, peak) | {"busiest_expert": busiest_expert(trainer)}
        return row | {"classes": dataclasses.asdict(by_class) | {"busy": by_class.busy}}

    return measure_trainer(config, case, groups, measurement)
