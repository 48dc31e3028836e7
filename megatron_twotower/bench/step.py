"""A training step of two towers against the autoregressive step of the same backbone, and against its rival.

Everything is the trainer's own: Megatron's schedule and DDP, real modules with random weights,
random tokens, noise drawn in the step. Steps take turns in one process, on the same tokens. The
learning rate is zero, so that every step is the first. Where the pattern has Mamba layers, which
one concatenated network cannot have, that rival is timed on a pattern with attention in their
place, beside an autoregressive and a two-tower step of that pattern.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_twotower.bench import draws as bench_draws
from megatron_twotower.bench import measure
from megatron_twotower.bench.concatenated import ConcatenatedModel
from megatron_twotower.bench.measure import Case
from megatron_twotower.common import machine as common_machine
from megatron_twotower.common import plots
from megatron_twotower.common import tables as common_tables
from megatron_twotower.common.device import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config import hf_config, schema
from megatron_twotower.config.phases import resolve_phases
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.convert import initial_weights, load, tensors
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.mcore.transformer_config import transformer_config
from megatron_twotower.model import parameter_map
from megatron_twotower.train import loop
from megatron_twotower.train import run as train_run
from megatron_twotower.train.loop import Trainer
from megatron_twotower.train.losses import autoregressive_loss, masked_diffusion_loss
from megatron_twotower.train.noise import corrupt
from megatron_twotower.train.optimizer import build_optimizer, build_schedule
from megatron_twotower.types import Batch, Blocks

AR, TWO_TOWER, CONCATENATED = "ar", "two towers", "concatenated"
FORWARD_BACKWARD, UPDATE = "forward + backward", "update"


@dataclass(frozen=True)
class Settings:
    """lengths: sequence lengths, at the recipe's tokens per step; the recipe's own where empty. draws: noise draws per
    context, first the one to compare with. seeds: gradients for each variance. sequences, length_tokens: of those."""

    lengths: Sequence[int] = (512, 1024, 2048)
    draws: Sequence[int] = (1, 2, 4)
    repeats: int = 7
    budget_seconds: float = 30.0
    seeds: int = 16
    sequences: int = 8
    length_tokens: int = 256


QUICK = Settings(lengths=(64,), draws=(1, 2), repeats=1, budget_seconds=0.0, seeds=2, sequences=1, length_tokens=64)
QUICK_OVERRIDES = ("model=tiny", "data.sequence_length_tokens=64")


# --- what takes a step --------------------------------------------------------------------------------------------


def trainer_of(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    concatenated: bool = False,
    backbone_source: tensors.TensorSource | None = None,
) -> Trainer:
    """A trainer of the objective, or of the concatenated rival, with its starting weights and a rate of zero.

    Args:
        backbone_source: tensors to take in place of those that the configuration names.
    """
    if concatenated:
        module: Any = ConcatenatedModel(config, transformer_config(config), groups)
        entries, source = (
            parameter_map.trained_backbone_entries(config.model),
            initial_weights.random_backbone(config.model, seed=0),
        )
        load.load_weights(module, entries, source, model=config.model, groups=groups)
    else:
        module = train_run.build_model(config, groups, backbone_source=backbone_source).module
    wrapped = parallel.wrap([module], config, groups)
    optimizer = build_optimizer(config, wrapped, groups)
    wrapped.train()
    return Trainer(config, wrapped, optimizer, build_schedule(config, optimizer), groups, resolve_phases(config))


def trainers_of(config: RunConfig, groups: ProcessGroupCollection) -> dict[str, Trainer]:
    """AR and two towers of one backbone, and the concatenated rival where the pattern allows it."""
    two_tower = dataclasses.replace(config, objective="two_tower")
    validate(two_tower, world_size=parallel.world_size())
    found = {
        AR: trainer_of(dataclasses.replace(config, objective="ar"), groups),
        TWO_TOWER: trainer_of(two_tower, groups),
    }
    if "M" not in config.model.hybrid_override_pattern:
        found[CONCATENATED] = trainer_of(two_tower, groups, concatenated=True)
    return found


def random_batch(config: RunConfig, *, length: int) -> Batch:
    """Random tokens: as many as a micro-batch of the recipe has, and at least one sequence."""
    count = max(1, config.data.micro_batch_size * config.data.sequence_length_tokens // length)
    generator = torch.Generator().manual_seed(config.seed)
    return bench_draws.numbered_batch(
        torch.randint(4, config.model.vocab_size, (count, length), generator=generator), 0
    )


def step_case(name: str, parts: Trainer, batch: Batch) -> Case:
    """One optimizer step, in two stages."""
    micro_batch = loop.MicroBatch(batch, parts.config.seed)

    def update() -> None:
        parts.optimizer.step()
        parts.model.zero_grad_buffer()
        parts.optimizer.zero_grad()

    return Case(
        name,
        {FORWARD_BACKWARD: lambda: loop.forward_backward(parts, [micro_batch], forward_only=False), UPDATE: update},
    )


def ar_parts(parts: Trainer, batch: Batch) -> Case:
    """An autoregressive step by part. The head makes its gradients while its logits are there."""
    model, moved = parts.model.only, batch.to(device())
    held: dict[str, Any] = {}

    def forward() -> None:
        held["hidden"] = model(moved.tokens)

    def head() -> None:
        held["loss"] = autoregressive_loss(model.module.tower, held.pop("hidden"), moved, parts.groups).total

    return Case(AR, {"forward": forward, "head + loss": head, "backward": lambda: held.pop("loss").backward()})


def two_tower_parts(parts: Trainer, batch: Batch) -> Case:
    """A two-tower step by part, with the context tower's forward once more on its own: `forward` holds it too."""
    model, config = parts.model.only, parts.config
    held: dict[str, Any] = {}

    def noise() -> None:
        held["batch"] = corrupt(batch, config.noise, seed=config.seed).to(device())

    @torch.no_grad()
    def context() -> None:
        tower, blocks = model.module.context, Blocks(config.noise.block_size_tokens)
        hidden = tower.embed(held["batch"].tokens)
        for layer in tower.layers.values():
            hidden, _ = layer(hidden, blocks)

    def forward() -> None:
        held["hidden"] = model(held["batch"])

    def head() -> None:
        report = masked_diffusion_loss(
            model.module.tower, held.pop("hidden"), held.pop("batch"), config.noise, parts.groups
        )
        held["loss"] = report.total

    stages: dict[str, Callable[[], Any]] = {
        "noise": noise,
        "context alone": context,
        "forward": forward,
        "head + loss": head,
        "backward": lambda: held.pop("loss").backward(),
    }
    return Case(TWO_TOWER, stages)


