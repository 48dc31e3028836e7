"""A training step at full width on one GPU: next-token and two towers of the same backbone, in one run.

The first layers of the recipe's pattern that fit, by the plan, and everything the trainer's own:
Megatron's schedule, DDP and optimizer, real modules, random weights and tokens, noise drawn in the
step, a rate of zero. One objective after the other, because both do not fit at a time. Beside the
times: operations per second by the formulas of `plan/flops.py`, peak memory against the plan's,
time by class of kernel, the two-stream scan against the memory traffic that it cannot do without,
and, as a ladder, what each setting and each kernel brings.

Without CUDA the same runs on the CPU, at tiny sizes, and says so: such figures show that the
command works.
"""

import contextlib
import dataclasses
import gc
import itertools
import re
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from megatron_twotower.bench import gpu_tables, measure, step
from megatron_twotower.bench.gpu_scan import measure_scan
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.common import device, machine, tables
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import ModelConfig, RunConfig, flatten
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import initial_weights, tensors
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes
from megatron_twotower.ops import dispatch
from megatron_twotower.plan.estimate import Memory, estimate
from megatron_twotower.plan.flops import step_flops
from megatron_twotower.plan.layout import ACCELERATORS, GIB, Accelerator
from megatron_twotower.train.loop import Trainer
from megatron_twotower.types import Batch

OBJECTIVES = {step.AR: "ar", step.TWO_TOWER: "two_tower"}
# Steps before any is counted: the optimizer makes its state at the end of the first.
WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """layers: the first so many of the recipe's pattern, 0 for as many as fit. repeats, budget_seconds: rounds that
    count, of each case. ladder: measure LADDER too, or the rungs of it that are named here."""

    layers: int = 0
    repeats: int = 10
    budget_seconds: float = 30.0
    ladder: bool = False
    rungs: Sequence[str] = ()


QUICK = Settings(repeats=1, budget_seconds=0.0)
QUICK_OVERRIDES = ("model=tiny", "data.sequence_length_tokens=64")


@dataclass(frozen=True)
class Rung:
    """One change to a step as configured: settings, or packages and kernels of `ops.kernels` switched off."""

    name: str
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


LADDER = (
    Rung("no Triton: attention too in torch", without=("triton",)),
    Rung("denoiser's scan in torch", without=("scan",)),
    Rung("convolutions in torch", without=("convolution", "causal-conv1d")),
    Rung("gated norm in torch", without=("gated norm",)),
    Rung("modulation and gate in torch", without=("modulation",)),
    Rung("loss in torch", without=("cross-entropy",)),
    Rung("context tower's scan in torch", without=("mamba-ssm",)),
    Rung("context tower's convolution by our kernel", without=("causal-conv1d",)),
    Rung("M and E recomputed", ("train.recompute_layers=ME",)),
    Rung("all layers recomputed", ("train.recompute_layers=ME*-",)),
    Rung("two sequences a micro-batch", ("data.micro_batch_size=2", "data.global_batch_size=2")),
    Rung("two noise draws a context pass", ("noise.draws_per_context=2",)),
    Rung("a noise level for each block", ("noise.time_per=block",)),
    Rung("blocks of 32 tokens", ("noise.block_size_tokens=32",)),
    Rung("router in fp64", ("train.router_dtype=fp64",)),
    Rung("Megatron's own layers", ("train.transformer_impl=local",)),
    Rung("FP8, a scale a tensor", ("train.precision=fp8_current",)),
    Rung("FP8, a scale a block", ("train.precision=fp8_blockwise",)),
    Rung("FP8, scales of the steps before", ("train.precision=fp8_delayed",)),
    Rung("fp32", ("train.precision=fp32",)),
)


# --- what is measured ---------------------------------------------------------------------------------------------


