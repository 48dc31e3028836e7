"""The commands. Each parses its arguments, calls one room, and turns a user's mistake into one line and status 2."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_twotower.cli import bench as bench_commands
from megatron_twotower.common.errors import STOPPED_EARLY, UserError

Command = Callable[[argparse.Namespace], int]


def _train(arguments: argparse.Namespace) -> int:
    from megatron_twotower.config.recipes import load_recipe

    recipe, overrides = _recipe_and_overrides(arguments.settings)
    if arguments.multirun:
        from megatron_twotower.train import multirun

        try:
            multirun.run(recipe, overrides)
        except multirun.StoppedEarly:
            return STOPPED_EARLY
        return 0
    config = load_recipe(recipe, overrides)
    from megatron_twotower.mcore import parallel
    from megatron_twotower.train import run as train_run

    try:
        if arguments.dry_run:
            print(train_run.dry_run(config))
            return 0
        return 0 if train_run.run_training(config) else STOPPED_EARLY
    finally:
        parallel.shutdown()


def _recipe_and_overrides(items: Sequence[str]) -> tuple[str, list[str]]:
    named = [item.removeprefix("recipe=") for item in items if item.startswith("recipe=")]
    if len(named) != 1:
        raise UserError(f"recipe: found {len(named)}, expected exactly one recipe=NAME (or recipe=PATH.yaml)")
    return named[0], [item for item in items if not item.startswith("recipe=")]


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_twotower.config.recipes import load_recipe

    recipe, overrides = _recipe_and_overrides(arguments.settings)
    config = load_recipe(recipe, overrides, planning=True)
    from megatron_twotower.plan import scale_out, show
    from megatron_twotower.plan.estimate import Assumptions

    measured = scale_out.measured(arguments.measured) if arguments.measured else None
    taken = Assumptions(
        utilisation=measured.utilisation if measured else arguments.utilisation, link_share=arguments.link_share
    )
    if arguments.scaling:
        scale_out.run(
            config,
            recipe=recipe,
            counts=arguments.scaling,
            assumptions=taken,
            measured=measured,
            as_text=not arguments.json,
        )
        return 0
    show.run(
        config,
        recipe=recipe,
        ranks=arguments.ranks,
        assumptions=taken,
        searching=arguments.search,
        rows=arguments.rows,
        as_text=not arguments.json,
    )
    return 0


def _tokenizer(arguments: argparse.Namespace) -> int:
    from megatron_twotower.data.documents import find_documents, training_texts
    from megatron_twotower.data.tokenizer import train_tokenizer

    documents = find_documents(arguments.input, suffixes=arguments.suffixes)
    texts = training_texts(documents, holdout_fraction=arguments.holdout, text_field=arguments.text_field)
    train_tokenizer(texts, vocab_size=arguments.vocab_size, output=arguments.output)
    print(f"{arguments.output}: {arguments.vocab_size} entries from {len(documents)} files, without what is held out")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from megatron_twotower.common.progress import corpus_bars
    from megatron_twotower.data.prepare import prepare

    with corpus_bars() as report:
        summary = prepare(
            arguments.input,
            tokenizer=arguments.tokenizer,
            output=arguments.output,
            holdout_fraction=arguments.holdout,
            shard_tokens=arguments.shard_tokens,
            overwrite=arguments.overwrite,
            text_field=arguments.text_field,
            max_malformed=arguments.max_malformed,
            min_tokens=arguments.min_tokens,
            max_tokens=arguments.max_tokens,
            deduplicate=arguments.deduplicate,
            bos=arguments.bos,
            eos=arguments.eos,
            suffixes=arguments.suffixes,
            workers=arguments.workers,
            progress=report,
        )
    print(json.dumps(summary, indent=1))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_twotower.data.inspect import inspect

    inspect(
        arguments.data,
        split=arguments.split,
        samples=arguments.samples,
        block_size=arguments.block_size,
        picture=arguments.picture,
        tokenizer=arguments.tokenizer,
        folder=arguments.folder,
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_twotower.common.progress import corpus_bars
    from megatron_twotower.data.verify import verify

    with corpus_bars() as report:
        problems = verify(
            arguments.data,
            tokenizer=arguments.tokenizer,
            folder=arguments.folder,
            workers=arguments.workers,
            progress=report,
        )
    for problem in problems:
        print(f"twotower: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _end_cleanly() -> None:
    """SIGTERM ends a command as Ctrl-C does: what it was writing is taken away again."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _import(arguments: argparse.Namespace) -> int:
    _end_cleanly()
    from megatron_twotower.common.progress import bytes_bar
    from megatron_twotower.convert.import_run import import_folder

    with bytes_bar("importing") as progress:
        config = import_folder(arguments.source, arguments.to, backbone=arguments.backbone, progress=progress)
    print(
        f"{arguments.to}: imported from {arguments.source}, objective {config.objective}; go on with\n"
        f"  twotower train recipe={arguments.to}/config.yaml data.folder=... train.steps=..."
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _end_cleanly()
    import torch

    from megatron_twotower.common.progress import bytes_bar
    from megatron_twotower.convert.export import ExportOptions, export

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    options = ExportOptions(
        what=arguments.what,
        dtype=dtypes[arguments.dtype],
        style=arguments.style,
        step=arguments.step,
        backbone=arguments.backbone,
    )
    with bytes_bar("exporting") as progress:
        what = export(arguments.source, arguments.to, options=options, progress=progress)
    print(f"{arguments.to}: {what} exported from {arguments.source}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from megatron_twotower.generate import prompt_file, terminal
    from megatron_twotower.generate.engine import GenerationSettings

    for name, needed in (("output", "prompts"), ("html", "prompt")):
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            raise UserError(f"--{name}: found {getattr(arguments, name)}, expected it with --{needed} alone")
    settings = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        block_size=arguments.block_size,
        steps_per_block=arguments.steps_per_block,
        confidence_threshold=arguments.confidence_threshold,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        top_p=arguments.top_p,
        draft_steps=arguments.draft_steps,
    )
    if arguments.prompts is None:
        return terminal.run(
            arguments.model,
            prompt=arguments.prompt,
            mode=arguments.mode,
            settings=settings,
            page=arguments.html,
            devices=arguments.device,
        )
    if arguments.output is None:
        raise UserError("--output: found none, expected a file to write what follows --prompts to")
    return prompt_file.run(
        arguments.model,
        prompts=arguments.prompts,
        output=arguments.output,
        mode=arguments.mode,
        settings=settings,
        batching=prompt_file.BatchingSettings(batch_size=arguments.batch_size),
        devices=arguments.device,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.tasks:
        return _evaluate_tasks(arguments)
    if arguments.data is None:
        raise UserError("evaluate: found neither --data nor --tasks, expected a prepared data folder or task names")
    from megatron_twotower.evaluate import held_out

    asked: dict[str, Any] = {
        "sequences": arguments.sequences,
        "sequence_length_tokens": arguments.length,
        "block_size_tokens": arguments.block_size,
        "bound_draws": arguments.draws,
        "thresholds": arguments.thresholds,
        "threshold": arguments.confidence_threshold,
        "block_sizes": arguments.block_sizes,
        "steps": arguments.steps,
        "every": arguments.every,
        "prompts": arguments.prompts,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "samples": arguments.samples,
        "seed": arguments.seed,
    }
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v is not None}
    settings = held_out.EvaluationSettings(**given)
    held_out.run(arguments.model, data=arguments.data, output=arguments.output, settings=settings)
    return 0


def _evaluate_tasks(arguments: argparse.Namespace) -> int:
    from megatron_twotower.evaluate import tasks as evaluate_tasks

    asked = {
        "mode": arguments.mode,
        "scoring": arguments.scoring,
        "batch_size": arguments.batch_size,
        "max_length_tokens": arguments.max_length,
        "max_new_tokens": arguments.new_tokens,
        "block_size": arguments.block_size,
        "steps_per_block": arguments.steps_per_block,
        "confidence_threshold": arguments.confidence_threshold,
        "draft_steps": arguments.draft_steps,
        "bound_draws": arguments.draws,
        "seed": arguments.seed,
    }
    evaluate_tasks.run(
        arguments.model,
        chosen=arguments.tasks,
        output=arguments.output,
        shots=arguments.shots,
        limit=arguments.limit,
        task_files=arguments.task_files,
        allow_code_execution=arguments.allow_code_execution,
        settings={name: value for name, value in asked.items() if value is not None},
    )
    return 0


def _distil(arguments: argparse.Namespace) -> int:
    _end_cleanly()
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


def _report(arguments: argparse.Namespace) -> int:
    from megatron_twotower.report import write_report

    print(f"report: {write_report(arguments.run_folder)}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from megatron_twotower.doctor import print_doctor

    print_doctor()
    return 0


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue, shown while it is written")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to continue in batches: one a line, or .jsonl with a field `prompt`",
    )
    generate.add_argument(
        "--mode",
        default="mask_diffusion",
        metavar="MODE",
        help="mask_diffusion, mock_ar, ar, speculative; of --prompt also all",
    )
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--block-size", type=int, default=16)
    generate.add_argument("--steps-per-block", type=int, default=16)
    generate.add_argument("--confidence-threshold", type=float, default=0.8)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the most probable tokens")
    generate.add_argument("--top-k", type=int, help="sample among so many tokens")
    generate.add_argument("--top-p", type=float, help="sample among the tokens that make up so much probability")
    generate.add_argument("--draft-steps", type=int, default=1, help="denoiser passes to a draft, mode speculative")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--device",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="one, or the context tower's and the denoiser's; CUDA where there is any",
    )
    generate.add_argument("--html", type=Path, metavar="FILE", help="page that replays the denoising of --prompt")
    generate.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines for --prompts, in their order; a run that was cut off goes on",
    )
    generate.add_argument("--batch-size", type=int, default=16, help="prompts written at a time")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"twotower: {message} (see {self.prog} --help)\n")


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    """What is left out stays as `EvaluationSettings` and `HarnessSettings` have it."""
    evaluate.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    evaluate.add_argument("--output", type=Path, required=True, help="JSON file to write; pictures stand beside it")
    evaluate.add_argument("--block-size", type=int, help="tokens per block, as trained (16)")
    evaluate.add_argument("--confidence-threshold", type=float, metavar="P", help="where it is not swept (0.8)")
    evaluate.add_argument("--new-tokens", type=int, help="tokens to write (96; tasks that do not say: 256)")
    evaluate.add_argument("--draws", type=int, help="noise draws per block of the likelihood bound (4; tasks: 16)")
    evaluate.add_argument("--seed", type=int)
    text = evaluate.add_argument_group("likelihoods and sweeps on held-out text")
    text.add_argument("--data", type=Path, help="prepared data folder, of which the held-out part is read")
    text.add_argument("--sequences", type=int, help="stretches of text to score (32)")
    text.add_argument("--length", type=int, help="tokens of each (256)")
    text.add_argument("--thresholds", type=float, nargs="*", metavar="P", help="confidence thresholds to try")
    text.add_argument("--block-sizes", type=int, nargs="*", metavar="S", help="other block sizes to try")
    text.add_argument("--steps", type=int, nargs="*", metavar="N", help="passes per block to try")
    text.add_argument("--every", action="store_true", help="all combinations of these, not one list at a time")
    text.add_argument("--prompts", type=int, help="texts to continue with each setting (6)")
    text.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (64)")
    text.add_argument("--samples", type=int, help="prompts to continue in every mode, for reading (2)")
    tasks = evaluate.add_argument_group("tasks of lm-evaluation-harness (needs the extra `eval`)")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="the harness's names, recipes of recipes/evaluation (card), or their paths",
    )
    tasks.add_argument("--mode", choices=("mask_diffusion", "mock_ar", "ar", "speculative"), help="of writing")
    tasks.add_argument(
        "--scoring",
        choices=("ar", "bound", "mock_ar"),
        help="of given answers: context tower (default), diffusion bound or mock AR",
    )
    tasks.add_argument("--shots", type=int, help="examples before each question, in place of the recipe's")
    tasks.add_argument("--limit", type=int, help="documents of each task")
    tasks.add_argument("--batch-size", type=int, help="rows at a time (8)")
    tasks.add_argument("--max-length", type=int, help="tokens of context and answer; the model's own")
    tasks.add_argument("--steps-per-block", type=int, help="passes per block at most (16)")
    tasks.add_argument("--draft-steps", type=int, help="denoiser passes to a draft, mode speculative (1)")
    tasks.add_argument("--task-files", type=Path, metavar="DIR", help="folder of further task files")
    tasks.add_argument("--allow-code-execution", action="store_true", help="run code that the model writes")