def check(config: RunConfig, wanted: Settings) -> None:
    """
    Raises:
        UserError: lengths that are not whole blocks, or too little for a variance.
    """
    block = config.noise.block_size_tokens
    for length in (*wanted.lengths, wanted.length_tokens):
        if length % block:
            raise UserError(f"--lengths: found {length}, expected multiples of noise.block_size_tokens {block}")
    if wanted.seeds < 2:
        raise UserError(f"--seeds: found {wanted.seeds}, expected at least 2")
    if min(wanted.draws) < 1:
        raise UserError(f"--draws: found {min(wanted.draws)}, expected at least 1")


# --- measuring ----------------------------------------------------------------------------------------------------


def step_rows(pattern: str, batch: Batch, times: dict[str, measure.Times], *, against: str) -> Iterator[dict[str, Any]]:
    """Figures of steps that took turns. `ratio` and `ratio_with_update`: over those of the case `against`."""
    figures = {name: found.figures() for name, found in times.items()}
    reference = figures[against]
    for name, found in figures.items():
        row = {"pattern": pattern, "length": batch.tokens.shape[1], "sequences": len(batch.tokens), "case": name}
        step, other = (each["stage_seconds"][FORWARD_BACKWARD] for each in (found, reference))
        row |= {"ratio": step / other, "ratio_with_update": found["median_seconds"] / reference["median_seconds"]}
        yield row | found | {"tokens_per_second": batch.tokens.numel() / found["median_seconds"]}


