"""The command `plan`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command, Idle
from megatron_twotower.cli.options import COUNT, add_number, add_options, arguments_for, option, recipe_and_overrides

ASSUMPTIONS = {
    "utilisation": option("assumed share of a GPU's dense BF16 peak while it computes", above=0, at_most=1),
    "link_share": option("assumed share of a link's speed that a collective reaches", above=0, at_most=1),
    "expert_imbalance": option("assumed tokens of the busiest expert-parallel rank over the mean", at_least=1),
}


def _add_options(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.plan.estimate import Assumptions

    parser.add_argument("settings", nargs="+", metavar="recipe=NAME key=value", help="as for train")
    add_number(parser, "--ranks", help="number of ranks; parallel.ranks if left out", **COUNT)
    add_options(parser, Assumptions, ASSUMPTIONS)
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="gpu.json of `twotower bench gpu`, whose utilisation replaces --utilisation",
    )
    add_number(
        parser,
        "--scaling",
        nargs="+",
        default=[],
        metavar="GPUS",
        help="an estimate for each number of GPUs: 8 64 256 1024",
        **COUNT,
    )
    parser.add_argument("--search", action="store_true", help="rank other layouts of the same number of GPUs")
    add_number(parser, "--rows", default=10, help="layouts to show", **COUNT)
    parser.add_argument("--json", action="store_true", help="bytes, seconds and operations as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.config.recipes import load_recipe

    recipe, overrides = recipe_and_overrides(arguments.settings)
    config = load_recipe(recipe, overrides, planning=True)
    from megatron_twotower.plan import scale_out, show
    from megatron_twotower.plan.estimate import Assumptions

    assumed = arguments_for(ASSUMPTIONS, arguments)
    measured = scale_out.measured(arguments.measured) if arguments.measured else None
    if measured:
        assumed["utilisation"] = measured.utilisation
    assumptions, as_text = Assumptions(**assumed), not arguments.json
    if arguments.scaling:
        scale_out.run(
            config, recipe=recipe, counts=arguments.scaling, assumptions=assumptions, measured=measured, as_text=as_text
        )
        return 0
    show.run(
        config,
        recipe=recipe,
        ranks=arguments.ranks,
        assumptions=assumptions,
        searching=arguments.search,
        rows=arguments.rows,
        as_text=as_text,
    )
    return 0


COMMAND = Command(
    "plan",
    "estimate memory, traffic and time of a layout without a GPU",
    ("twotower plan recipe=nano_30b_a3b_phase1 parallel=h100x64 --search",),
    _add_options,
    _run,
    idle=(
        Idle(("--ranks", "--search", "--rows"), lambda found: bool(found.scaling), "--scaling"),
        Idle(("--rows",), lambda found: not found.search, "no --search"),
        Idle(("--utilisation",), lambda found: found.measured is not None, "--measured"),
    ),
)
