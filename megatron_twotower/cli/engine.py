"""The options of commands that can work on a Ray cluster."""

import argparse

from megatron_twotower.cli.command import Idle
from megatron_twotower.cli.options import COUNT, Parser, add_options, arguments_for, flags, option
from megatron_twotower.common.engines import ENGINES, LOCAL, ONE_PROCESS, EngineSettings

_ENGINE = {
    "engine": option("who does the work: this machine, or a Ray cluster (extra `cluster`)", choices=tuple(ENGINES)),
    "address": option(
        "HOST:PORT of the Ray cluster, or auto; RAY_ADDRESS if left out, and without it a Ray of this machine alone"
    ),
    "workers": option("worker processes; all cores, or all that the cluster has room for, if left out", **COUNT),
}


ENGINE_FLAGS = flags(_ENGINE)


def _is_local(arguments: argparse.Namespace) -> bool:
    return bool(arguments.engine == LOCAL)


# Of a command whose local engine has any number of workers, and of one where it is one process.
ENGINE_IDLE = (Idle(("--address",), _is_local, "--engine local"),)
ONE_PROCESS_IDLE = (Idle(("--address", "--workers"), _is_local, "--engine local"),)


def add_engine(parser: Parser) -> None:
    """Add `--engine`, `--address` and `--workers`."""
    add_options(parser, EngineSettings, _ENGINE)


def engine_settings(arguments: argparse.Namespace) -> EngineSettings:
    """What the command line says."""
    return EngineSettings(**arguments_for(_ENGINE, arguments))


def one_process_settings(arguments: argparse.Namespace) -> EngineSettings:
    """What the command line says to a command whose local engine is one process."""
    found = engine_settings(arguments)
    return found if found.engine != LOCAL else ONE_PROCESS