def _attention_only(config: RunConfig) -> RunConfig:
    pattern = config.model.hybrid_override_pattern.replace("M", "*")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hybrid_override_pattern=pattern))


def _draws_trainer(config: RunConfig, wanted: Settings, groups: ProcessGroupCollection) -> tuple[Trainer, Path]:
    """Two towers from the shipped backbone, and its folder."""
    folder = recipes_folder() / "backbones" / "small"
    model = hf_config.model_from_hf(hf_config.read_hf_config(folder), source=str(folder))
    data = dataclasses.replace(
        config.data,
        sequence_length_tokens=wanted.length_tokens,
        micro_batch_size=wanted.sequences,
        global_batch_size=wanted.sequences,
    )
    small = dataclasses.replace(
        config, objective="two_tower", model=model, data=data, init=schema.InitConfig(backbone=str(folder))
    )
    validate(small, world_size=parallel.world_size())
    return trainer_of(bench_draws.still(small), groups), folder


def measure_steps(
    config: RunConfig, wanted: Settings, groups: ProcessGroupCollection, *, advance: Callable[[str], Any]
) -> dict[str, Any]:
    """All figures: `steps`, `parts` and `draws` of time on the recipe's backbone. `advance` is told what comes next."""

    def in_turns(cases: Sequence[Case]) -> dict[str, measure.Times]:
        return measure.in_turns(cases, repeats=wanted.repeats, budget_seconds=wanted.budget_seconds)

    own_length = config.data.sequence_length_tokens
    figures: dict[str, Any] = {"steps": [], "parts": {}, "draws_cost": []}
    configs = [config, _attention_only(config)] if "M" in config.model.hybrid_override_pattern else [config]
    for each in configs:
        pattern = each.model.hybrid_override_pattern
        advance(f"build {pattern}")
        sides = trainers_of(each, groups)
        for length in wanted.lengths or (own_length,):
            advance(f"{pattern}, L {length}")
            batch = random_batch(each, length=length)
            times = in_turns([step_case(name, parts, batch) for name, parts in sides.items()])
            figures["steps"] += step_rows(pattern, batch, times, against=AR)
        if each is not config:
            continue
        batch = random_batch(config, length=own_length)
        advance(f"{pattern}, by part")
        parts = in_turns([ar_parts(sides[AR], batch), two_tower_parts(sides[TWO_TOWER], batch)])
        figures["parts"] = {name: found.figures()["stage_seconds"] for name, found in parts.items()}
        advance(f"{pattern}, draws")
        two_tower = {f"draws {k}": bench_draws.with_draws(sides[TWO_TOWER], k) for k in wanted.draws}
        times = in_turns([step_case(name, side, batch) for name, side in two_tower.items()])
        figures["draws_cost"] = list(step_rows(pattern, batch, times, against=f"draws {wanted.draws[0]}"))
    return figures


