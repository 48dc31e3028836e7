"""The entry point of `twotower`: the parser of the commands, one-line errors, exit statuses."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from megatron_twotower.cli import bench, convert, data, distil, doctor, evaluate, generate, plan, report, study, train
from megatron_twotower.cli.command import Command, Group, refuse_idle
from megatron_twotower.cli.options import check_numbers
from megatron_twotower.common.errors import UserError

COMMANDS: tuple[Command | Group, ...] = (
    train.COMMAND,
    plan.COMMAND,
    data.GROUP,
    convert.GROUP,
    generate.COMMAND,
    evaluate.COMMAND,
    bench.GROUP,
    distil.COMMAND,
    study.COMMAND,
    report.COMMAND,
    doctor.COMMAND,
)
USER_ERROR, INTERRUPTED = 2, 130
# transformers imports torchao wherever it is installed. torchao 0.18 then warns of kernels for CUDA
# that a CPU cannot load, and torch of how torchao registers types; nothing here uses either.
NOISE = {"torchao": "Failed to load", "torch.utils._pytree": "register_constant"}
_NOT_GIVEN = object()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which gets its options when its command is chosen."""

    def __init__(self, *args: Any, command: Command | None = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._command = self._chosen = command

    def complete(self) -> None:
        """Add the options of the command, once."""
        command, self._command = self._command, None
        if command is not None:
            command.add_options(self)
            self.set_defaults(command=command)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with all options, and check those of the command.

        Raises:
            UserError: A number is out of range, or an option has no effect beside the others.
        """
        self.complete()
        found, rest = super().parse_known_args(args, namespace)
        if self._chosen is not None:
            blank = argparse.Namespace(**{action.dest: _NOT_GIVEN for action in self._actions})
            super().parse_known_args(args, blank)
            given = [each for each in self._actions if getattr(blank, each.dest) is not _NOT_GIVEN]
            check_numbers(given, found)
            refuse_idle(self._chosen, found, given={name for each in given for name in each.option_strings})
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on standard error."""
        self.exit(USER_ERROR, f"twotower: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Their options are added later, by `_Parser.complete`."""
    parser = _Parser(prog="twotower", description="Train two-tower diffusion language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command | Group]) -> None:
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in commands:
        if isinstance(each, Group):
            _add_commands(added.add_parser(each.name, help=each.summary), each.commands)
            continue
        added.add_parser(
            each.name,
            command=each,
            help=each.summary,
            description=each.summary,
            epilog="\n  ".join(("example:", *each.examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def parse(argv: Sequence[str] | None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
    """Parse a command line.

    argparse refuses `key=value` words on both sides of an option. They are appended to `settings`
    here.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv, namespace)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and "settings" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    return arguments


def _is_other(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 for done, 1 for a benchmark with a failed part, 2 for a mistake of the
        user, 75 for a run that stopped early and saved its state, 130 for Ctrl-C.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name, words in NOISE.items():
        logging.getLogger(name).addFilter(partial(_is_other, words))
    arguments = argparse.Namespace(debug=False)
    try:
        parse(argv, arguments)
        if arguments.command.interrupted_by_sigterm:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        return int(arguments.command.run(arguments))
    except (UserError, OSError) as error:
        if arguments.debug:
            raise
        print(f"twotower: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("twotower: interrupted", file=sys.stderr)
        return INTERRUPTED
