"""`twotower plan`: one table, or JSON, of what a recipe needs on a layout."""

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
from megatron_twotower.plan.layout import CARDS, GIB, layout_of, micro_batches
from megatron_twotower.plan.search import overrides, remedies, search
from megatron_twotower.plan.traffic import crosses_nodes
from megatron_twotower.plan.weights import RankParameters, parameters, rank_parameters, tables

_MEMORY = {
    "context": "context tower, frozen",
    "parameters": "denoiser: parameters",
    "gradients": "denoiser: gradients",
    "optimizer": "denoiser: optimizer state",
    "kept": "activations",
    "handoff": "hand-off between towers",
    "working": "a layer at work, or loss",
    "reserve": "CUDA, NCCL (assumed)",
}
DAY = 24 * 3600


def gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    return f"{seconds / DAY:,.1f} days" if seconds >= DAY else f"{seconds / 3600:,.2f} hours"


def spelled(items: list[str]) -> str:
    return " ".join(items) or "as it is"


def _model_rows(found: Estimate) -> list[tuple[str, str, str]]:
    context, trained = tables(found.config)
    tower = parameters(context)
    return [
        ("parameters of a tower", f"{tower:,}", ""),
        ("time conditioning", f"{parameters(trained) - tower:,}", "trained with the denoiser"),
    ]


def _layout_rows(found: Estimate) -> list[tuple[str, str, str]]:
    config, layout = found.config, found.layout
    data = config.data
    step = data.global_batch_size * data.sequence_length_tokens
    experts = f"{layout.expert} x {layout.expert_tensor} x {layout.expert_data}"
    return [
        ("tensor x pipeline x data", f"{layout.tensor} x {layout.pipeline} x {layout.data}", f"{layout.ranks} ranks"),
        ("expert x tensor x data", experts, f"experts, {config.parallel.moe_dispatcher}"),
        ("tokens a step", f"{step:,}", f"{data.global_batch_size:,} sequences of {data.sequence_length_tokens:,}"),
        ("micro-batches a step", f"{micro_batches(config, layout):,}", f"of {data.micro_batch_size} on each rank"),
    ]


def _memory_rows(found: Estimate) -> list[tuple[str, str, str]]:
    total = found.memory.total
    values = dataclasses.asdict(found.memory)
    rows = [(text, gib(values[key]), "█" * round(24 * values[key] / total)) for key, text in _MEMORY.items()]
    verdict = "[green]fits[/green]" if found.fits else "[red]does not fit[/red]"
    return [*rows, ("in all", gib(total), f"{verdict} in {gib(found.card.memory_bytes)} of {found.card.name}")]


