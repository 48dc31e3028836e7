"""The command `generate`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command, Idle
from megatron_twotower.cli.engine import ENGINE_FLAGS, ONE_PROCESS_IDLE, add_engine, one_process_settings
from megatron_twotower.cli.options import COUNT, add_options, arguments_for, option
from megatron_twotower.common.errors import UserError

GENERATION = {
    "max_new_tokens": option("tokens to write, at most", **COUNT),
    "block_size": option(
        "tokens per block, modes mask_diffusion and speculative; those of the folder if left out", **COUNT
    ),
    "steps_per_block": option("denoiser passes per block, at most, mode mask_diffusion", **COUNT),
    "confidence_threshold": option(
        "commit at once the tokens that are more probable than this, mode mask_diffusion", at_least=0, at_most=1
    ),
    "sampler": option(
        "another rule to commit tokens than the confidence threshold, mode mask_diffusion: a name and numbers, such "
        "as factor:0.9 (docs/generation.md)",
        metavar="NAME:NUMBERS",
    ),
    "experts_per_block": option(
        "experts that the tokens of a block share in each layer of the denoiser, at most, mode mask_diffusion; all if "
        "left out",
        **COUNT,
    ),
    "temperature": option("0 takes the most probable tokens", at_least=0),
    "top_k": option("sample among the K most probable tokens, temperature above 0", **COUNT),
    "top_p": option(
        "sample among the most probable tokens that have this probability together, temperature above 0",
        above=0,
        at_most=1,
    ),
    "draft_steps": option("denoiser passes per draft, mode speculative", **COUNT),
    "prefill_chunk_size": option("positions of each prompt that the context tower reads at a time", **COUNT),
    "seed": option("seed of the sampling, temperature above 0", at_least=0),
}
QUANTIZATION = {
    "kind": option(
        "quantise the weights of the towers' linear layers while loading (extra `quantize`)",
        "--quantize",
        choices=("int8", "int4", "fp8"),
    ),
    "towers": option("the towers to quantise", "--quantized-towers", choices=("both", "context", "denoiser")),
}
BATCHING = {"batch_size": option("prompts in a batch, with --prompts", **COUNT)}


# The options of one mode are accepted with another one: a comparison of modes has one command line.
IDLE = (
    Idle(("--batch-size", *ENGINE_FLAGS), lambda found: found.prompts is None, "--prompt or --chat"),
    Idle(("--system",), lambda found: not found.chat, "no --chat"),
    Idle(("--quantized-towers",), lambda found: found.quantize is None, "no --quantize"),
    *ONE_PROCESS_IDLE,
    Idle(("--top-k", "--top-p", "--seed"), lambda found: found.temperature == 0, "--temperature 0"),
    Idle(("--confidence-threshold",), lambda found: found.sampler is not None, "--sampler"),
)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `bench generate` has too."""
    parser.add_argument(
        "--device",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="one device, or that of the context tower and that of the denoiser; CUDA if there is any",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.generate.engine import GenerationSettings
    from megatron_twotower.generate.prompt_file import BatchingSettings
    from megatron_twotower.generate.quantization import Quantization

    parser.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue, shown while it is written")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to continue in batches: one a line, or JSON lines or an array with a field `prompt` or "
        "`messages`",
    )
    what.add_argument(
        "--chat", action="store_true", help="a conversation: lines of standard input, and answers to them"
    )
    parser.add_argument("--system", metavar="TEXT", help="turn of the system before a conversation")
    parser.add_argument(
        "--mode",
        default="mask_diffusion",
        metavar="MODE",
        help="mask_diffusion, mock_ar, ar, speculative; with --prompt also all",
    )
    add_options(parser, GenerationSettings, GENERATION)
    add_device(parser)
    add_options(parser, Quantization, QUANTIZATION)
    parser.add_argument("--html", type=Path, metavar="FILE", help="page that replays the denoising of --prompt")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines for --prompts, in their order; an interrupted run resumes",
    )
    add_options(parser, BatchingSettings, BATCHING)
    add_engine(parser)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_twotower.generate import prompt_file, terminal
    from megatron_twotower.generate.engine import GenerationSettings
    from megatron_twotower.generate.quantization import Quantization

    for name, needed in (("output", "prompts"), ("html", "prompt")):
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            raise UserError(f"--{name}: found {getattr(arguments, name)}, expected it with --{needed} alone")
    settings = GenerationSettings(**arguments_for(GENERATION, arguments))
    quantization = Quantization(**arguments_for(QUANTIZATION, arguments))
    if arguments.chat:
        return terminal.chat(
            arguments.model,
            mode=arguments.mode,
            settings=settings,
            system=arguments.system,
            devices=arguments.device,
            quantization=quantization,
        )
    if arguments.prompts is None:
        return terminal.run(
            arguments.model,
            prompt=arguments.prompt,
            mode=arguments.mode,
            settings=settings,
            page=arguments.html,
            devices=arguments.device,
            quantization=quantization,
        )
    if arguments.output is None:
        raise UserError("--output: found none, expected a file for the texts that continue --prompts")
    return prompt_file.run(
        arguments.model,
        prompts=arguments.prompts,
        output=arguments.output,
        mode=arguments.mode,
        settings=settings,
        batching=prompt_file.BatchingSettings(**arguments_for(BATCHING, arguments)),
        devices=arguments.device,
        quantization=quantization,
        engine=one_process_settings(arguments),
    )


COMMAND = Command(
    "generate",
    "write text with an exported model",
    (
        "twotower generate --model runs/model --prompt 'def main():' --mode all --html replay.html",
        "twotower generate --model runs/model --prompts prompts.jsonl --output texts.jsonl --batch-size 32",
        "twotower generate --model /shared/model --prompts prompts.jsonl --output texts.jsonl --engine ray "
        "--address head:6379 --device cuda",
        "twotower generate --model runs/sft/model --chat",
        "twotower generate --model runs/model --prompt 'def main():' --quantize int8",
    ),
    _add_options,
    _run,
    idle=IDLE,
)
