"""The command `bench step`: a two-tower training step against an autoregressive one.

Both have the same backbone and alternate in one process on the same tokens. The baseline for block
diffusion is one concatenated network (`concatenated.py`), which cannot have Mamba layers. If the
pattern has such layers, that baseline is timed on a pattern with attention in their place, together
with an autoregressive and a two-tower step of that pattern.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_twotower.bench import gradient_variance, measure, training_steps
from megatron_twotower.bench.measure import TimedCase
from megatron_twotower.bench.results import report
from megatron_twotower.bench.training_steps import AR, FORWARD_BACKWARD, TWO_TOWER, UPDATE, step_case
from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.config import hf_config, schema
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel
from megatron_twotower.mcore.parallel import ProcessGroupCollection
from megatron_twotower.types import Batch


@dataclass(frozen=True)
class StepOptions:
    """What to measure.

    Attributes:
        lengths: Sequence lengths in tokens, at the recipe's tokens per step; the recipe's own
            length if empty.
        draws: Numbers of noise draws per context. The first one is the reference.
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`.
        seeds: The number of gradients for each variance.
        sequences: Sequences per gradient for the variance.
        length_tokens: The length of these sequences.
    """

    lengths: Sequence[int] = (512, 1024, 2048)
    draws: Sequence[int] = (1, 2, 4)
    repeats: int = 7
    budget_seconds: float = 30.0
    seeds: int = 16
    sequences: int = 8
    length_tokens: int = 256


QUICK = StepOptions(lengths=(64,), draws=(1, 2), repeats=1, budget_seconds=0.0, seeds=2, sequences=1, length_tokens=64)
QUICK_OVERRIDES = ("model=tiny", "data.sequence_length_tokens=64")


def check_options(config: RunConfig, options: StepOptions) -> None:
    """Check the options against the recipe.

    Raises:
        UserError: A length is not a multiple of the block size, or a number is too small.
    """
    block = config.noise.block_size_tokens
    for length in (*options.lengths, options.length_tokens):
        if length % block:
            raise UserError(f"--lengths: found {length}, expected multiples of noise.block_size_tokens {block}")
    require(options.seeds >= 2, f"--seeds: found {options.seeds}, expected at least 2")
    require(min(options.draws) >= 1, f"--draws: found {min(options.draws)}, expected at least 1")


# --- measuring ---


def step_rows(
    pattern: str, batch: Batch, times: dict[str, measure.CaseTimes], *, reference: str
) -> Iterator[dict[str, Any]]:
    """One row per step. `ratio` and `ratio_with_update` are relative to the case `reference`."""
    summaries = {name: found.summary() for name, found in times.items()}
    base = summaries[reference]
    for name, summary in summaries.items():
        seconds, base_seconds = (each["stage_seconds"][FORWARD_BACKWARD] for each in (summary, base))
        yield {
            "pattern": pattern,
            "length": batch.tokens.shape[1],
            "sequences": len(batch.tokens),
            "case": name,
            "ratio": seconds / base_seconds,
            "ratio_with_update": summary["median_seconds"] / base["median_seconds"],
            **summary,
            "tokens_per_second": batch.tokens.numel() / summary["median_seconds"],
        }


def _attention_only(config: RunConfig) -> RunConfig:
    pattern = config.model.hybrid_override_pattern.replace("M", "*")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hybrid_override_pattern=pattern))


def measure_steps(
    config: RunConfig, options: StepOptions, groups: ProcessGroupCollection, *, announce: Callable[[str], Any]
) -> dict[str, Any]:
    """The times of steps: `steps`, `parts` and `draws_cost`.

    Args:
        announce: Called with what is measured next.
    """

    def time_cases(cases: Sequence[TimedCase]) -> dict[str, measure.CaseTimes]:
        return measure.time_cases(cases, repeats=options.repeats, budget_seconds=options.budget_seconds)

    own_length = config.data.sequence_length_tokens
    results: dict[str, Any] = {"steps": [], "parts": {}, "draws_cost": []}
    configs = [config, _attention_only(config)] if "M" in config.model.hybrid_override_pattern else [config]
    for each in configs:
        pattern = each.model.hybrid_override_pattern
        announce(f"build {pattern}")
        trainers = training_steps.build_trainers(each, groups)
        for length in options.lengths or (own_length,):
            announce(f"{pattern}, L {length}")
            batch = training_steps.random_batch(each, length=length)
            times = time_cases([step_case(name, trainer, batch) for name, trainer in trainers.items()])
            results["steps"] += step_rows(pattern, batch, times, reference=AR)
        if each is not config:
            continue
        batch = training_steps.random_batch(config, length=own_length)
        announce(f"{pattern}, by part")
        times = time_cases(
            [
                training_steps.ar_step_in_parts(trainers[AR], batch),
                training_steps.two_tower_step_in_parts(trainers[TWO_TOWER], batch),
            ]
        )
        results["parts"] = {name: found.summary()["stage_seconds"] for name, found in times.items()}
        announce(f"{pattern}, draws")
        by_draws = {f"draws {k}": gradient_variance.with_draws(trainers[TWO_TOWER], k) for k in options.draws}
        times = time_cases([step_case(name, trainer, batch) for name, trainer in by_draws.items()])
        results["draws_cost"] = list(step_rows(pattern, batch, times, reference=f"draws {options.draws[0]}"))
    return results


def measure_draws(
    config: RunConfig, options: StepOptions, groups: ProcessGroupCollection, *, announce: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """The variance of the gradient for each number of draws.

    It is measured with the shipped backbone on held-out text.
    """
    folder = recipes_folder() / "backbones" / "small"
    model = hf_config.model_from_hf(hf_config.read_hf_config(folder), source=str(folder))
    data = dataclasses.replace(
        config.data,
        sequence_length_tokens=options.length_tokens,
        micro_batch_size=options.sequences,
        global_batch_size=options.sequences,
    )
    config = dataclasses.replace(
        config, objective="two_tower", model=model, data=data, init=schema.InitConfig(backbone=str(folder))
    )
    validate(config, world_size=parallel.world_size())
    trainer = training_steps.build_trainer(gradient_variance.without_router_updates(config), groups)
    shape = (options.seeds, options.sequences, options.length_tokens)
    tokens = gradient_variance.held_out_tokens(folder, count=shape[0] * shape[1] * shape[2]).view(shape)
    return gradient_variance.measure_variance(
        trainer,
        tokens,
        draws=options.draws,
        seeds=options.seeds,
        on_gradient=lambda: announce("variance of the gradient"),
    )


def run(
    output: Path,
    *,
    recipe: str = "bench_step",
    overrides: Sequence[str] = (),
    options: StepOptions = StepOptions(),
    threads: int,
    quick: bool = False,
    console: Console | None = None,
) -> None:
    """Measure, print tables, and write `step.json` and `step.png` to `output`.

    Args:
        quick: Use `QUICK` instead of `options`: tiny sizes, which only show that the command works.
    """
    options, console = QUICK if quick else options, console or wide_console()
    config = load_recipe(recipe, [*(QUICK_OVERRIDES if quick else ()), *overrides])
    set_threads = config.parallel.threads_per_rank
    require(
        set_threads in (0, threads), f"parallel.threads_per_rank: found {set_threads}, expected --threads {threads}"
    )
    check_options(config, options)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, threads_per_rank=threads))
    with measure.torch_threads(threads):
        groups = parallel.initialise(config)
        try:
            with console.status("") as status:
                results = measure_steps(config, options, groups, announce=status.update)
                results["draws"] = measure_draws(config, options, groups, announce=status.update)
        finally:
            parallel.shutdown()
        facts: dict[str, Any] = {"machine": machine(), "recipe": recipe, "overrides": list(overrides)}
    block = config.noise.block_size_tokens
    facts |= {"precision": config.train.precision, "block": block}
    tables, picture = step_tables(results, block=block), plots.steps(results, theme=plots.LIGHT)
    report(output, "step", facts | results, tables=tables, console=console, picture=picture)


# --- tables ---


def step_tables(results: dict[str, Any], *, block: int) -> list[Table]:
    """Everything that the command prints."""
    return [
        _steps_table(results["steps"], block=block),
        _parts_table(results["parts"]),
        _draws_cost_table(results["draws_cost"]),
        _variance_table(results["draws"]),
    ]


def _steps_table(rows: Sequence[dict[str, Any]], *, block: int) -> Table:
    times, ratios = ("seconds", "fastest", "rounds", "update"), ("forward + backward, of AR", "with update")
    return plain_table(
        f"training steps, alternating, S {block}",
        ("case", "pattern", "L", "sequences", *times, *ratios, "tokens/s"),
        [
            (
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
            for row in rows
        ],
        left=2,
    )


def _parts_table(seconds_by_case: dict[str, dict[str, float]]) -> Table:
    parts = ("noise", "context alone", "forward", "head + loss", "backward")
    rows = [
        (name, *(f"{seconds[part]:.3f}" if part in seconds else "" for part in parts))
        for name, seconds in seconds_by_case.items()
    ]
    return plain_table("by part, seconds", ("case", *parts), rows, left=1)


def _draws_cost_table(rows: Sequence[dict[str, Any]]) -> Table:
    draws = [int(row["case"].removeprefix("draws ")) for row in rows]
    return plain_table(
        "noise draws of one context pass, same backbone",
        ("case", "seconds", "of one", "per copy, of one"),
        [
            (
                row["case"],
                f"{row['median_seconds']:.3f}",
                f"{row['ratio_with_update']:.2f} x",
                f"{row['ratio_with_update'] / (count / draws[0]):.2f} x",
            )
            for row, count in zip(rows, draws, strict=True)
        ],
        left=1,
    )


def _variance_table(rows: Sequence[dict[str, Any]]) -> Table:
    variances, products = ("variance, noise", "variance, data"), ("cost x noise", "cost x (noise + data)")
    return plain_table(
        "variance of the gradient, shipped backbone, held-out text",
        ("draws", "seconds", "per copy, of one", *variances, *products),
        [
            (
                f"{row['draws']}",
                f"{row['seconds']:.3f}",
                f"{row['relative_cost_per_copy']:.2f} x",
                f"{row['noise_variance']:.4g} ± {row['noise_variance_error']:.2g}",
                f"{row['data_variance']:.4g}",
                f"{row['cost_x_noise']:.2f}",
                f"{row['cost_x_total']:.2f}",
            )
            for row in rows
        ],
    )