def measure_draws(
    config: RunConfig, wanted: Settings, groups: ProcessGroupCollection, *, advance: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Variance of the gradient against the number of draws, from the shipped backbone on held-out text."""
    parts, folder = _draws_trainer(config, wanted, groups)
    shape = (wanted.seeds, wanted.sequences, wanted.length_tokens)
    tokens = bench_draws.held_out_tokens(folder, count=shape[0] * shape[1] * shape[2]).view(shape)
    return bench_draws.draws_figures(
        parts, tokens, draws=wanted.draws, seeds=wanted.seeds, advance=lambda: advance("variance of the gradient")
    )


def run(
    output: Path,
    *,
    recipe: str = "bench_step",
    overrides: Sequence[str] = (),
    wanted: Settings = Settings(),
    threads: int,
    quick: bool = False,
    console: Console | None = None,
) -> None:
    """Measure, print tables, and write `step.json` and `step.png` to `output`."""
    wanted, console = QUICK if quick else wanted, console or common_tables.wide_console()
    config = load_recipe(recipe, [*overrides, *(QUICK_OVERRIDES if quick else ())])
    check(config, wanted)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, threads_per_rank=threads))
    with measure.torch_threads(threads):
        groups = parallel.initialise(config)
        try:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("", total=None)

                def advance(what: str) -> None:
                    progress.update(task, description=what)

                figures = measure_steps(config, wanted, groups, advance=advance)
                figures["draws"] = measure_draws(config, wanted, groups, advance=advance)
        finally:
            parallel.shutdown()
        machine = common_machine.machine()
    facts: dict[str, Any] = {"machine": machine, "recipe": recipe, "overrides": list(overrides)}
    facts |= {"precision": config.train.precision, "block": config.noise.block_size_tokens}
    for made in tables(figures, block=config.noise.block_size_tokens):
        console.print(made)
    console.print(common_machine.machine_line(facts["machine"]), highlight=False)
    measure.write_files(output, "step", facts | figures, plots.steps(figures, theme=plots.LIGHT))
    console.print(f"{output / 'step.json'}, {output / 'step.png'}", highlight=False)


def table(title: str, *headings: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="right" if index else "left")
    return made


def tables(figures: dict[str, Any], *, block: int) -> Iterator[Table]:
    steps = table(
        f"training steps by turns, S {block}",
        "case",
        "pattern",
        "L",
        "sequences",
        "seconds",
        "fastest",
        "rounds",
        "update",
        "forward + backward, of AR",
        "with update",
        "tokens/s",
    )
    for row in figures["steps"]:
        steps.add_row(
            row["case"],
            row["pattern"],
            f"{row['length']}",
            f"{row['sequences']}",
            f"{row['median_seconds']:.3f}",
            f"{row['minimum_seconds']:.3f}",
            f"{row['rounds']}",
            f"{row['stage_seconds'][UPDATE]:.3f}",
            f"{row['ratio']:.3f} x",
            f"{row['ratio_with_update']:.3f} x",
            f"{row['tokens_per_second']:,.0f}",
        )
    yield steps
    parts = table("by part, seconds", "case", "noise", "context alone", "forward", "head + loss", "backward")
    for name, stages in figures["parts"].items():
        values = (stages.get(heading.header) for heading in parts.columns[1:])
        parts.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    yield parts
    cost = table("noise draws of one context pass, same backbone", "case", "seconds", "of one", "per copy, of one")
    for row in figures["draws_cost"]:
        copies = int(row["case"].removeprefix("draws ")) / int(figures["draws_cost"][0]["case"].removeprefix("draws "))
        ratio = row["ratio_with_update"]
        cost.add_row(row["case"], f"{row['median_seconds']:.3f}", f"{ratio:.2f} x", f"{ratio / copies:.2f} x")
    yield cost
    draws = table(
        "variance of the gradient, shipped backbone, held-out text",
        "draws",
        "seconds",
        "per copy, of one",
        "variance, noise",
        "variance, data",
        "cost x noise",
        "cost x (noise + data)",
    )
    for row in figures["draws"]:
        draws.add_row(
            f"{row['draws']}",
            f"{row['seconds']:.3f}",
            f"{row['relative_cost_per_copy']:.2f} x",
            f"{row['noise_variance']:.4g} ± {row['noise_variance_error']:.2g}",
            f"{row['data_variance']:.4g}",
            f"{row['cost_x_noise']:.2f}",
            f"{row['cost_x_total']:.2f}",
        )
    yield draws
