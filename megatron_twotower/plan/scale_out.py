"""The command `plan --scaling`: estimates, not measurements, of a run on several numbers of GPUs.

Formulas give operations and bytes. The utilisation is the same for all numbers of GPUs, assumed or
measured on one GPU. Bandwidths are assumed. The layout is that of the configuration if it is valid
and fits, else the fastest of a search.
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
from megatron_twotower.plan.layout import ACCELERATORS, micro_batches
from megatron_twotower.plan.search import overrides, search
from megatron_twotower.plan.show import as_json, duration, gib, overrides_text
from megatron_twotower.plan.traffic import crosses_nodes


@dataclass(frozen=True)
class Measured:
    """A measured utilisation.

    Attributes:
        utilisation: That of a two-tower step on one GPU.
        source: The layers, device, commit and file of the measurement.
    """

    utilisation: float
    source: str


def measured(path: Path) -> Measured:
    """Read the utilisation from the `gpu.json` of `twotower bench gpu`.

    Raises:
        UserError: The file cannot be read, or is of a CPU or of a GPU whose peak is not known.
    """
    try:
        found = json.loads(path.read_text())
        step = next(row for row in found["steps"] if row["case"] == "two towers")
        utilisation, machine, pattern = step["utilisation"], found["machine"], found["pattern"]
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: cannot be read ({error!r}), expected gpu.json of `twotower bench gpu`") from error
    if utilisation is None:
        raise UserError(f"{path}: found figures of {machine['device']}, expected those of {', '.join(ACCELERATORS)}")
    return Measured(utilisation, f"{pattern} on one {machine['device']}, commit {machine['commit']}, {path}")


def estimate_for(config: RunConfig, *, ranks: int, assumptions: Assumptions) -> Estimate | None:
    """The estimate for a number of ranks; `None` if no layout of a search fits."""
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ranks=ranks))
    try:
        validate(config, world_size=ranks)
        found = estimate(config, ranks=ranks, assumptions=assumptions)
        if found.fits:
            return found
    except UserError:
        pass
    others = search(config, ranks=ranks, assumptions=assumptions)
    return others[0] if others and others[0].fits else None


def assumption_lines(config: RunConfig, assumptions: Assumptions, measured: Measured | None) -> Iterator[str]:
    """The assumptions of the estimates, one per line."""
    accelerator, data = ACCELERATORS[config.parallel.card], config.data
    source = f"measured: {measured.source}" if measured else "taken, not measured"
    peak = f"{accelerator.bf16_flops / 1e12:,.0f} TFLOP/s (dense BF16 of {accelerator.name})"
    yield f"Computing: {assumptions.utilisation:.1%} of {peak} everywhere ({source})."
    near, far = accelerator.link_bytes_per_second / 1e9, accelerator.network_bytes_per_second / 1e9
    yield (
        f"Links: {assumptions.link_share:.0%} of {near:,.0f} GB/s within a node of {accelerator.per_node}, of "
        f"{far:,.0f} GB/s between nodes, one direction per GPU (data sheets, not measured)."
    )
    parallel = config.parallel
    hides = (
        (parallel.overlap_grad_reduce, "gradient reduction, during the last backward pass of a step"),
        (parallel.overlap_param_gather, "parameter gathering, during the first forward pass"),
        (
            parallel.context > 1 and config.objective == "two_tower",
            "what the clean stream tells context-parallel ranks, during the forward passes of the denoiser",
        ),
    )
    hidden = "; ".join(text for overlaps, text in hides if overlaps) or "nothing"
    yield f"Collectives as rings, one after the other, without latency or contention; hidden: {hidden}."
    yield (
        f"The global batch stays {data.global_batch_size:,} sequences of {data.sequence_length_tokens:,} tokens, so "
        "more GPUs have fewer micro-batches each."
    )
    yield (
        f"The busiest rank of experts has {assumptions.expert_imbalance:g} times the mean of their tokens "
        "(--expert-imbalance)."
    )
    yield "No slow GPU, no failure, no time for data, checkpoints or validation."


def _row(found: Estimate, config: RunConfig, best: float) -> list[str]:
    phase, layout, rate = found.phases[0], found.layout, found.tokens_per_second
    far = [group for group in found.sent if crosses_nodes(group, layout, found.accelerator)]
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
        overrides_text([each for each in overrides(config, found.config) if not each.startswith("parallel.ranks=")]),
    ]


def table(rows: Sequence[tuple[int, Estimate | None]], config: RunConfig, *, title: str) -> Table:
    """The table of estimates.

    Args:
        rows: Pairs of a number of GPUs and its estimate; `None` if no layout fits. The efficiency
            of the first estimate is 1.
        config: The configuration, for the overrides of each layout.
        title: The title of the table.
    """
    made = Table(
        "GPUs",
        "memory",
        "micro-batches",
        "computing, s",
        "sending, s",
        "tokens/s per GPU",
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
    rates = [found.tokens_per_second for _, found in rows if found is not None]
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

    Args:
        config: The configuration.
        recipe: The name of the recipe, for the title.
        counts: The numbers of GPUs.
        assumptions: The values that are not computed.
        measured: The source of the utilisation, if it was measured.
        as_text: Whether to print a table, and not JSON.

    Raises:
        UserError: A number of GPUs is below 1, or the objective is `ar`.
    """
    if min(counts) < 1:
        raise UserError(f"--scaling: found {min(counts)}, expected numbers of GPUs")
    if config.objective != "two_tower":
        raise UserError(f"objective: found {config.objective}, expected two_tower")
    rows = [(count, estimate_for(config, ranks=count, assumptions=assumptions)) for count in sorted(set(counts))]
    lines = list(assumption_lines(config, assumptions, measured))
    if not as_text:
        scaling: list[dict[str, Any]] = [
            {"cards": count, "fits": False} if found is None else {"cards": count} | as_json(found)
            for count, found in rows
        ]
        print(json.dumps({"estimate": True, "assumptions": lines, "scaling": scaling}, indent=1))
        return
    accelerator = ACCELERATORS[config.parallel.card].name
    console = Console() if Console().width >= 150 else Console(width=180)
    console.print(
        table(rows, config, title=f"{recipe} on {accelerator}: an estimate, nothing of it measured on a cluster")
    )
    for line in lines:
        console.print(line, highlight=False)