def random_on_device(model: ModelConfig, *, seed: int) -> tensors.TensorSource:
    """A fresh NemotronH whose matrices are drawn where they are needed, each keyed by its name: billions of numbers in
    no time. They are not those of `convert.random_backbone`, which are the same on every device."""
    shapes, small = hf_shapes(backbone_entries(model), model), initial_weights.random_backbone(model, seed=seed)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) != 2:
            return small(name)
        generator = torch.Generator(device.device()).manual_seed(seed + zlib.crc32(name.encode()))
        return model.initializer_range * torch.randn(shape, generator=generator, device=device.device())

    return source


def planned(config: RunConfig) -> Memory:
    """Memory of a two-tower step on one rank, as `twotower plan` has it."""
    return estimate(dataclasses.replace(config, objective="two_tower"), ranks=1).memory


def device_bytes() -> int:
    return psutil.virtual_memory().available if device.is_cpu() else torch.cuda.mem_get_info()[1]


def cut(config: RunConfig, layers: int) -> RunConfig:
    """The configuration with the first layers of its pattern alone."""
    pattern = config.model.hybrid_override_pattern[:layers]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hybrid_override_pattern=pattern))


def fitting(config: RunConfig, *, layers: int, memory_bytes: int) -> RunConfig:
    """So many layers, or, of 0, as many as the plan says fit.

    Raises:
        UserError: more than the pattern has, or not even one fits.
    """
    most = config.model.num_layers
    if layers > most:
        raise UserError(f"--layers: found {layers}, expected at most the {most} of model.hybrid_override_pattern")
    if layers:
        return cut(config, layers)
    fit = itertools.takewhile(lambda count: planned(cut(config, count)).total <= memory_bytes, range(1, most + 1))
    count = max(fit, default=0)
    if count:
        return cut(config, count)
    needed, found = planned(cut(config, 1)).total / GIB, memory_bytes / GIB
    raise UserError(f"memory: found {found:.1f} GiB, expected {needed:.1f} for one layer (--quick is tiny)")


