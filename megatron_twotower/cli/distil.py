"""The command `distil`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data folder; the prompts are its training text"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines for `data prepare`")
    parser.add_argument("--sequences", type=int, default=4096, help="number of texts")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=192, help="tokens to write after each prompt")
    parser.add_argument("--batch-size", type=int, default=64, help="texts in a batch")


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.generate import distil

    distil.run(
        arguments.model,
        data=arguments.data,
        output=arguments.output,
        sequences=arguments.sequences,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
    )
    return 0


COMMAND = Command(
    "distil",
    "write text with the context tower, to train its denoiser on",
    ("twotower distil --model runs/model --data runs/data --output runs/distilled.jsonl",),
    _add_options,
    _run,
    interrupted_by_sigterm=True,
)
