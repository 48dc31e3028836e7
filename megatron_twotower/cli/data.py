"""The commands of `data`: tokenizer, prepare, conversations, inspect, verify, questions."""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_twotower.cli.command import Command, Group, Idle
from megatron_twotower.cli.engine import ENGINE_IDLE, add_engine, engine_settings
from megatron_twotower.cli.options import COUNT, add_number, add_options, arguments_for, option

# What `tokenizer` and `prepare` both read: parameters of `data.prepare.prepare`.
TEXT = {
    "inputs": option(
        "files, folders of text, .jsonl, .json (.gz, .zst), .parquet; python-stdlib; python-packages", "--input"
    ),
    "output": option("folder to write"),
    "holdout_fraction": option(
        "share set aside for validation: of files by name, of records by text", "--holdout", at_least=0, below=1
    ),
    "text_field": option("field or column of a record that holds its text"),
    "suffixes": option("suffixes of the text files of a folder"),
}
MARKS = ("none", "document")


def _is_url(output: str) -> bool:
    from megatron_twotower.data.remote import is_url

    return is_url(output)


PREPARE = {
    "output": option("folder to write, or its URL"),
    "workspace": option("folder for unfinished work, which all nodes share, if the output is a URL"),
    "tokenizer": option("Hugging Face tokenizer folder"),
    "shard_tokens": option("tokens per shard", **COUNT),
    "overwrite": option("replace an existing output folder"),
    "max_malformed": option("malformed records to skip: a share of all records below 1, else a number", at_least=0),
    "min_tokens": option("leave out shorter documents", **COUNT),
    "max_tokens": option("leave out longer documents", **COUNT),
    "deduplicate": option("keep repeated documents", "--no-dedup", dest="deduplicate"),
    "bos": option("begin each document with BOS", choices=MARKS),
    "eos": option("end each document with EOS", choices=MARKS),
    "chat": option("records are conversations, rendered by the chat template; answers alone are scored"),
    "chat_template": option("file with the chat template, in place of that of the tokenizer", metavar="FILE"),
}
IDLE = (
    Idle(("--text-field", "--suffixes", "--bos", "--eos"), lambda found: found.chat, "--chat"),
    Idle(("--chat-template",), lambda found: not found.chat, "no --chat"),
    Idle(("--workspace",), lambda found: not _is_url(found.output), "an output that is a path"),
    *ENGINE_IDLE,
)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.data.prepare import prepare

    add_options(parser, prepare, TEXT)
    add_number(parser, "--vocab-size", default=4096, help="entries of the vocabulary", **COUNT)


def _tokenizer(arguments: argparse.Namespace) -> int:
    from megatron_twotower.data.documents import find_inputs, training_texts
    from megatron_twotower.data.tokenizer import train_tokenizer

    found = find_inputs(arguments.input, suffixes=arguments.suffixes, text_field=arguments.text_field)
    documents = found.documents
    texts = training_texts(documents, holdout_fraction=arguments.holdout, text_field=arguments.text_field)
    train_tokenizer(texts, vocab_size=arguments.vocab_size, output=arguments.output)
    print(f"{arguments.output}: {arguments.vocab_size} entries from {len(documents)} files, without held-out text")
    if found.passed_over.counts:
        print(f"passed over: {found.passed_over}")
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.data.prepare import prepare

    add_options(parser, prepare, TEXT | PREPARE)
    add_engine(parser)


def _prepare(arguments: argparse.Namespace) -> int:
    from megatron_twotower.common.progress import corpus_bars
    from megatron_twotower.data.prepare import prepare

    engine = engine_settings(arguments)
    with corpus_bars() as report:
        summary = prepare(**arguments_for(TEXT | PREPARE, arguments), engine=engine, progress=report)
    print(json.dumps(summary, indent=1))
    return 0


CONVERSATIONS = {"output": option("JSON lines to write")}