def card_named(name: str) -> Accelerator | None:
    """What is known of an accelerator by the name that its driver gives, for its peak; None where nothing is. Cards of
    less power and parts of a card have lower peaks than the data sheet's."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"pcie", "nvl", "mig"}:
        return None
    return next((found for key, found in ACCELERATORS.items() if key in words), None)


def card() -> Accelerator | None:
    return None if device.is_cpu() else card_named(torch.cuda.get_device_name())


def free() -> None:
    """Give back what nobody holds any more: wrappers and their hooks hold each other."""
    gc.collect()
    torch.cuda.empty_cache()


def look_at(
    config: RunConfig, name: str, groups: ProcessGroupCollection, look: Callable[[Trainer, Batch, int], dict[str, Any]]
) -> dict[str, Any]:
    """What `look` finds of an objective's trainer, warmed up, its micro-batch, and the peak of memory from nothing to a
    whole step. Nothing of the trainer stays."""
    config = dataclasses.replace(config, objective=OBJECTIVES[name])
    validate(config, world_size=parallel.world_size())
    batch = step.random_batch(config, length=config.data.sequence_length_tokens)
    held: list[Trainer] = []

    def work() -> None:
        held.append(step.trainer_of(config, groups, backbone_source=random_on_device(config.model, seed=config.seed)))
        for _ in range(WARM_UP):
            step.step_case(name, held[0], batch).run()

    free()  # after a step that ran out of memory its frames are gone only now
    try:
        peak = measure.extra_peak_bytes(work)
        return look(held[0], batch, peak)
    finally:
        while held:
            held.pop().model.release()
        free()


def busiest(parts: Trainer) -> float | None:
    """Tokens of the busiest expert over those of the average one, in the layer where that is most."""
    counts = parts.model.expert_tokens
    return None if counts is None else (counts.max(dim=1).values / counts.mean(dim=1)).max().item()


def step_row(config: RunConfig, name: str, batch: Batch, times: measure.Times, peak: int) -> dict[str, Any]:
    """Figures of one objective. `flops`: of the model, per token, and executed, with what is recomputed."""
    found, objective = times.figures(), OBJECTIVES[name]
    flops, tokens = step_flops(config, objective=objective), batch.tokens.numel()
    seconds, known = found["stage_seconds"][step.FORWARD_BACKWARD], card()
    memory = planned(config)
    return {
        "case": name,
        "tokens": tokens,
        "seconds": seconds,
        "update_seconds": found["stage_seconds"][step.UPDATE],
        "rounds": found["rounds"],
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_update": tokens / found["median_seconds"],
        "flops_per_token": {"model": flops.model, "executed": flops.executed},
        "model_tflops": flops.model * tokens / seconds / 1e12,
        "executed_tflops": flops.executed * tokens / seconds / 1e12,
        "utilisation": None if known is None else flops.executed * tokens / seconds / known.bf16_flops,
        "peak_bytes": peak,
        "planned_bytes": memory.total - memory.reserve if objective == "two_tower" else None,
    }


def measure_side(config: RunConfig, name: str, wanted: Settings, groups: ProcessGroupCollection) -> dict[str, Any]:
    """One objective: times, memory, and where the time goes."""

    def look(parts: Trainer, batch: Batch, peak: int) -> dict[str, Any]:
        case = step.step_case(name, parts, batch)
        times = measure.in_turns([case], repeats=wanted.repeats, budget_seconds=wanted.budget_seconds)[name]
        by_class = time_by_class(case.run)
        row = step_row(config, name, batch, times, peak) | {"busiest_expert": busiest(parts)}
        return row | {"classes": dataclasses.asdict(by_class) | {"busy": by_class.busy}}

    return look_at(config, name, groups, look)


def measure_rung(config: RunConfig, rung: Rung, wanted: Settings, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Seconds, tokens and peak memory of both objectives with one change; or why there are none: it was `skipped`, or
    it `failed`, which is no reason to lose what the others bring."""
    row: dict[str, Any] = {"rung": rung.name, "overrides": list(rung.overrides), "without": list(rung.without)}
    row["failed"] = None
    needed = ("triton" if name in dispatch.TRITON_KERNELS else name for name in rung.without)
    missing = {package: reason for package in needed if (reason := dispatch.unavailable(package))}
    if len(missing) == len(rung.without) > 0:
        return row | {"skipped": "; ".join(f"{package}: {reason}" for package, reason in missing.items())}

    def look(parts: Trainer, batch: Batch, peak: int) -> dict[str, Any]:
        case = step.step_case("", parts, batch)
        times = measure.in_turns([case], repeats=wanted.repeats, budget_seconds=wanted.budget_seconds)[""]
        seconds = times.figures()["stage_seconds"][step.FORWARD_BACKWARD]
        return {"seconds": seconds, "tokens": batch.tokens.numel(), "peak_bytes": peak}

    cases: dict[str, Any] = dict.fromkeys(OBJECTIVES)
    for name in OBJECTIVES:
        try:
            with dispatch.without(*rung.without), contextlib.suppress(torch.OutOfMemoryError):
                cases[name] = look_at(config, name, groups, look)
        except UserError as error:  # what only shows when a model is built
            return row | {"skipped": str(error)}
        except Exception as error:  # of kernels and compilers, anything
            reason = f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return row | {"skipped": None, "failed": reason, "traceback": traceback.format_exc()}
    return row | {"skipped": None, "cases": cases}


def changed(config: RunConfig, rung: Rung, *, recipe: str, overrides: Sequence[str]) -> RunConfig | str:
    """The configuration of a rung, with the layers of the other; or why it is none."""
    after = load_recipe(recipe, [*overrides, *rung.overrides])
    after = dataclasses.replace(after, model=config.model, parallel=config.parallel)
    if rung.overrides and dict(flatten(after)) == dict(flatten(config)):
        return "configured so"
    try:
        for objective in OBJECTIVES.values():
            validate(dataclasses.replace(after, objective=objective), world_size=parallel.world_size())
    except UserError as error:
        return str(error)
    return after


# --- all of it ----------------------------------------------------------------------------------------------------


