"""The command `report`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="run_folder", type=Path, required=True, help="folder that `make train` wrote")


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.report.page import write_report

    print(f"report: {write_report(arguments.run_folder)}")
    return 0


COMMAND = Command(
    "report",
    "write one page of figures and pictures of a quickstart run",
    ("twotower report --run runs/quickstart",),
    _add_options,
    _run,
)
