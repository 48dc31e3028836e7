"""The command `doctor`."""

import argparse

from megatron_twotower.cli.command import Command


def _run(_: argparse.Namespace) -> int:
    from megatron_twotower.doctor import print_doctor

    print_doctor()
    return 0


COMMAND = Command(
    "doctor",
    "show what this machine has and which implementation each role of a training step uses",
    ("twotower doctor",),
    lambda parser: None,
    _run,
)
