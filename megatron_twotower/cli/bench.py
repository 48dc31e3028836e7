"""The commands of `bench`, which measure the numbers in the README."""

import argparse
import os
from pathlib import Path

from megatron_twotower.cli.command import Command, Group, Idle
from megatron_twotower.cli.generate import add_device
from megatron_twotower.cli.options import COUNT, add_number, add_options, arguments_for, flags, option

ROUNDS = {
    "repeats": option("counted rounds, after one that is not counted", **COUNT),
    "budget_seconds": option(
        "fewer rounds, but at least 3, if they would take longer", "--budget", metavar="SECONDS", at_least=0
    ),
}
QUICK_HELP = "tiny sizes, in seconds: only to see that it works"


def _quick(*options: str) -> tuple[Idle]:
    """The options in whose place `--quick` has its own sizes."""
    return (Idle(options, lambda found: found.quick, "--quick"),)


def _add_output(parser: argparse.ArgumentParser, what: str = "the JSON", *, default: str = "runs/bench") -> None:
    parser.add_argument("--output", type=Path, default=Path(default), help=f"folder for {what}")


def _add_model(parser: argparse.ArgumentParser, *, more: str = "") -> None:
    parser.add_argument("--model", type=Path, required=True, help=f"two-tower Hugging Face folder{more}")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="prepared data folder, whose held-out part is read")