def rungs_of(wanted: Settings) -> list[Rung]:
    """
    Raises:
        UserError: a name that no rung has.
    """
    known = {rung.name: rung for rung in LADDER}
    unknown = sorted(set(wanted.rungs) - known.keys())
    if unknown:
        raise UserError(f"--rungs: found {unknown[0]!r}, expected some of {'; '.join(known)}")
    return [known[name] for name in wanted.rungs] or (list(LADDER) if wanted.ladder else [])


def measure_all(
    config: RunConfig,
    wanted: Settings,
    groups: ProcessGroupCollection,
    *,
    recipe: str,
    overrides: Sequence[str],
    advance: Callable[[str], Any],
    keep: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """`steps`, `scan` where there is one, and `ladder`. `advance` is told what comes next, and `keep` is given all that
    was found so far, first when both steps were measured: a ladder takes long, and may be ended."""
    figures: dict[str, Any] = {"steps": [], "scan": None, "ladder": []}
    for name in OBJECTIVES:
        advance(name)
        figures["steps"].append(measure_side(config, name, wanted, groups))
    ar, two = figures["steps"]
    figures["two_tower_over_ar"] = two["seconds"] / ar["seconds"]
    figures["two_tower_over_ar_by_formula"] = two["flops_per_token"]["model"] / ar["flops_per_token"]["model"]
    if "M" in config.model.hybrid_override_pattern:
        advance("two-stream scan")
        figures["scan"] = measure_scan(config, repeats=wanted.repeats, budget_seconds=wanted.budget_seconds)
    keep(figures)
    for rung in rungs_of(wanted):
        advance(rung.name)
        other = changed(config, rung, recipe=recipe, overrides=overrides)
        if isinstance(other, str):
            figures["ladder"].append({"rung": rung.name, "skipped": other, "failed": None})
        else:
            figures["ladder"].append(measure_rung(other, rung, wanted, groups))
        keep(figures)
    return figures


def facts_of(config: RunConfig, wanted: Settings, *, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What stands beside the figures. rungs: of the ladder, to be measured."""
    known = card()
    return {
        "machine": machine.machine(),
        "on_a_gpu": not device.is_cpu(),
        "recipe": recipe,
        "overrides": list(overrides),
        "pattern": config.model.hybrid_override_pattern,
        "precision": config.train.precision,
        "length": config.data.sequence_length_tokens,
        "block": config.noise.block_size_tokens,
        "experts": config.model.n_routed_experts,
        "recompute": config.train.recompute_layers,
        "peak_flops": None if known is None else known.bf16_flops,
        "packages": {name: dispatch.unavailable(name) or "serves" for name in dispatch.MODULES},
        "rungs": [rung.name for rung in rungs_of(wanted)],
    }


def run(
    output: Path,
    *,
    recipe: str = "bench_gpu",
    overrides: Sequence[str] = (),
    wanted: Settings = Settings(),
    quick: bool = False,
    console: Console | None = None,
) -> bool:
    """Measure, print tables, and write `gpu.json` to `output`, anew after every rung. Whether no rung failed."""
    console = console or tables.wide_console()
    if quick:
        wanted = dataclasses.replace(QUICK, layers=wanted.layers, ladder=wanted.ladder, rungs=wanted.rungs)
        overrides = [*QUICK_OVERRIDES, *overrides]
    rungs_of(wanted)
    config = load_recipe(recipe, overrides)
    config = fitting(config, layers=wanted.layers, memory_bytes=device_bytes())
    groups = parallel.initialise(config)
    try:
        facts = facts_of(config, wanted, recipe=recipe, overrides=overrides)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=None)
            figures = measure_all(
                config,
                wanted,
                groups,
                recipe=recipe,
                overrides=overrides,
                advance=lambda what: progress.update(task, description=what),
                keep=lambda found: measure.write_files(output, "gpu", facts | found, None),
            )
    finally:
        parallel.shutdown()
    for made in gpu_tables.tables(facts | figures):
        console.print(made)
    console.print(machine.machine_line(facts["machine"]), highlight=False)
    console.print(f"{output / 'gpu.json'}", highlight=False)
    return not any(rung["failed"] for rung in figures["ladder"])
