"""The command `plan`: a table, or JSON, of what a recipe needs on a layout."""

import dataclasses
import json
from typing import Any

from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.plan.estimate import Assumptions, Estimate, estimate
from megatron_twotower.plan.layout import ACCELERATORS, GIB, expert_load, micro_batches
from megatron_twotower.plan.search import overrides, remedies, search
from megatron_twotower.plan.traffic import crosses_nodes
from megatron_twotower.plan.weights import parameter_count, tower_entries

# The fields of `Memory` and their rows in the table.
_MEMORY = {
    "context": "context tower, frozen",
    "parameters": "denoiser: parameters",
    "gradients": "denoiser: gradients",
    "optimizer": "denoiser: optimizer state",
    "fp8_copies": "denoiser: weights in FP8",
    "kept": "activations",
    "handoff": "handoff between towers",
    "working": "a layer at work, or loss",
    "reserve": "CUDA, NCCL (assumed)",
}
_DAY_SECONDS = 24 * 3600


def gib(count: float) -> str:
    """A number of bytes as text."""
    return f"{count / GIB:,.2f} GiB"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """A time as text."""
    return f"{seconds / _DAY_SECONDS:,.1f} days" if seconds >= _DAY_SECONDS else f"{seconds / 3600:,.2f} hours"


def overrides_text(overrides: list[str]) -> str:
    """Overrides as they are written on the command line."""
    return " ".join(overrides) or "as it is"


def _parameter_counts(config: RunConfig) -> tuple[int, int]:
    """The parameters of a tower, and of the time conditioning."""
    context, trained = (parameter_count(entries) for entries in tower_entries(config))
    return context, trained - context


def _model_rows(found: Estimate) -> list[tuple[str, str, str]]:
    tower, conditioning = _parameter_counts(found.config)
    return [
        ("parameters of a tower", f"{tower:,}", ""),
        ("time conditioning", f"{conditioning:,}", "trained with the denoiser"),
    ]


def _layout_rows(found: Estimate) -> list[tuple[str, str, str]]:
    config, layout = found.config, found.layout
    data = config.data
    step = data.global_batch_size * data.sequence_length_tokens
    load = expert_load(config.parallel, found.assumptions.expert_imbalance)
    experts = f"{layout.expert} x {layout.expert_tensor} x {layout.expert_data}"
    return [
        ("tensor x pipeline x data", f"{layout.tensor} x {layout.pipeline} x {layout.data}", f"{layout.ranks} ranks"),
        ("context", f"{layout.context}", "ranks that share each sequence"),
        ("expert x tensor x data", experts, f"experts, {config.parallel.moe_dispatcher}"),
        ("busiest rank of experts", f"{load:.2f}", "its tokens over the mean (assumed)"),
        ("tokens a step", f"{step:,}", f"{data.global_batch_size:,} sequences of {data.sequence_length_tokens:,}"),
        ("micro-batches a step", f"{micro_batches(config, layout):,}", f"of {data.micro_batch_size} on each rank"),
    ]


def _memory_rows(found: Estimate) -> list[tuple[str, str, str]]:
    total = found.memory.total
    values = dataclasses.asdict(found.memory)
    rows = [(text, gib(values[key]), "█" * round(24 * values[key] / total)) for key, text in _MEMORY.items()]
    verdict = "[green]fits[/green]" if found.fits else "[red]does not fit[/red]"
    return [
        *rows,
        ("in all", gib(total), f"{verdict} in {gib(found.accelerator.memory_bytes)} of {found.accelerator.name}"),
    ]


def _step_rows(found: Estimate) -> list[tuple[str, str, str]]:
    first = found.phases[0]
    rows = [
        ("FLOPs a token", f"{first.flops.model / 1e9:,.2f} G", f"{first.flops.executed / 1e9:,.2f} G with recompute"),
        ("… of an AR step", f"{first.ar.model / 1e9:,.2f} G", f"two towers: {first.flops.model / first.ar.model:.2f}"),
    ]
    for group, count in found.sent.items():
        where = "between nodes" if crosses_nodes(group, found.layout, found.accelerator) else "within a node"
        rows.append((f"sent in {group} groups", _gb(count), f"a rank, {where}"))
    assumptions = found.assumptions
    return [
        *rows,
        (
            "step, computing",
            f"{first.compute_seconds:,.2f} s",
            f"at {assumptions.utilisation:.0%} of {found.accelerator.bf16_flops / 1e12:,.0f} TFLOP/s (assumed)",
        ),
        (
            "step, communicating",
            f"{first.transfer_seconds:,.2f} s",
            f"at {assumptions.link_share:.0%} of the links' speed (assumed), what computing does not hide",
        ),
        ("checkpoint", _gb(found.checkpoint), "in all, on disk"),
    ]


