"""The commands of `twotower bench`: what the README's figures are measured with."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _ops(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import ops

    ops.run(
        arguments.output,
        operations=arguments.operation,
        lengths=arguments.length,
        blocks=arguments.block,
        dtype=arguments.dtype,
        repeats=arguments.repeats,
        budget_seconds=arguments.budget,
        threads=arguments.threads,
        quick=arguments.quick,
    )
    return 0


def _step(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import step

    options = step.StepOptions(
        lengths=arguments.lengths,
        draws=arguments.draws,
        repeats=arguments.repeats,
        budget_seconds=arguments.budget,
        seeds=arguments.seeds,
    )
    step.run(
        arguments.output,
        recipe=arguments.recipe,
        overrides=arguments.settings,
        options=options,
        threads=arguments.threads,
        quick=arguments.quick,
    )
    return 0


def _gpu(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench.gpu import command as gpu

    options = gpu.GpuOptions(
        layers=arguments.layers,
        repeats=arguments.repeats,
        budget_seconds=arguments.budget,
        ladder=arguments.ladder,
        rungs=arguments.rungs,
    )
    whole = gpu.run(
        arguments.output, recipe=arguments.recipe, overrides=arguments.settings, options=options, quick=arguments.quick
    )
    return 0 if whole else 1


def _data(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import data

    arguments.output.mkdir(parents=True, exist_ok=True)
    data.run(arguments.output / "data.json")
    return 0


def _passes(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import passes

    passes.run(
        arguments.output,
        model=arguments.model,
        block_size=arguments.block,
        prompt_tokens=arguments.prompt_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
    )
    return 0


def _fp8(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import fp8

    options = (
        fp8.QUICK
        if arguments.quick
        else fp8.Fp8Options(
            sequences=arguments.sequences, length_tokens=arguments.length, block_size_tokens=arguments.block
        )
    )
    fp8.run(arguments.output, model=arguments.model, data=arguments.data, options=options, threads=arguments.threads)
    return 0


def _soak(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import soak

    clean = soak.run(arguments.output, minutes=arguments.minutes, counts=arguments.ranks, seed=arguments.seed)
    return 0 if clean else 1


def _generate(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import generate

    options = generate.GenerateOptions(
        prompts=arguments.prompts,
        new_tokens=arguments.new_tokens,
        batch_sizes=tuple(arguments.batch_sizes),
        modes=tuple(arguments.modes),
        confidence_threshold=arguments.confidence_threshold,
        repeats=arguments.repeats,
        budget_seconds=arguments.budget,
    )
    generate.run(
        arguments.output,
        model=arguments.model,
        options=generate.quick(options) if arguments.quick else options,
        devices=arguments.device,
        threads=arguments.threads,
    )
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from megatron_twotower.bench import convert

    options = convert.ConvertOptions(
        size_mib=arguments.size, repeats=arguments.repeats, budget_seconds=arguments.budget
    )
    convert.run(arguments.output, folder=arguments.folder, options=options)
    return 0


def add(bench: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare them; `command` is the maker of a command that `cli.py` has."""
    ops = command(
        bench,
        "ops",
        _ops,
        "time and peak memory of each two-stream operation against its rivals",
        "twotower bench ops --operation scan --length 4096 --block 16",
    )
    step = command(
        bench,
        "step",
        _step,
        "a two-tower step against the AR step of the same backbone",
        "twotower bench step model=small --lengths 1024 --draws 1 2",
    )
    gpu = command(
        bench,
        "gpu",
        _gpu,
        "AR and two-tower steps of full-width layers on one GPU",
        "twotower bench gpu train.precision=bf16 --ladder",
    )
    gpu.add_argument("--layers", type=int, default=0, help="the first so many of the pattern; as many as fit")
    gpu.add_argument("--ladder", action="store_true", help="measure what each setting and kernel brings, too")
    gpu.add_argument("--rungs", nargs="+", default=[], metavar="NAME", help="these of the ladder alone, by name")
    data = command(
        bench, "data", _data, "the loader against plain webdataset and Megatron's data sets", "twotower bench data"
    )
    data.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    generate = command(
        bench,
        "generate",
        _generate,
        "bulk text: tokens per second against batch size, by mode",
        "twotower bench generate --model runs/model --batch-sizes 1 8 32",
    )
    generate.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    generate.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    generate.add_argument("--modes", nargs="+", default=["mask_diffusion", "ar", "speculative"])
    generate.add_argument("--prompts", type=int, default=32, help="how many")
    generate.add_argument("--new-tokens", type=int, default=64, help="to each prompt")
    generate.add_argument("--confidence-threshold", type=float, default=0.8)
    generate.add_argument(
        "--device",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="one, or the context tower's and the denoiser's; CUDA where there is any",
    )
    weights = command(
        bench,
        "convert",
        _convert,
        "import and export against cp of the same bytes",
        "twotower bench convert --size 4096 --folder /scratch",
    )
    weights.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    weights.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the model, in bfloat16")
    weights.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one if left out")
    passes = command(
        bench,
        "passes",
        _passes,
        "a denoiser pass against an AR step, and where time goes",
        "twotower bench passes --model runs/quickstart/model",
    )
    passes.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    passes.add_argument("--block", type=int, default=16, help="tokens per block")
    passes.add_argument("--prompt-tokens", type=int, default=64, help="tokens of the text before it")
    passes.add_argument("--rounds", type=int, default=100, help="that are counted, after one that is not")
    passes.add_argument("--threads", type=int, help="of the CPU; torch's own choice if left out")
    passes.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    fp8 = command(
        bench,
        "fp8",
        _fp8,
        "what FP8 weights of the context tower change in predictions (emulated)",
        "twotower bench fp8 --model runs/quickstart/model --data runs/quickstart/tower-data",
    )
    fp8.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder, or a backbone's")
    fp8.add_argument("--data", type=Path, required=True, help="prepared data folder; its held-out part is read")
    fp8.add_argument("--sequences", type=int, default=32, help="of held-out text")
    fp8.add_argument("--length", type=int, default=256, help="tokens of each")
    fp8.add_argument("--block", type=int, default=16, help="tokens per block of the denoiser")
    fp8.add_argument("--threads", type=int, help="of the CPU; torch's own choice if left out")
    fp8.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    fp8.add_argument("--quick", action="store_true", help="two short sequences: only to see that it works")
    soak = command(
        bench,
        "soak",
        _soak,
        "kill a small training again and again, and account for every sample",
        "twotower bench soak --minutes 60",
    )
    soak.add_argument("--minutes", type=float, default=60.0)
    soak.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        default=[2],
        help="ranks to start it on; of several numbers each start takes one by chance",
    )
    soak.add_argument("--seed", type=int, default=0, help="of the kills")
    soak.add_argument("--output", type=Path, default=Path("runs/soak"), help="folder for the runs and the JSON")
    ops.add_argument(
        "--operation",
        nargs="+",
        default=[],
        choices=("scan", "attention", "head", "convolution"),
        help="all if left out",
    )
    ops.add_argument("--length", nargs="+", type=int, default=[], help="tokens; up to 8192 if left out")
    ops.add_argument("--block", nargs="+", type=int, default=[], help="tokens per block; 4 to 128 if left out")
    ops.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    for each, recipe in ((step, "bench_step"), (gpu, "bench_gpu")):
        each.add_argument("settings", nargs="*", metavar="key=value", help="what to change in the recipe")
        each.add_argument("--recipe", default=recipe)
    step.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[512, 1024, 2048],
        help="sequence lengths, at the recipe's tokens per step",
    )
    step.add_argument("--draws", nargs="+", type=int, default=[1, 2, 4], help="noise draws per context pass")
    step.add_argument("--seeds", type=int, default=16, help="gradients for each variance")
    rounds = ((ops, 7, 10.0), (step, 7, 30.0), (gpu, 10, 30.0), (generate, 7, 600.0), (weights, 5, 120.0))
    for each, repeats, budget in rounds:
        each.add_argument("--repeats", type=int, default=repeats, help="rounds, after one that is not counted")
        each.add_argument(
            "--budget",
            type=float,
            default=budget,
            metavar="SECONDS",
            help="fewer rounds, but at least 3, where they would take longer",
        )
    gpu.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    gpu.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: only to see that it works")
    for each in (ops, step, generate):
        each.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="all cores if left out")
        each.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for JSON and picture")
        each.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: only to see that it works")
