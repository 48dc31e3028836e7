"""The command `distil`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command
from megatron_twotower.cli.engine import ONE_PROCESS_IDLE, add_engine, one_process_settings
from megatron_twotower.cli.options import COUNT, add_options, arguments_for, option

TEXTS = {
    "sequences": option("number of texts for training", default=4096, **COUNT),
    "prompt_tokens": option("tokens of each prompt", default=64, **COUNT),
    "new_tokens": option("tokens to write after each prompt", default=192, **COUNT),
    "batch_size": option("texts in a batch", default=64, **COUNT),
}


def _add_options(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.generate import distil

    parser.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data folder; the prompts are windows of its text"
    )
    parser.add_argument("--output", type=Path, required=True, help="prepared data folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    add_options(parser, distil.DistilSettings, TEXTS)
    add_engine(parser)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.generate import distil

    distil.run(
        arguments.model,
        data=arguments.data,
        output=arguments.output,
        settings=distil.DistilSettings(**arguments_for(TEXTS, arguments)),
        overwrite=arguments.overwrite,
        engine=one_process_settings(arguments),
    )
    return 0


COMMAND = Command(
    "distil",
    "write text with the context tower, to train its denoiser on",
    ("twotower distil --model runs/model --data runs/data --output runs/written",),
    _add_options,
    _run,
    interrupted_by_sigterm=True,
    idle=ONE_PROCESS_IDLE,
)
