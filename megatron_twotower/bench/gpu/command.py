"""The command `bench gpu`: options, the choice of layers, and all measurements."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from megatron_twotower.bench import results as bench_results
from megatron_twotower.bench.gpu.ladder import Rung, measure_rung, rung_config, select_rungs
from megatron_twotower.bench.gpu.scan import measure_scan
from megatron_twotower.bench.gpu.steps import OBJECTIVES, measure_objective, peak_flops, planned_memory
from megatron_twotower.bench.gpu.tables import gpu_tables
from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import wide_console
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.ops import dispatch
from megatron_twotower.plan.layout import GIB


@dataclass(frozen=True)
class GpuOptions:
    """What to measure.

    Attributes:
        layers: The number of first layers of the recipe's pattern; 0 for as many as fit.
        repeats: See `measure.time_cases`; for each case.
        budget_seconds: See `measure.time_cases`; for each case.
        ladder: Measure all of `LADDER` too.
        rungs: Measure these rungs of the ladder, by name.
    """

    layers: int = 0
    repeats: int = 10
    budget_seconds: float = 30.0
    ladder: bool = False
    rungs: Sequence[str] = ()


QUICK = GpuOptions(repeats=1, budget_seconds=0.0)
QUICK_OVERRIDES = ("model=tiny", "data.sequence_length_tokens=64")


def device_bytes() -> int:
    """Memory of the device; on a CPU what is available."""
    return psutil.virtual_memory().available if device.is_cpu() else torch.cuda.mem_get_info()[1]


def first_layers(config: RunConfig, count: int) -> RunConfig:
    """The configuration with only the first layers of its pattern."""
    pattern = config.model.hybrid_override_pattern[:count]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hybrid_override_pattern=pattern))


def choose_layers(config: RunConfig, *, layers: int, memory_bytes: int) -> RunConfig:
    """The configuration with its first `layers` layers, or for 0 with as many as fit by the plan.

    Raises:
        UserError: The pattern has fewer layers, or not even one layer fits.
    """
    most = config.model.num_layers
    if layers > most:
        raise UserError(f"--layers: found {layers}, expected at most the {most} of model.hybrid_override_pattern")
    if layers:
        return first_layers(config, layers)

    def fits(count: int) -> bool:
        return planned_memory(first_layers(config, count)).total <= memory_bytes

    count = max(itertools.takewhile(fits, range(1, most + 1)), default=0)
    if count:
        return first_layers(config, count)
    needed, found = planned_memory(first_layers(config, 1)).total / GIB, memory_bytes / GIB
    raise UserError(f"memory: found {found:.1f} GiB, expected {needed:.1f} for one layer (--quick is tiny)")


def measure_all(
    config: RunConfig,
    options: GpuOptions,
    groups: ProcessGroupCollection,
    *,
    rungs: Sequence[Rung],
    recipe: str,
    overrides: Sequence[str],
    announce: Callable[[str], Any],
    store: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """Measure `steps`, `scan` (if the pattern has Mamba layers) and `ladder`.

    Args:
        announce: Called with what is measured next.
        store: Called with all results so far, first when both steps are measured and then after
            each rung: a ladder takes long and may be interrupted.
    """
    repeats, budget = options.repeats, options.budget_seconds
    results: dict[str, Any] = {"steps": [], "scan": None, "ladder": []}
    for case in OBJECTIVES:
        announce(case)
        results["steps"].append(measure_objective(config, case, groups, repeats=repeats, budget_seconds=budget))
    ar, two_tower = results["steps"]
    results["two_tower_over_ar"] = two_tower["seconds"] / ar["seconds"]
    results["two_tower_over_ar_by_formula"] = two_tower["flops_per_token"]["model"] / ar["flops_per_token"]["model"]
    if "M" in config.model.hybrid_override_pattern:
        announce("two-stream scan")
        results["scan"] = measure_scan(config, repeats=repeats, budget_seconds=budget)
    store(results)
    for rung in rungs:
        announce(rung.name)
        changed = rung_config(config, rung, recipe=recipe, overrides=overrides)
        if isinstance(changed, str):
            row: dict[str, Any] = {"rung": rung.name, "skipped": changed, "failed": None}
        else:
            row = measure_rung(changed, rung, groups, repeats=repeats, budget_seconds=budget)
        results["ladder"].append(row)
        store(results)
    return results


def facts_of(config: RunConfig, *, rungs: Sequence[Rung], recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What is written with the results: the machine, the configuration and the selected rungs."""
    return {
        "machine": machine(),
        "on_a_gpu": not device.is_cpu(),
        "recipe": recipe,
        "overrides": list(overrides),
        "pattern": config.model.hybrid_override_pattern,
        "precision": config.train.precision,
        "length": config.data.sequence_length_tokens,
        "block": config.noise.block_size_tokens,
        "experts": config.model.n_routed_experts,
        "recompute": config.train.recompute_layers,
        "peak_flops": peak_flops(),
        "packages": {name: dispatch.unavailable(name) or "serves" for name in dispatch.MODULES},
        "rungs": [rung.name for rung in rungs],
    }


def run(
    output: Path,
    *,
    recipe: str = "bench_gpu",
    overrides: Sequence[str] = (),
    options: GpuOptions = GpuOptions(),
    quick: bool = False,
    console: Console | None = None,
) -> bool:
    """Measure, print tables, and write `gpu.json` to `output`, also after every rung.

    Args:
        quick: Tiny sizes, which only show that the command works.

    Returns:
        Whether no rung failed.
    """
    console = console or wide_console()
    if quick:
        options = dataclasses.replace(QUICK, layers=options.layers, ladder=options.ladder, rungs=options.rungs)
        overrides = [*QUICK_OVERRIDES, *overrides]
    rungs = select_rungs(options.rungs, full=options.ladder)
    config = choose_layers(load_recipe(recipe, overrides), layers=options.layers, memory_bytes=device_bytes())
    groups = parallel.initialise(config)
    try:
        facts = facts_of(config, rungs=rungs, recipe=recipe, overrides=overrides)
        with console.status("") as status:
            results = measure_all(
                config,
                options,
                groups,
                rungs=rungs,
                recipe=recipe,
                overrides=overrides,
                announce=status.update,
                store=lambda found: bench_results.write_results(output, "gpu", facts | found),
            )
    finally:
        parallel.shutdown()
    results = facts | results
    bench_results.report(output, "gpu", results, tables=gpu_tables(results), console=console)
    return not any(rung["failed"] for rung in results["ladder"])
