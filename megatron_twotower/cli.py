"""The commands. Each parses its arguments, calls one room, and turns a user's mistake into one line and status 2."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_twotower import host
from megatron_twotower.records import UserError

# A run that a signal ended early, its state saved: the status that asks a scheduler to start it again (EX_TEMPFAIL).
STOPPED_EARLY = 75

Command = Callable[[argparse.Namespace], int]


def _train(arguments: argparse.Namespace) -> int:
    from megatron_twotower.config import load_recipe

    named = [item.removeprefix("recipe=") for item in arguments.settings if item.startswith("recipe=")]
    overrides = [item for item in arguments.settings if not item.startswith("recipe=")]
    if len(named) != 1:
        raise UserError(f"recipe: found {len(named)}, expected exactly one recipe=NAME (or recipe=PATH.yaml)")
    config = load_recipe(named[0], overrides)
    host.install()
    from megatron_twotower import build, parallel

    try:
        if arguments.dry_run:
            print(build.dry_run(config))
            return 0
        return 0 if build.run_training(config) else STOPPED_EARLY
    finally:
        parallel.shutdown()


def _tokenizer(arguments: argparse.Namespace) -> int:
    from megatron_twotower.shards import find_documents, read_text, split_documents
    from megatron_twotower.tokenizer import train_tokenizer

    documents = find_documents(arguments.input)
    train = split_documents(documents, holdout_fraction=arguments.holdout)["train"]
    texts = (text for document in train if (text := read_text(document)) is not None)
    train_tokenizer(texts, vocab_size=arguments.vocab_size, output=arguments.output)
    print(f"{arguments.output}: {arguments.vocab_size} entries from {len(train)} files")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_twotower.shards import prepare

    with Progress(
        TextColumn("tokenising"), BarColumn(), TextColumn("{task.completed} files"), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("tokenising", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        summary = prepare(
            arguments.input, tokenizer=arguments.tokenizer, output=arguments.output,
            holdout_fraction=arguments.holdout, shard_tokens=arguments.shard_tokens, overwrite=arguments.overwrite,
            progress=advance,
        )  # fmt: skip
    print(json.dumps(summary, indent=1))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    host.install()
    import torch

    from megatron_twotower import build, parallel

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}
    try:
        build.export(arguments.source, arguments.to, dtype=dtypes[arguments.dtype])
    finally:
        parallel.shutdown()
    print(f"{arguments.to}: exported from {arguments.source}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from megatron_twotower import generate

    return generate.run(
        arguments.model, prompt=arguments.prompt, mode=arguments.mode, max_new_tokens=arguments.max_new_tokens,
        block_size=arguments.block_size, steps_per_block=arguments.steps_per_block,
        confidence_threshold=arguments.confidence_threshold, temperature=arguments.temperature, seed=arguments.seed,
    )  # fmt: skip


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_twotower import evaluate

    evaluate.run(arguments.model, data=arguments.data, output=arguments.output)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_twotower.report import write_report

    print(f"report: {write_report(arguments.run_folder)}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    host.install()
    from megatron_twotower.doctor import print_doctor

    print_doctor()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twotower", description="Train two-tower diffusion language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group: Any, name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        added = group.add_parser(
            name, help=text, description=text, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run)
        return added

    train = command(commands, "train", _train, "train as a recipe says",
                    "twotower train recipe=quickstart data.folder=data optimizer.learning_rate=3e-4")  # fmt: skip
    train.add_argument(
        "settings", nargs="+", metavar="recipe=NAME key=value", help="the recipe, and what to change in it"
    )
    train.add_argument("--dry-run", action="store_true", help="build the model, take no step")

    data = commands.add_parser("data", help="make a tokenizer, prepare shards").add_subparsers(
        required=True, metavar="COMMAND"
    )
    tokenizer = command(data, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on text files",
                        "twotower data tokenizer --input python-stdlib --output runs/tokenizer")  # fmt: skip
    shards = command(data, "prepare", _prepare, "tokenise text files into WebDataset shards",
                     "twotower data prepare --input texts/ --tokenizer runs/tokenizer --output runs/data")  # fmt: skip
    for each in (tokenizer, shards):
        each.add_argument("--input", nargs="+", required=True, help="files, folders, or the word python-stdlib")
        each.add_argument("--output", type=Path, required=True, help="folder to write")
        each.add_argument("--holdout", type=float, default=0.05, help="fraction of files set aside for validation")
    tokenizer.add_argument("--vocab-size", type=int, default=4096, help="entries")
    shards.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    shards.add_argument("--shard-tokens", type=int, default=1_000_000, help="tokens per shard")
    shards.add_argument("--overwrite", action="store_true", help="replace an existing output folder")

    convert = commands.add_parser("convert", help="move weights to Hugging Face").add_subparsers(
        required=True, metavar="COMMAND"
    )
    export = command(convert, "export", _export, "write a run's newest checkpoint as a Hugging Face folder",
                     "twotower convert export --from runs/twotower --to runs/model")  # fmt: skip
    export.add_argument("--from", dest="source", type=Path, required=True, help="output folder of a training run")
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument("--dtype", choices=("fp32", "bf16"), help="of the tensors; the run's precision if left out")

    generate = command(commands, "generate", _generate, "write text with an exported model",
                       "twotower generate --model runs/model --mode mask_diffusion --prompt 'def '")  # fmt: skip
    generate.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--mode", choices=("mask_diffusion", "mock_ar", "ar", "all"), default="mask_diffusion")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--block-size", type=int, default=16)
    generate.add_argument("--steps-per-block", type=int, default=16)
    generate.add_argument("--confidence-threshold", type=float, default=0.8)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)

    evaluate = command(commands, "evaluate", _evaluate, "likelihoods and a threshold sweep of an exported model",
                       "twotower evaluate --model runs/model --data runs/data --output evaluation.json")  # fmt: skip
    evaluate.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    evaluate.add_argument("--data", type=Path, required=True, help="prepared data folder")
    evaluate.add_argument("--output", type=Path, required=True, help="JSON file to write")

    report = command(commands, "report", _report, "one page of figures and pictures of a quickstart run",
                     "twotower report --run runs/quickstart")  # fmt: skip
    report.add_argument("--run", dest="run_folder", type=Path, required=True)
    command(commands, "doctor", _doctor, "say what this machine has and which implementation serves each role",
            "twotower doctor")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 2 the user's mistake, 75 stopped early with its state saved."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return int(arguments.run(arguments))
    except (UserError, OSError) as error:
        if arguments.debug:
            raise
        print(f"twotower: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("twotower: interrupted", file=sys.stderr)
        return 130