def _add_convert(convert: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """`convert`: weights both ways."""
    read = command(
        convert,
        "import",
        _import,
        "make a training run of a Hugging Face folder, its weights verified",
        "twotower convert import --from models/two-tower --to runs/continued",
    )
    export = command(
        convert,
        "export",
        _export,
        "write a run's checkpoint, or a converted folder, for Hugging Face",
        "twotower convert export --from runs/twotower --to runs/model",
    )
    read.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="Hugging Face folder: a NemotronH, two towers, or a denoiser alone",
    )
    export.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="output folder of a training run, or a Hugging Face folder",
    )
    for each in (read, export):
        each.add_argument("--to", type=Path, required=True, help="folder to write")
        each.add_argument("--backbone", type=Path, help="folder of the backbone of a denoiser alone, where it moved")
    export.add_argument("--what", choices=("two_tower", "context", "denoiser"), help="all there is if left out")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the tensors; each as it is stored if left out"
    )
    export.add_argument(
        "--style",
        choices=("hub", "transformers"),
        help="of a plain NemotronH: one tensor per expert, or stacked; as it was, or hub",
    )
    export.add_argument("--step", type=int, help="of the checkpoint; the newest if left out")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="twotower", description="Train two-tower diffusion language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group: Any, name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        added = group.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    train = command(
        commands,
        "train",
        _train,
        "train as a recipe says",
        "twotower train recipe=quickstart data.folder=data optimizer.learning_rate=3e-4",
    )
    train.add_argument(
        "settings", nargs="+", metavar="recipe=NAME key=value", help="the recipe, and what to change in it"
    )
    once = train.add_mutually_exclusive_group()
    once.add_argument("--dry-run", action="store_true", help="build the model, take no step")
    once.add_argument("--multirun", action="store_true", help="a run for each value of keys with several: seed=1,2")

    plan = command(
        commands,
        "plan",
        _plan,
        "memory, traffic and time of a layout, before any GPU is taken",
        "twotower plan recipe=nano_30b_a3b_phase1 parallel=h100x64 --search",
    )
    plan.add_argument("settings", nargs="+", metavar="recipe=NAME key=value", help="as for train")
    plan.add_argument("--ranks", type=int, help="the layout's own (parallel.ranks) if left out")
    plan.add_argument(
        "--utilisation", type=float, default=0.25, help="assumed share of the card's dense BF16 peak while computing"
    )
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="gpu.json of `twotower bench gpu`, whose utilisation is taken instead",
    )
    plan.add_argument(
        "--scaling",
        nargs="+",
        type=int,
        default=[],
        metavar="CARDS",
        help="an estimate for each number of cards: 8 64 256 1024",
    )
    plan.add_argument("--link-share", type=float, default=0.7, help="assumed share of the links' speed")
    plan.add_argument("--search", action="store_true", help="rank other layouts of so many cards")
    plan.add_argument("--rows", type=int, default=10, help="layouts to show")
    plan.add_argument("--json", action="store_true", help="bytes, seconds and operations as JSON")

    data = commands.add_parser("data", help="make a tokenizer, prepare shards").add_subparsers(
        required=True, metavar="COMMAND"
    )
    tokenizer = command(
        data,
        "tokenizer",
        _tokenizer,
        "train a byte-level BPE tokenizer on text files",
        "twotower data tokenizer --input python-stdlib --output runs/tokenizer",
    )
    shards = command(
        data,
        "prepare",
        _prepare,
        "tokenise text, JSON lines or parquet into WebDataset shards",
        "twotower data prepare --input texts/ more.jsonl.zst --tokenizer runs/tokenizer "
        "--output runs/data --workers 16",
    )
    for each in (tokenizer, shards):
        each.add_argument(
            "--input",
            nargs="+",
            required=True,
            help="files, folders of text, .jsonl (.gz, .zst), .parquet; or python-stdlib",
        )
        each.add_argument("--output", type=Path, required=True, help="folder to write")
        each.add_argument(
            "--holdout",
            type=float,
            default=0.05,
            help="share set aside for validation: of files by name, of records by text",
        )
        each.add_argument("--text-field", default="text", help="field or column of a record that holds its text")
        each.add_argument("--suffixes", nargs="+", default=[".md", ".py", ".txt"], help="text files of a folder")
    tokenizer.add_argument("--vocab-size", type=int, default=4096, help="entries")
    shards.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    shards.add_argument("--shard-tokens", type=int, default=1_000_000, help="tokens per shard")
    shards.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    shards.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores")
    shards.add_argument(
        "--max-malformed",
        type=float,
        default=0.001,
        help="malformed records to pass over: a share of all below 1, else a number",
    )
    shards.add_argument("--min-tokens", type=int, default=1, help="leave out shorter documents")
    shards.add_argument("--max-tokens", type=int, help="leave out longer documents")
    shards.add_argument("--no-dedup", dest="deduplicate", action="store_false", help="keep repeated documents")
    shards.add_argument("--bos", choices=("none", "document"), default="none", help="begin each document with BOS")
    shards.add_argument("--eos", choices=("none", "document"), default="document", help="end each document with EOS")
    inspect = command(
        data,
        "inspect",
        _inspect,
        "counts, lengths, decoded samples with their block boundaries",
        "twotower data inspect runs/data --block-size 16 --picture lengths.png",
    )
    verify = command(
        data,
        "verify",
        _verify,
        "check shards, indices, token range and tokenizer, naming each fault",
        "twotower data verify runs/data --tokenizer recipes/backbones/small",
    )
    for each in (inspect, verify):
        each.add_argument("data", help="prepared folder, URL of one, or blend file")
        each.add_argument("--folder", help="where the corpora of a blend are; beside the blend file if left out")
    inspect.add_argument("--split", default="train", help="of a prepared folder")
    inspect.add_argument("--samples", type=int, default=3, help="documents to show")
    inspect.add_argument("--block-size", type=int, default=16, help="tokens per block")
    inspect.add_argument("--picture", type=Path, default=Path("lengths.png"), help="PNG file to write")
    inspect.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to decode with; the data's own")
    verify.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that the data must be of")
    verify.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores")

    _add_convert(
        commands.add_parser("convert", help="move weights to and from Hugging Face").add_subparsers(
            required=True, metavar="COMMAND"
        ),
        command,
    )
    _add_generate(
        command(
            commands,
            "generate",
            _generate,
            "write text with an exported model",
            "twotower generate --model runs/model --prompt 'def main():' --mode all --html replay.html\n"
            "  twotower generate --model runs/model --prompts prompts.jsonl --output texts.jsonl --batch-size 32",
        )
    )

    evaluate = command(
        commands,
        "evaluate",
        _evaluate,
        "likelihoods, speed against quality, and benchmark tasks",
        "twotower evaluate --model runs/model --data runs/data --output evaluation.json\n  "
        "twotower evaluate --model runs/model --tasks card --mode mask_diffusion --output card.json",
    )
    _add_evaluate(evaluate)

    bench_commands.add(
        commands.add_parser("bench", help="measure speed and memory").add_subparsers(required=True, metavar="COMMAND"),
        command,
    )
    distil = command(
        commands,
        "distil",
        _distil,
        "text of the context tower, to train its denoiser on",
        "twotower distil --model runs/model --data runs/data --output runs/distilled.jsonl",
    )
    distil.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    distil.add_argument("--data", type=Path, required=True, help="prepared data folder; prompts are its training text")
    distil.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines for `data prepare`")
    distil.add_argument("--sequences", type=int, default=4096, help="how many")
    distil.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt")
    distil.add_argument("--new-tokens", type=int, default=192, help="tokens to write behind it")
    distil.add_argument("--batch-size", type=int, default=64, help="texts written at a time")
    report = command(
        commands,
        "report",
        _report,
        "one page of figures and pictures of a quickstart run",
        "twotower report --run runs/quickstart",
    )
    report.add_argument("--run", dest="run_folder", type=Path, required=True)
    command(
        commands,
        "doctor",
        _doctor,
        "say what this machine has and which implementation serves each role",
        "twotower doctor",
    )
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. argparse takes no `key=value` behind an option that stands between two of them: they are added."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and "settings" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 2 the user's mistake, 75 stopped early with its state saved."""
    arguments = _parsed(argv)
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
