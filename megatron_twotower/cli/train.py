"""The command `train`."""

import argparse

from megatron_twotower.cli.command import Command
from megatron_twotower.cli.options import recipe_and_overrides
from megatron_twotower.common.errors import STOPPED_EARLY


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="+", metavar="recipe=NAME key=value", help="the recipe, and the keys to change in it"
    )
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--dry-run", action="store_true", help="build the model, take no step")
    once.add_argument(
        "--multirun", action="store_true", help="one run for each value of the keys that have several: seed=1,2"
    )


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.config.environment import set_cuda_environment
    from megatron_twotower.config.recipes import load_recipe

    recipe, overrides = recipe_and_overrides(arguments.settings)
    if arguments.multirun:
        return _multirun(recipe, overrides)
    config = load_recipe(recipe, overrides)
    set_cuda_environment(config.parallel)
    # Megatron is imported after the recipe was read: a mistake in the recipe is reported at once.
    from megatron_twotower.mcore import parallel
    from megatron_twotower.train import run

    try:
        if arguments.dry_run:
            print(run.dry_run(config))
            return 0
        return 0 if run.run_training(config) else STOPPED_EARLY
    finally:
        parallel.shutdown()


def _multirun(recipe: str, overrides: list[str]) -> int:
    from megatron_twotower.train import multirun

    try:
        multirun.run(recipe, overrides)
    except multirun.StoppedEarly:
        return STOPPED_EARLY
    return 0


COMMAND = Command(
    "train",
    "train as a recipe says",
    ("twotower train recipe=quickstart data.folder=data optimizer.learning_rate=3e-4",),
    _add_options,
    _run,
)
