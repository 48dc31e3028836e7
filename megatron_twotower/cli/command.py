"""What a module of this folder declares: a command, or a group of commands."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_twotower.common.errors import require


@dataclass(frozen=True)
class Idle:
    """Options that a command does not use beside certain others. To give one of them is an error.

    Attributes:
        options: The options.
        beside: Whether they are not used, from the command line.
        words: What does not use them, for the error.
    """

    options: tuple[str, ...]
    beside: Callable[[argparse.Namespace], bool]
    words: str


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
        idle: Options that it does not use beside others.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted_by_sigterm: bool = False
    idle: tuple[Idle, ...] = ()


@dataclass(frozen=True)
class Group:
    """Commands with a common first word: `twotower data prepare`."""

    name: str
    summary: str
    commands: tuple[Command, ...]


def refuse_idle(command: Command, arguments: argparse.Namespace, *, given: Collection[str]) -> None:
    """Refuse options that have no effect beside the others on the command line.

    Args:
        command: The command.
        arguments: The command line.
        given: The options on it.

    Raises:
        UserError: One line with the option, and what does not use it.
    """
    for idle in command.idle:
        if idle.beside(arguments):
            unused = [each for each in idle.options if each in given]
            require(not unused, f"{''.join(unused[:1])}: found with {idle.words}, which does not use it")