def _step_rows(found: Estimate) -> list[tuple[str, str, str]]:
    first = found.phases[0]
    rows = [
        ("FLOPs a token", f"{first.flops.model / 1e9:,.2f} G", f"{first.flops.executed / 1e9:,.2f} G with recompute"),
        ("… of an AR step", f"{first.ar.model / 1e9:,.2f} G", f"two towers: {first.flops.model / first.ar.model:.2f}"),
    ]
    for group, count in found.sent.items():
        where = "between nodes" if crosses_nodes(group, found.layout, found.card) else "within a node"
        rows.append((f"sent in {group} groups", _gb(count), f"a rank, {where}"))
    taken = found.assumptions
    return [
        *rows,
        (
            "step, computing",
            f"{first.compute_seconds:,.2f} s",
            f"at {taken.utilisation:.0%} of {found.card.bf16_flops / 1e12:,.0f} TFLOP/s (assumed)",
        ),
        (
            "step, communicating",
            f"{first.transfer_seconds:,.2f} s",
            f"at {taken.link_share:.0%} of the links' speed (assumed)",
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
    rate = tokens / found.seconds / found.layout.ranks
    return [*rows, ("in all", duration(found.seconds), f"{tokens / 1e12:,.2f} T tokens, {rate:,.0f} tokens/s a card")]


def table(found: Estimate, *, title: str) -> Table:
    """The estimate as one table."""
    made = Table("", "", "", title=f"{title}: {found.layout.ranks} x {found.card.name}", box=SIMPLE, show_header=False)
    made.columns[1].justify = "right"
    for rows in (_model_rows, _layout_rows, _memory_rows, _step_rows, _time_rows):
        for row in rows(found):
            made.add_row(*row)
        made.add_section()
    return made


def ranking(found: list[Estimate], against: RunConfig, *, title: str) -> Table:
    """Layouts, one a row, as what to change."""
    made = Table("memory", "time", "tokens/s a card", "overrides", title=title, box=SIMPLE_HEAD)
    for each in found:
        tokens = sum(phase.tokens for phase in each.phases)
        rate = f"{tokens / each.seconds / each.layout.ranks:,.0f}"
        made.add_row(gib(each.memory.total), duration(each.seconds), rate, spelled(overrides(against, each.config)))
    for column in made.columns[:3]:
        column.justify = "right"
    return made


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate in plain numbers: bytes, seconds, operations."""
    context, trained = tables(found.config)
    tower = parameters(context)
    return {
        "parameters": {"tower": tower, "time_conditioning": parameters(trained) - tower},
        "layout": dataclasses.asdict(found.layout)
        | {"data": found.layout.data, "expert_data": found.layout.expert_data},
        "card": dataclasses.asdict(found.card),
        "assumptions": dataclasses.asdict(found.assumptions),
        "memory_bytes": dataclasses.asdict(found.memory) | {"total": found.memory.total},
        "fits": found.fits,
        "checkpoint_bytes": found.checkpoint,
        "sent_bytes_per_step": found.sent,
        "phases": [dataclasses.asdict(phase) for phase in found.phases],
        "seconds": found.seconds,
    }


def _checked(config: RunConfig, ranks: int) -> list[RankParameters]:
    """The parameters of a rank of each pipeline stage, counted in modules and by the table of names.

    Raises:
        AssertionError: they differ.
    """
    from megatron_twotower.plan.meta_build import build

    layout, found = layout_of(config, ranks=ranks), []

    def sizes(of: RankParameters) -> list[list[tuple[int, bool]]]:
        return [sorted((p.elements, p.expert) for p in chunk) for chunk in of.chunks]

    for stage in range(layout.pipeline):
        # Megatron lays the ranks of a stage beside each other.
        built = build(config, layout, rank=stage * ranks // layout.pipeline)
        named = rank_parameters(config, layout, pipeline_rank=stage)
        assert built.context == named.context and sizes(built) == sizes(named), "names.py and the modules differ"
        found.append(built)
    return found


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
    """Print the plan of a configuration.

    Args:
        ranks: None for those its layout is made for.
        searching: rank other layouts too.
        rows: layouts to print.
        as_text: a table; otherwise JSON.

    Raises:
        UserError: no number of ranks, a layout that is not valid, or the objective `ar`.
    """
    count = ranks or config.parallel.ranks
    if not count:
        raise UserError("parallel.ranks: found 0, expected --ranks N, or a layout such as parallel=h100x64")
    if config.objective != "two_tower":
        raise UserError(f"objective: found {config.objective}, expected two_tower")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ranks=count))
    validate(config, world_size=count)
    found = estimate(config, ranks=count, assumptions=assumptions, of=_checked(config, count))
    others = search(config, ranks=count, assumptions=assumptions) if searching or not found.fits else []
    fitting = [each for each in others if each.fits]
    if not as_text:
        shown = fitting[:rows] if searching else remedies(found, others)
        ranked = [as_json(each) | {"overrides": overrides(config, each.config)} for each in shown]
        print(json.dumps(as_json(found) | {"search" if searching else "remedies": ranked}, indent=1))
        return
    console = Console()
    console.print(table(found, title=recipe))
    if not found.fits:
        _print_remedies(console, found, others)
    if searching:
        title = f"{len(fitting)} of {len(others)} layouts fit; the fastest"
        console.print(ranking(fitting[:rows], config, title=title))


def _print_remedies(console: Console, found: Estimate, others: list[Estimate]) -> None:
    remedy = remedies(found, others)
    over = gib(found.memory.total - found.card.memory_bytes)
    if remedy:
        console.print(ranking(remedy, found.config, title=f"{over} too much; with least change it fits as"))
        return
    least = min(others, key=lambda each: each.memory.total)
    larger = [name for name, card in CARDS.items() if card.memory_bytes >= least.memory.total]
    console.print(
        f"{over} too much, and no layout of {found.layout.ranks} cards was found that fits. The smallest needs "
        f"{gib(least.memory.total)}: {spelled(overrides(found.config, least.config))}. More cards share optimizer "
        f"state and experts; of these cards so many would do: {', '.join(larger) or 'none'} (parallel.card)",
        highlight=False,
    )