def _add_all_threads(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    add_number(parser, "--threads", default=cores, help="CPU threads; the number of cores if left out", **COUNT)


def _add_torch_threads(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--threads", help="CPU threads; torch's own choice if left out", **COUNT)


def _add_recipe(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the keys to change in the recipe")
    parser.add_argument("--recipe", default=recipe, help="name or path of the recipe")


OPS = {
    "operations": option(
        "all if left out", "--operation", choices=("scan", "attention", "head", "convolution"), default=[]
    ),
    "lengths": option("tokens; up to 8192 if left out", "--length", **COUNT),
    "blocks": option("tokens per block; 4 to 128 if left out", "--block", **COUNT),
    "dtype": option("dtype of the tensors", choices=("fp32", "bf16")),
} | ROUNDS


def _add_ops(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import ops

    add_options(parser, ops.run, OPS)
    _add_all_threads(parser)
    _add_output(parser, "the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _ops(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import ops

    ops.run(arguments.output, **arguments_for(OPS, arguments), threads=arguments.threads, quick=arguments.quick)
    return 0


STEP = {
    "lengths": option("sequence lengths, at the recipe's tokens per step", **COUNT),
    "draws": option("noise draws per context pass", **COUNT),
    "seeds": option("gradients for each variance", at_least=2),
} | ROUNDS


def _add_step(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import step

    _add_recipe(parser, "bench_step")
    add_options(parser, step.StepOptions, STEP)
    _add_all_threads(parser)
    _add_output(parser, "the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _step(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import step

    step.run(
        arguments.output,
        recipe=arguments.recipe,
        overrides=arguments.settings,
        options=step.StepOptions(**arguments_for(STEP, arguments)),
        threads=arguments.threads,
        quick=arguments.quick,
    )
    return 0


CONTEXT = {
    "length_tokens": option("sequence length of the short case", "--length", at_least=1),
    "ranks": option("ranks that share a sequence", at_least=2),
    "repeats": option("rounds; in each of them every case takes one step", at_least=1),
}


def _add_context(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import context

    _add_recipe(parser, "bench_step")
    add_options(parser, context.ContextOptions, CONTEXT)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _context(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import context

    context.run(
        arguments.output,
        recipe=arguments.recipe,
        overrides=arguments.settings,
        options=context.ContextOptions(**arguments_for(CONTEXT, arguments)),
        quick=arguments.quick,
    )
    return 0


GPU = {
    "layers": option("the first N layers of the pattern; 0 for as many as fit", at_least=0),
    "ladder": option("measure what each setting and kernel brings, too"),
    "rungs": option("only these rungs of the ladder, by name", metavar="NAME"),
} | ROUNDS


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench.gpu import command as gpu

    _add_recipe(parser, "bench_gpu")
    add_options(parser, gpu.GpuOptions, GPU)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _gpu(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench.gpu import command as gpu

    complete = gpu.run(
        arguments.output,
        recipe=arguments.recipe,
        overrides=arguments.settings,
        options=gpu.GpuOptions(**arguments_for(GPU, arguments)),
        quick=arguments.quick,
    )
    return 0 if complete else 1


def _data(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import data

    arguments.output.mkdir(parents=True, exist_ok=True)
    data.run(arguments.output / "data.json")
    return 0


PREPARE = {
    "megabytes": option("characters of text in millions, at most", above=0, at_most=1000),
    "rounds": option("counted rounds, after one that is not counted", **COUNT),
    "tokenizer": option("Hugging Face tokenizer folder; that of the shipped backbone if left out"),
    "unit_bytes": option("bytes that a worker reads at a time where workers are compared", **COUNT),
    "documents": option("documents of the largest made-up corpus to decide on", at_least=10),
}


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import prepare

    add_options(parser, prepare.PrepareOptions, PREPARE)
    _add_output(parser)


def _prepare(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import prepare

    prepare.run(arguments.output, options=prepare.PrepareOptions(**arguments_for(PREPARE, arguments)))
    return 0


GENERATE = {
    "batch_sizes": option("prompts in a batch", **COUNT),
    "modes": option("modes of generation"),
    "prompts": option("number of prompts", **COUNT),
    "new_tokens": option("tokens to write after each prompt", **COUNT),
    "confidence_threshold": option("commit at once the tokens that are more probable than this", at_least=0, at_most=1),
} | ROUNDS


def _add_generate(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import generate

    _add_model(parser)
    add_options(parser, generate.GenerateOptions, GENERATE)
    add_device(parser)
    _add_all_threads(parser)
    _add_output(parser, "the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _generate(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import generate

    options = generate.GenerateOptions(**arguments_for(GENERATE, arguments))
    generate.run(
        arguments.output,
        model=arguments.model,
        options=generate.quick(options) if arguments.quick else options,
        devices=arguments.device,
        threads=arguments.threads,
    )
    return 0


METHODS = {
    "prompts": option("held-out prompts", **COUNT),
    "prompt_tokens": option("tokens of a prompt", **COUNT),
    "new_tokens": option("tokens to write after each prompt", at_least=4),
    "thresholds": option("confidence thresholds of mask diffusion", at_least=0, at_most=1),
    "lookup_tokens": option("tokens that prompt lookup drafts at most", **COUNT),
    "draft_tokens": option("tokens that the smaller model drafts", **COUNT),
    "rounds": option("times that every method continues every prompt; the median counts", **COUNT),
}


def _add_methods(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import methods

    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--draft", type=Path, help="a smaller NemotronH with the same tokenizer, which drafts, too")
    add_options(parser, methods.MethodOptions, METHODS)
    _add_all_threads(parser)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _methods(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import methods

    methods.run(
        arguments.output,
        model=arguments.model,
        data=arguments.data,
        draft=arguments.draft,
        options=methods.QUICK if arguments.quick else methods.MethodOptions(**arguments_for(METHODS, arguments)),
        threads=arguments.threads,
    )
    return 0


CONVERT = {"size_mib": option("size of the model in bfloat16", "--size", metavar="MIB", **COUNT)} | ROUNDS


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import convert

    add_options(parser, convert.ConvertOptions, CONVERT)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; the system's temporary folder if left out"
    )
    _add_output(parser)


def _convert(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import convert

    options = convert.ConvertOptions(**arguments_for(CONVERT, arguments))
    convert.run(arguments.output, folder=arguments.folder, options=options)
    return 0


PASSES = {
    "block_size": option("tokens per block; those of the folder if left out", "--block", **COUNT),
    "prompt_tokens": option("tokens of the prompt", **COUNT),
    "rounds": option("counted rounds, after one that is not counted", **COUNT),
}


def _add_passes(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import passes

    _add_model(parser)
    add_options(parser, passes.run, PASSES)
    _add_torch_threads(parser)
    _add_output(parser)


def _passes(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import passes

    sizes = arguments_for(PASSES, arguments)
    passes.run(arguments.output, model=arguments.model, **sizes, threads=arguments.threads)
    return 0


POOLING = {
    "limits": option("experts of a block to try; those of a token and all are always tried", nargs="*", **COUNT),
    "prompts": option("held-out prompts", **COUNT),
    "prompt_tokens": option("tokens of a prompt", **COUNT),
    "new_tokens": option("tokens to write after each prompt", **COUNT),
    "confidence_threshold": option("of mask diffusion", at_least=0, at_most=1),
    "rounds": option("passes to time with each limit", **COUNT),
}


def _add_pooling(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import pooling

    _add_model(parser)
    _add_data(parser)
    add_options(parser, pooling.PoolingOptions, POOLING)
    _add_all_threads(parser)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _pooling(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import pooling

    options = pooling.QUICK if arguments.quick else pooling.PoolingOptions(**arguments_for(POOLING, arguments))
    pooling.run(
        arguments.output, model=arguments.model, data=arguments.data, options=options, threads=arguments.threads
    )
    return 0


PREFILL = {
    "lengths": option("tokens of the prompt", **COUNT),
    "chunk_sizes": option(
        "positions that are read at a time; 0 for the complete prompt", "--prefill-chunk-sizes", at_least=0
    ),
    "repeats": option("counted rounds of each case", **COUNT),
}


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import prefill

    _add_model(parser)
    add_options(parser, prefill.PrefillOptions, PREFILL)
    _add_all_threads(parser)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _prefill(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import prefill

    options = prefill.QUICK if arguments.quick else prefill.PrefillOptions(**arguments_for(PREFILL, arguments))
    prefill.run(arguments.output, model=arguments.model, options=options, threads=arguments.threads)
    return 0


FP8 = {
    "sequences": option("windows of held-out text", at_least=2),
    "length_tokens": option("tokens of each window", "--length", at_least=2),
    "block_size_tokens": option(
        "tokens per block of the denoiser; those of the folder if left out", "--block", **COUNT
    ),
}


def _add_fp8(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import fp8

    _add_model(parser, more=", or that of a backbone")
    _add_data(parser)
    add_options(parser, fp8.Fp8Options, FP8)
    _add_torch_threads(parser)
    _add_output(parser)
    parser.add_argument("--quick", action="store_true", help="two short sequences: only to see that it works")


def _fp8(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import fp8

    options = fp8.QUICK if arguments.quick else fp8.Fp8Options(**arguments_for(FP8, arguments))
    fp8.run(arguments.output, model=arguments.model, data=arguments.data, options=options, threads=arguments.threads)
    return 0


SOAK = {
    "minutes": option("how long", default=60.0, above=0),
    "counts": option("ranks to start it on; each start takes one of several numbers at random", "--ranks", **COUNT),
    "seed": option("seed of the kills", at_least=0),
}


def _add_soak(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.bench import soak

    add_options(parser, soak.run, SOAK)
    _add_output(parser, "the runs and the JSON", default="runs/soak")


def _soak(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import soak

    return 0 if soak.run(arguments.output, **arguments_for(SOAK, arguments)) else 1


GROUP = Group(
    "bench",
    "measure speed and memory",
    (
        Command(
            "ops",
            "time and peak memory of each two-stream operation against its baselines",
            ("twotower bench ops --operation scan --length 4096 --block 16",),
            _add_ops,
            _ops,
        ),
        Command(
            "step",
            "a two-tower step against the AR step of the same backbone",
            ("twotower bench step model=small --lengths 1024 --draws 1 2",),
            _add_step,
            _step,
            idle=_quick(*flags(STEP)),
        ),
        Command(
            "context",
            "a training step of context-parallel ranks against one rank",
            ("twotower bench context --length 4096",),
            _add_context,
            _context,
            idle=_quick(*flags(CONTEXT)),
        ),
        Command(
            "prefill",
            "time and memory of reading a prompt, against its length",
            ("twotower bench prefill --model runs/model --lengths 8192 32768 131072",),
            _add_prefill,
            _prefill,
            idle=_quick(*flags(PREFILL)),
        ),
        Command(
            "gpu",
            "AR and two-tower steps of full-width layers on one GPU",
            ("twotower bench gpu train.precision=bf16 --ladder",),
            _add_gpu,
            _gpu,
            idle=_quick(*flags(ROUNDS)),
        ),
        Command(
            "data",
            "the loader against plain webdataset and Megatron's data sets",
            ("twotower bench data",),
            _add_output,
            _data,
        ),
        Command(
            "prepare",
            "one core from text to shards, against the tokenizer alone, Megatron-LM's way and datatrove",
            ("twotower bench prepare --megabytes 16",),
            _add_prepare,
            _prepare,
        ),
        Command(
            "generate",
            "bulk text: tokens per second against batch size, by mode",
            ("twotower bench generate --model runs/model --batch-sizes 1 8 32",),
            _add_generate,
            _generate,
            idle=_quick(*(flag for flag in flags(GENERATE) if flag != "--modes")),
        ),
        Command(
            "methods",
            "mask diffusion and drafts of the denoiser against AR, prompt lookup and a smaller model that drafts",
            ("twotower bench methods --model runs/bytes/fp32 --data runs/bytes/data --draft runs/bytes/draft",),
            _add_methods,
            _methods,
            idle=(*_quick(*flags(METHODS)), Idle(("--draft-tokens",), lambda found: found.draft is None, "no --draft")),
        ),
        Command(
            "convert",
            "import and export against cp of the same bytes",
            ("twotower bench convert --size 4096 --folder /scratch",),
            _add_convert,
            _convert,
        ),
        Command(
            "passes",
            "a denoiser pass against an AR step, and where the time is spent",
            ("twotower bench passes --model runs/quickstart/model",),
            _add_passes,
            _passes,
        ),
        Command(
            "pooling",
            "a limit of experts for a block: quality, experts that a pass uses, time",
            ("twotower bench pooling --model runs/bytes/fp32 --data runs/bytes/data --limits 3 4 6",),
            _add_pooling,
            _pooling,
            idle=_quick(*flags(POOLING)),
        ),
        Command(
            "fp8",
            "what FP8 weights of the context tower change in predictions (emulated)",
            ("twotower bench fp8 --model runs/quickstart/model --data runs/quickstart/data",),
            _add_fp8,
            _fp8,
            idle=_quick(*flags(FP8)),
        ),
        Command(
            "soak",
            "kill a small training again and again, and account for every sample",
            ("twotower bench soak --minutes 60",),
            _add_soak,
            _soak,
        ),
    ),
)
