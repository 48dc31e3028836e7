"""What a pass of the denoiser over a block costs against a cached step of the context tower, and where the time goes.

Mask diffusion is faster than AR where it commits more tokens in a pass than a pass costs steps;
this says how many.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from megatron_twotower.bench import measure
from megatron_twotower.bench.kernel_classes import time_by_class
from megatron_twotower.common import device as common_device
from megatron_twotower.common import tables
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.machine import machine, machine_line
from megatron_twotower.generate.engine import default_devices, load, mask_token_id
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

PASS, STEP, READ = "denoiser pass", "AR step", "read of a block"
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PROFILED = 10  # runs of each case under the profiler

Work = Callable[[ContextCache], Any]


def works(model: Model, *, block_size: int, mask_id: int) -> dict[str, Work]:
    """What generation is made of, as functions of a cache, heads included where generation needs them.

    The pass is that of a block of masks, whose head is the dearest; the read is what makes the next
    block possible.
    """
    device = model.denoiser_tower.device
    block = torch.full((1, block_size), mask_id, device=device)
    t, token = torch.ones(1, device=device), block[:, :1].to(model.context_tower.device)

    def ar_step(cache: ContextCache) -> Any:
        model.extend(cache, token)
        assert cache.hidden is not None
        return model.context_lm_head(cache.hidden).argmax(-1)

    return {
        STEP: ar_step,
        PASS: lambda cache: model.denoise_block(block, t, cache).argmax(-1),
        READ: lambda cache: model.extend(cache, block),
    }


def times(model: Model, prompt: torch.Tensor, cases: dict[str, Work], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every case, once per round in turn after a round that is not counted, behind the same text."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, work in cases.items():
            found[name].append(measure.seconds(partial(work, model.prefill(prompt))))
    return {name: seconds[1:] for name, seconds in found.items()}


def by_layer(model: Model, prompt: torch.Tensor, cases: dict[str, Work], *, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds that each case spends in the layers of each kind, over all layers of a kind."""
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
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in cases}
    try:
        for _ in range(rounds):
            for name, work in cases.items():
                cache = model.prefill(prompt)
                spent.clear()
                work(cache)
                for kind, seconds in spent.items():
                    found[name][kind].append(seconds)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: {kind: statistics.median(s) for kind, s in kinds.items()} for name, kinds in found.items()}


def operations(model: Model, prompt: torch.Tensor, work: Work) -> dict[str, float | None]:
    """Of one run, under the profiler: how many operations torch is called for, and the share of matrix products in
    their time; on a device, in that of its kernels, None where the profiler saw none. On a CPU it
    slows small operations down, so that the share is a lower bound."""
    caches = [model.prefill(prompt) for _ in range(PROFILED)]
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for cache in caches:
            work(cache)
    events = record.events()
    assert events is not None
    outer = [event for event in events if event.cpu_parent is None]
    total = sum(event.cpu_time_total for event in outer)
    count = len(outer) / PROFILED
    if not common_device.is_cpu():  # there these are the times that it takes to start kernels
        cache = model.prefill(prompt)
        kernels = time_by_class(lambda: work(cache)).seconds
        busy = sum(kernels.values())
        return {"operations": count, "matrix_products": kernels["GEMM"] / busy if busy else None}
    products = sum(event.self_cpu_time_total for event in events if event.name in MATRIX_PRODUCTS)
    return {"operations": count, "matrix_products": products / total}


def break_even(block_size: int, *, denoiser: float, step: float, read: float) -> float | None:
    """Tokens per pass at which mask diffusion is as fast as AR; None where no number is enough.

    A block takes block / n passes and a read, AR a step for each token of it.
    """
    left = block_size * step - read
    return block_size * denoiser / left if left > 0 else None


def measured(model: Model, *, mask_id: int, block_size: int, prompt_tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    prompt = prompt.to(model.context_tower.device)
    with torch.no_grad():
        cases = works(model, block_size=block_size, mask_id=mask_id)
        seconds, layers = times(model, prompt, cases, rounds=rounds), by_layer(model, prompt, cases, rounds=rounds)
        rows: list[dict[str, Any]] = [
            {
                "case": name,
                "minimum_seconds": min(found),
                "median_seconds": statistics.median(found),
                "seconds_by_layer": layers[name],
                **operations(model, prompt, cases[name]),
            }
            for name, found in seconds.items()
        ]
    # Minima: what else the machine does can only add to them.
    least = {row["case"]: row["minimum_seconds"] for row in rows}
    enough = break_even(block_size, denoiser=least[PASS], step=least[STEP], read=least[READ])
    return {
        "cases": rows,
        "pass_in_steps": least[PASS] / least[STEP],
        "read_in_steps": least[READ] / least[STEP],
        "break_even_tokens_per_pass": enough,
        "block_size": block_size,
        "prompt_tokens": prompt_tokens,
        "rounds": rounds,
    }


def table(figures: dict[str, Any]) -> Table:
    rows: Sequence[dict[str, Any]] = figures["cases"]
    kinds = sorted({kind for row in rows for kind in row["seconds_by_layer"]})
    shown = Table(
        title=f"block of {figures['block_size']} tokens behind {figures['prompt_tokens']}", box=box.SIMPLE_HEAD
    )
    headings = ("", "ms, least", "ms, median", *(f"in {kind}" for kind in kinds), "operations", "matrix products")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        by_kind = (f"{1e3 * row['seconds_by_layer'].get(kind, 0.0):.2f}" for kind in kinds)
        shown.add_row(
            row["case"],
            f"{1e3 * row['minimum_seconds']:.2f}",
            f"{1e3 * row['median_seconds']:.2f}",
            *by_kind,
            f"{row['operations']:.0f}",
            "" if row["matrix_products"] is None else f"{row['matrix_products']:.0%}",
        )
    return shown


def run(
    output: Path,
    *,
    model: Path,
    block_size: int = 16,
    prompt_tokens: int = 64,
    rounds: int = 100,
    threads: int | None = None,
    console: Console | None = None,
) -> None:
    """The command `bench passes`: print the table, write `passes.json`."""
    for name, value in (("--block", block_size), ("--prompt-tokens", prompt_tokens), ("--rounds", rounds)):
        if value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    opened, tokenizer = load(model, device=default_devices()[0])
    with measure.torch_threads(threads or torch.get_num_threads()):
        figures = measured(
            opened, mask_id=mask_token_id(tokenizer), block_size=block_size, prompt_tokens=prompt_tokens, rounds=rounds
        )
        figures |= {"model": str(model), "machine": machine()}
    console = console or tables.wide_console()
    console.print(table(figures))
    enough = figures["break_even_tokens_per_pass"]
    verdict = "no number of tokens per pass is" if enough is None else f"{enough:.2f} tokens per pass are"
    console.print(
        f"a denoiser pass costs {figures['pass_in_steps']:.2f} AR steps, reading a block "
        f"{figures['read_in_steps']:.2f}: {verdict} as fast as AR",
        highlight=False,
    )
    console.print(machine_line(figures["machine"]), highlight=False)
    measure.write_files(output, "passes", figures, None)
