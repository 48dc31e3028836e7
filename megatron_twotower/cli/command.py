"""What a module of this folder declares: a command, or a group of commands."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of `twotower`.

    Attributes:
        name: The word that calls it.
        summary: What it does, in one line.
        examples: Complete calls of it, for `--help`.
        add_options: Adds its options to a parser. It is called only when the command is chosen, so
            it may import torch.
        run: Does the work and returns the exit status.
        interrupted_by_sigterm: SIGTERM ends it like Ctrl-C, so that it removes what it was writing.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted_by_sigterm: bool = False


@dataclass(frozen=True)
class Group:
    """Commands with a common first word: `twotower data prepare`."""

    name: str
    summary: str
    commands: tuple[Command, ...]