def _add_conversations(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.data.library_conversations import write_library_conversations

    add_options(parser, write_library_conversations, CONVERSATIONS)


def _conversations(arguments: argparse.Namespace) -> int:
    from megatron_twotower.data.library_conversations import write_library_conversations

    count = write_library_conversations(**arguments_for(CONVERSATIONS, arguments))
    print(f"{arguments.output}: {count:,} conversations")
    return 0


DATA_HELP = "prepared folder, URL of one, or blend file"
BLEND = {"folder": option("folder of the corpora of a blend; that of the blend file if left out")}
INSPECT = BLEND | {
    "split": option("split of a prepared folder", default="train"),
    "samples": option("documents to show", default=3, at_least=0),
    "block_size": option("tokens per block", default=16, **COUNT),
    "picture": option("PNG file to write", default=Path("lengths.png")),
    "tokenizer": option("folder of the tokenizer to decode with; the data's own if left out"),
}
VERIFY = BLEND | {
    "tokenizer": option("folder of the tokenizer that the data must be made with"),
    "workers": option("processes; the number of cores if left out", default=len(os.sched_getaffinity(0)), **COUNT),
}


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.data.inspect import inspect

    parser.add_argument("data", help=DATA_HELP)
    add_options(parser, inspect, INSPECT)


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_twotower.data.inspect import inspect

    inspect(arguments.data, **arguments_for(INSPECT, arguments))
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.data.verify import verify

    parser.add_argument("data", help=DATA_HELP)
    add_options(parser, verify, VERIFY)


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_twotower.common.progress import corpus_bars
    from megatron_twotower.data.verify import verify

    with corpus_bars() as report:
        problems = verify(arguments.data, **arguments_for(VERIFY, arguments), progress=report)
    for problem in problems:
        print(f"twotower: {problem}", file=sys.stderr)
    return 2 if problems else 0


QUESTIONS = {
    "output": option("folder to write"),
    "packages": option("installed packages to cut them from; those that are not installed are left out"),
    "count": option("questions of each kind, at most", **COUNT),
    "seed": option("seed of the choice", at_least=0),
}


def _add_questions(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.evaluate.code_documents import write_documents

    add_options(parser, write_documents, QUESTIONS)


def _questions(arguments: argparse.Namespace) -> int:
    from megatron_twotower.evaluate.code_documents import write_documents

    print(json.dumps(write_documents(**arguments_for(QUESTIONS, arguments)), indent=1))
    return 0


GROUP = Group(
    "data",
    "make a tokenizer, prepare shards",
    (
        Command(
            "tokenizer",
            "train a byte-level BPE tokenizer on text files",
            ("twotower data tokenizer --input python-stdlib --output runs/tokenizer",),
            _add_tokenizer,
            _tokenizer,
        ),
        Command(
            "prepare",
            "tokenise text, JSON lines or parquet into WebDataset shards",
            (
                "twotower data prepare --input texts/ more.jsonl.zst --tokenizer runs/tokenizer "
                "--output runs/data --workers 16",
                "twotower data prepare --input /shared/texts --tokenizer /shared/tokenizer --output /shared/data "
                "--engine ray --address head:6379",
                "twotower data prepare --chat --input chats.jsonl --tokenizer my/instruct --output runs/chats",
            ),
            _add_prepare,
            _prepare,
            idle=IDLE,
        ),
        Command(
            "conversations",
            "write conversations about Python's standard library, for small runs",
            ("twotower data conversations --output runs/sft/library.jsonl",),
            _add_conversations,
            _conversations,
        ),
        Command(
            "inspect",
            "show counts, lengths, and decoded samples with their block boundaries",
            ("twotower data inspect runs/data --block-size 16 --picture lengths.png",),
            _add_inspect,
            _inspect,
        ),
        Command(
            "verify",
            "check shards, indices, token range and tokenizer, and name each fault",
            ("twotower data verify runs/data --tokenizer recipes/backbones/small",),
            _add_verify,
            _verify,
        ),
        Command(
            "questions",
            "cut questions about Python source from installed packages (evaluate --tasks code_small)",
            ("twotower data questions --output runs/questions --packages networkx rich --count 200",),
            _add_questions,
            _questions,
        ),
    ),
)
