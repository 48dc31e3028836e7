"""The command `study`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command, Idle
from megatron_twotower.cli.options import COUNT, add_number


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a study, such as recipes/studies/objective.yaml")
    parser.add_argument(
        "--output", type=Path, help="folder of its trainings and results; runs/studies/NAME if left out"
    )
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="only these sizes; all if left out")
    add_number(parser, "--workers", default=1, help="trainings at a time", **COUNT)
    parser.add_argument(
        "--generate",
        action="store_true",
        help="let the denoisers write too, and compare tokens per pass at equal agreement with AR (a minute each)",
    )
    parser.add_argument("--show", action="store_true", help="train nothing: show what is done")


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.study import command

    command.run(
        arguments.file,
        output=arguments.output or Path("runs/studies") / arguments.file.stem,
        workers=arguments.workers,
        sizes=arguments.sizes,
        train=not arguments.show,
        generate=arguments.generate,
    )
    return 0


COMMAND = Command(
    "study",
    "compare ways to train at equal tokens, over several seeds",
    ("twotower study recipes/studies/objective.yaml --workers 2",),
    _add_options,
    _run,
    interrupted_by_sigterm=True,
    idle=(Idle(("--workers", "--generate"), lambda found: found.show, "--show"),),
)
