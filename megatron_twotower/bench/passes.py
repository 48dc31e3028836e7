"""The command `bench passes`: a forward pass of the denoiser for a block against an AR step.

Mask diffusion is faster than AR if it commits more tokens per pass than a pass costs AR steps. The
results say how many that are, and where the time goes.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from megatron_twotower.bench import measure
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.bench.results import report
from megatron_twotower.common import device as common_device
from megatron_twotower.common.errors import require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.generate.engine import default_devices, load
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

PASS, STEP, READ = "denoiser pass", "AR step", "read of a block"
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PROFILED_RUNS = 10

# One unit of generation, after the text in the cache.
Work = Callable[[ContextCache], Any]


def generation_work(model: Model, *, block_size: int, mask_id: int) -> dict[str, Work]:
    """The units of generation as functions of a cache, with the heads that generation needs.

    The denoiser pass is that of a block of masks, whose head costs most. The read of a block into
    the cache is needed before the next block.
    """
    device = model.denoiser_tower.device
    block = torch.full((1, block_size), mask_id, device=device)
    # As in generation: the modulations of all noise levels were computed before the first block.
    levels, masked = model.modulations(torch.arange(block_size + 1, device=device) / block_size), [block_size]
    token = block[:, :1].to(model.context_tower.device)

    def denoiser_pass(cache: ContextCache) -> Any:
        return model.lm_head(model.denoise_hidden(block, levels[:, :, masked], cache)).argmax(-1)

    def ar_step(cache: ContextCache) -> Any:
        model.extend(cache, token)
        assert cache.hidden is not None
        return model.context_lm_head(cache.hidden).argmax(-1)

    return {STEP: ar_step, PASS: denoiser_pass, READ: lambda cache: model.extend(cache, block)}


def time_work(model: Model, prompt: torch.Tensor, work: Mapping[str, Work], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each unit after the prompt, once per round. A first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, unit in work.items():
            seconds[name].append(measure.elapsed_seconds(partial(unit, model.prefill(prompt))))
    return {name: values[1:] for name, values in seconds.items()}


def seconds_by_layer(
    model: Model, prompt: torch.Tensor, work: Mapping[str, Work], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of each unit in all layers of a kind, by kind of layer."""
    started: list[float] = []
    spent: dict[str, float] = defaultdict(float)

    def before(layer: Any, _: Any) -> None:
        measure.synchronize()
        started.append(time.perf_counter())

    def after(kind: str, layer: Any, _: Any, __: Any) -> None:
        measure.synchronize()
        spent[kind] += time.perf_counter() - started.pop()

    towers = (model.context_tower, model.denoiser_tower)
    layers = [(kind, layer) for tower in towers for kind, layer in zip(tower.kinds, tower.layers, strict=True)]
    hooks = [layer.register_forward_pre_hook(before) for _, layer in layers]
    hooks += [layer.register_forward_hook(partial(after, kind)) for kind, layer in layers]
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in work}
    try:
        for _ in range(rounds):
            for name, unit in work.items():
                cache = model.prefill(prompt)
                spent.clear()
                unit(cache)
                for kind, value in spent.items():
                    seconds[name][kind].append(value)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: {kind: statistics.median(s) for kind, s in kinds.items()} for name, kinds in seconds.items()}


def profile_operations(model: Model, prompt: torch.Tensor, unit: Work) -> dict[str, float | None]:
    """The number of torch operations of one unit, and the share of matrix products in its time.

    On a device the share is that of kernel time, and `None` if the profiler saw no kernel. On a CPU
    it is a lower bound, because the profiler slows down small operations.
    """
    caches = [model.prefill(prompt) for _ in range(PROFILED_RUNS)]
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for cache in caches:
            unit(cache)
    events = record.events()
    assert events is not None
    outer = [event for event in events if event.cpu_parent is None]
    total = sum(event.cpu_time_total for event in outer)
    count = len(outer) / PROFILED_RUNS
    if not common_device.is_cpu():  # the recorded times are then those of starting kernels
        cache = model.prefill(prompt)
        kernels = time_by_class(lambda: unit(cache)).seconds
        busy = sum(kernels.values())
        return {"operations": count, "matrix_products": kernels["GEMM"] / busy if busy else None}
    products = sum(event.self_cpu_time_total for event in events if event.name in MATRIX_PRODUCTS)
    return {"operations": count, "matrix_products": products / total}