def _time_rows(found: Estimate) -> list[tuple[str, str, str]]:
    rows = [
        (
            f"phase {phase.name}".strip(),
            duration(phase.seconds),
            f"{phase.tokens / 1e9:,.0f} G tokens, S = {phase.block}, {phase.steps:,} steps",
        )
        for phase in found.phases
    ]
    tokens = sum(phase.tokens for phase in found.phases)
    rate = f"{tokens / 1e12:,.2f} T tokens, {found.tokens_per_second:,.0f} tokens/s per GPU"
    return [*rows, ("in all", duration(found.seconds), rate)]


def table(found: Estimate, *, title: str) -> Table:
    """The table of an estimate."""
    made = Table(
        "", "", "", title=f"{title}: {found.layout.ranks} x {found.accelerator.name}", box=SIMPLE, show_header=False
    )
    made.columns[1].justify = "right"
    for rows in (_model_rows, _layout_rows, _memory_rows, _step_rows, _time_rows):
        for row in rows(found):
            made.add_row(*row)
        made.add_section()
    return made


def ranking(found: list[Estimate], against: RunConfig, *, title: str) -> Table:
    """The table of a search: a row per layout, with the overrides against a configuration."""
    made = Table("memory", "time", "tokens/s per GPU", "overrides", title=title, box=SIMPLE_HEAD)
    for each in found:
        changes = overrides_text(overrides(against, each.config))
        made.add_row(gib(each.memory.total), duration(each.seconds), f"{each.tokens_per_second:,.0f}", changes)
    for column in made.columns[:3]:
        column.justify = "right"
    return made


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate as JSON values: bytes, seconds, operations."""
    tower, conditioning = _parameter_counts(found.config)
    return {
        "parameters": {"tower": tower, "time_conditioning": conditioning},
        "layout": dataclasses.asdict(found.layout)
        | {"data": found.layout.data, "expert_data": found.layout.expert_data},
        "card": dataclasses.asdict(found.accelerator),
        "assumptions": dataclasses.asdict(found.assumptions),
        "memory_bytes": dataclasses.asdict(found.memory) | {"total": found.memory.total},
        "fits": found.fits,
        "checkpoint_bytes": found.checkpoint,
        "sent_bytes_per_step": found.sent,
        "phases": [dataclasses.asdict(phase) for phase in found.phases],
        "seconds": found.seconds,
    }


def run(
    config: RunConfig,
    *,
    recipe: str,
    ranks: int | None,
    assumptions: Assumptions,
    searching: bool,
    rows: int,
    as_text: bool,
) -> None:
    """Print the estimate of a configuration.

    Args:
        config: The configuration.
        recipe: The name of the recipe, for the title.
        ranks: The number of ranks; `None` for `parallel.ranks`.
        assumptions: The values that are not computed.
        searching: Whether to print other layouts too.
        rows: The largest number of other layouts.
        as_text: Whether to print tables, and not JSON.

    Raises:
        UserError: There is no number of ranks, the layout is not valid, or the objective is `ar`.
    """
    count = ranks or config.parallel.ranks
    if not count:
        raise UserError("parallel.ranks: found 0, expected --ranks N, or a layout such as parallel=h100x64")
    if config.objective != "two_tower":
        raise UserError(f"objective: found {config.objective}, expected two_tower")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ranks=count))
    validate(config, world_size=count)
    found = estimate(config, ranks=count, assumptions=assumptions)
    others = search(config, ranks=count, assumptions=assumptions) if searching or not found.fits else []
    fitting = [each for each in others if each.fits]
    if not as_text:
        shown = fitting[:rows] if searching else remedies(found, others)
        layouts = [as_json(each) | {"overrides": overrides(config, each.config)} for each in shown]
        print(json.dumps(as_json(found) | {"search" if searching else "remedies": layouts}, indent=1))
        return
    console = Console()
    console.print(table(found, title=recipe))
    if not found.fits:
        _print_remedies(console, found, others)
    if searching:
        title = f"{len(fitting)} of {len(others)} layouts fit; the fastest"
        console.print(ranking(fitting[:rows], config, title=title))


def _print_remedies(console: Console, found: Estimate, others: list[Estimate]) -> None:
    """Print layouts that fit; if there are none, the accelerators that would fit."""
    fitting = remedies(found, others)
    excess = gib(found.memory.total - found.accelerator.memory_bytes)
    if fitting:
        console.print(ranking(fitting, found.config, title=f"{excess} too much; with least change it fits as"))
        return
    least = min(others, key=lambda each: each.memory.total)
    larger = [name for name, each in ACCELERATORS.items() if each.memory_bytes >= least.memory.total]
    changes = overrides_text(overrides(found.config, least.config))
    console.print(
        f"{excess} too much, and no layout of {found.layout.ranks} GPUs was found that fits. The smallest needs "
        f"{gib(least.memory.total)}: {changes}. More GPUs share optimizer state and experts. This many "
        f"would do: {', '.join(larger) or 'none'} (parallel.card)",
        highlight=False,
    )
