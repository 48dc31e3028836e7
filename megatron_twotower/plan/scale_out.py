"""`twotower plan --scaling`: one run on several numbers of cards, as an estimate and never as a measurement.

Operations by formula at one utilisation, taken or measured on one card; bytes by formula over
stated bandwidths. Each number of cards has the configuration's own layout where that is valid and
fits, else the fastest that was found.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.plan.estimate import Assumptions, Estimate, estimate
from megatron_twotower.plan.layout import CARDS, micro_batches
from megatron_twotower.plan.search import overrides, search
from megatron_twotower.plan.show import as_json, duration, gib, spelled
from megatron_twotower.plan.traffic import crosses_nodes


@dataclass(frozen=True)
class Measured:
    """Utilisation of a two-tower step on one card, and what was measured: device, commit, layers."""

    utilisation: float
    source: str


def measured(path: Path) -> Measured:
    """Read what `twotower bench gpu` wrote.

    Raises:
        UserError: no such file, or figures of a CPU or of a card whose peak is not known.
    """
    try:
        found = json.loads(path.read_text())
        two = next(row for row in found["steps"] if row["case"] == "two towers")
        utilisation, machine, pattern = two["utilisation"], found["machine"], found["pattern"]
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: cannot be read ({error!r}), expected gpu.json of `twotower bench gpu`") from error
    if utilisation is None:
        raise UserError(f"{path}: found figures of {machine['device']}, expected those of {', '.join(CARDS)}")
    return Measured(utilisation, f"{pattern} on one {machine['device']}, commit {machine['commit']}, {path}")


def at(config: RunConfig, *, ranks: int, assumptions: Assumptions) -> Estimate | None:
    """The estimate for so many cards; None where no layout was found that fits."""
    own = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ranks=ranks))
    try:
        validate(own, world_size=ranks)
        found = estimate(own, ranks=ranks, assumptions=assumptions)
        if found.fits:
            return found
    except UserError:
        pass
    others = search(own, ranks=ranks, assumptions=assumptions)
    return others[0] if others and others[0].fits else None


def assumed(config: RunConfig, taken: Assumptions, source: Measured | None) -> Iterator[str]:
    """What the estimate stands on, a line each."""
    card, data = CARDS[config.parallel.card], config.data
    where, peak = f"measured: {source.source}" if source else "taken, not measured", card.bf16_flops / 1e12
    yield f"Computing: {taken.utilisation:.1%} of {peak:,.0f} TFLOP/s (dense BF16 of {card.name}) everywhere ({where})."
    near, far = (speed / 1e9 for speed in (card.link_bytes_per_second, card.network_bytes_per_second))
    yield (
        f"Links: {taken.link_share:.0%} of {near:,.0f} GB/s within a node of {card.per_node}, of {far:,.0f} GB/s "
        "between nodes, one direction a card (data sheets, not measured)."
    )
    hidden = "gradients behind the backward pass" if config.parallel.overlap_grad_reduce else "nothing"
    yield f"Collectives as rings, one after the other, without latency or contention; hidden: {hidden}."
    yield (
        f"The global batch stays {data.global_batch_size:,} sequences of {data.sequence_length_tokens:,} tokens, so "
        "more cards have fewer micro-batches each."
    )
    yield "Experts equally busy; no slow card, no failure, no time for data, checkpoints or validation."


def _row(found: Estimate, config: RunConfig, best: float) -> list[str]:
    phase, layout = found.phases[0], found.layout
    tokens = sum(each.tokens for each in found.phases)
    rate = tokens / found.seconds / layout.ranks
    far = [group for group in found.sent if crosses_nodes(group, layout, found.card)]
    near = [group for group in found.sent if group not in far]
    return [
        gib(found.memory.total),
        f"{micro_batches(found.config, layout)}",
        f"{phase.compute_seconds:,.2f}",
        f"{phase.transfer_seconds:,.2f}",
        f"{rate:,.0f}",
        f"{rate * layout.ranks:,.0f}",
        f"{rate / best:.2f}",
        duration(found.seconds),
        ", ".join(near) or "-",
        ", ".join(far) or "-",
        spelled([each for each in overrides(config, found.config) if not each.startswith("parallel.ranks=")]),
    ]


def table(rows: Sequence[tuple[int, Estimate | None]], config: RunConfig, *, title: str) -> Table:
    """One row a number of cards; efficiency is over the smallest that fits."""
    made = Table(
        "cards",
        "memory",
        "micro-batches",
        "computing, s",
        "sending, s",
        "tokens/s a card",
        "tokens/s",
        "efficiency",
        "in all",
        "within a node",
        "between nodes",
        "layout",
        title=title,
        box=SIMPLE_HEAD,
    )
    for column in made.columns[:9]:
        column.justify = "right"
    fitting = [found for _, found in rows if found is not None]
    rates = [sum(each.tokens for each in found.phases) / found.seconds / found.layout.ranks for found in fitting]
    for count, found in rows:
        if found is None:
            made.add_row(f"{count:,}", "no layout was found that fits")
        else:
            made.add_row(f"{count:,}", *_row(found, config, rates[0]))
    return made


def run(
    config: RunConfig,
    *,
    recipe: str,
    counts: Sequence[int],
    assumptions: Assumptions,
    measured: Measured | None,
    as_text: bool,
) -> None:
    """Print the estimates.

    Raises:
        UserError: a number of cards below 1, or the objective `ar`.
    """
    if min(counts) < 1:
        raise UserError(f"--scaling: found {min(counts)}, expected numbers of cards")
    if config.objective != "two_tower":
        raise UserError(f"objective: found {config.objective}, expected two_tower")
    rows = [(count, at(config, ranks=count, assumptions=assumptions)) for count in sorted(set(counts))]
    lines = list(assumed(config, assumptions, measured))
    if not as_text:
        told: list[dict[str, Any]] = [
            {"cards": count, "fits": False} if found is None else {"cards": count} | as_json(found)
            for count, found in rows
        ]
        print(json.dumps({"estimate": True, "assumptions": lines, "scaling": told}, indent=1))
        return
    card = CARDS[config.parallel.card].name
    console = Console() if Console().width >= 150 else Console(width=180)
    console.print(table(rows, config, title=f"{recipe} on {card}: an estimate, nothing of it measured on a cluster"))
    for line in lines:
        console.print(line, highlight=False)