def break_even(block_size: int, *, denoiser: float, step: float, read: float) -> float | None:
    """Tokens per pass at which mask diffusion is as fast as AR; `None` if no number is enough.

    A block takes block_size / n passes and one read. AR takes a step for each of its tokens.

    Args:
        denoiser: Seconds of a denoiser pass.
        step: Seconds of an AR step.
        read: Seconds of reading a block.
    """
    seconds_for_passes = block_size * step - read
    return block_size * denoiser / seconds_for_passes if seconds_for_passes > 0 else None


def measure_passes(model: Model, *, mask_id: int, block_size: int, prompt_tokens: int, rounds: int) -> dict[str, Any]:
    """All results, after a prompt of random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    prompt = prompt.to(model.context_tower.device)
    with torch.no_grad():
        work = generation_work(model, block_size=block_size, mask_id=mask_id)
        seconds = time_work(model, prompt, work, rounds=rounds)
        by_layer = seconds_by_layer(model, prompt, work, rounds=rounds)
        rows: list[dict[str, Any]] = [
            {
                "case": name,
                "minimum_seconds": min(values),
                "median_seconds": statistics.median(values),
                "seconds_by_layer": by_layer[name],
                **profile_operations(model, prompt, work[name]),
            }
            for name, values in seconds.items()
        ]
    # Other work of the machine can only add to a time, so ratios are those of minima.
    minima = {row["case"]: row["minimum_seconds"] for row in rows}
    return {
        "cases": rows,
        "pass_in_steps": minima[PASS] / minima[STEP],
        "read_in_steps": minima[READ] / minima[STEP],
        "break_even_tokens_per_pass": break_even(
            block_size, denoiser=minima[PASS], step=minima[STEP], read=minima[READ]
        ),
        "block_size": block_size,
        "prompt_tokens": prompt_tokens,
        "rounds": rounds,
    }


def passes_table(results: dict[str, Any]) -> Table:
    """A line for each unit of generation."""
    kinds = sorted({kind for row in results["cases"] for kind in row["seconds_by_layer"]})
    rows = [
        (
            row["case"],
            f"{1e3 * row['minimum_seconds']:.2f}",
            f"{1e3 * row['median_seconds']:.2f}",
            *(f"{1e3 * row['seconds_by_layer'].get(kind, 0.0):.2f}" for kind in kinds),
            f"{row['operations']:.0f}",
            "" if row["matrix_products"] is None else f"{row['matrix_products']:.0%}",
        )
        for row in results["cases"]
    ]
    headings = ("", "ms, least", "ms, median", *(f"in {kind}" for kind in kinds), "operations", "matrix products")
    return plain_table(f"block of {results['block_size']} tokens after {results['prompt_tokens']}", headings, rows)


def run(
    output: Path,
    *,
    model: Path,
    block_size: int | None = None,
    prompt_tokens: int = 64,
    rounds: int = 100,
    threads: int | None = None,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `passes.json` to `output`.

    Args:
        block_size: Tokens of a block; None for that of the folder.
        rounds: Counted rounds, after one that is not counted.
        threads: Threads of torch; its own choice if `None`.
    """
    for name, value in (("--block", block_size), ("--prompt-tokens", prompt_tokens), ("--rounds", rounds)):
        require(value is None or value >= 1, f"{name}: found {value}, expected at least 1")
    opened, _ = load(model, device=default_devices()[0])
    with measure.torch_threads(threads or torch.get_num_threads()):
        results = measure_passes(
            opened,
            mask_id=opened.mask_token_id,
            block_size=block_size or opened.block_size,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
        )
        results |= {"model": str(model), "machine": machine()}
    enough = results["break_even_tokens_per_pass"]
    verdict = "no number of tokens per pass is" if enough is None else f"{enough:.2f} tokens per pass are"
    note = (
        f"a denoiser pass costs {results['pass_in_steps']:.2f} AR steps, reading a block "
        f"{results['read_in_steps']:.2f}: {verdict} as fast as AR"
    )
    report(output, "passes", results, tables=[passes_table(results)], notes=[note], console=console or wide_console())
