"""The command `evaluate`: on held-out text with `--data`, on benchmark tasks with `--tasks`."""

import argparse
from pathlib import Path

from megatron_twotower.cli.command import Command, Idle
from megatron_twotower.cli.engine import ENGINE_FLAGS, ONE_PROCESS_IDLE, add_engine, one_process_settings
from megatron_twotower.cli.options import COUNT, add_number, add_options, arguments_for, flags, option
from megatron_twotower.common.errors import UserError

# Options of both kinds of evaluation, as parameters of EvaluationSettings.
SHARED = {
    "block_size_tokens": option("tokens per block; those of the folder if left out", "--block-size", **COUNT),
    "threshold": option(
        "confidence threshold where it is not swept", "--confidence-threshold", metavar="P", at_least=0, at_most=1
    ),
    "new_tokens": option("tokens to write", "--new-tokens", **COUNT),
    "bound_draws": option("noise draws per block of the likelihood bound", "--draws", **COUNT),
    # numpy's generators, which the harness seeds too, take 32 bits.
    "seed": option("seed of the noise and the sampling", "--seed", at_least=0, below=2**32),
}
# The same options, as parameters of HarnessSettings.
SHARED_WITH_TASKS = {
    "block_size": SHARED["block_size_tokens"],
    "confidence_threshold": SHARED["threshold"],
    "max_new_tokens": SHARED["new_tokens"],
    "bound_draws": SHARED["bound_draws"],
    "seed": SHARED["seed"],
}
# Of both kinds too. Left out, tasks are compared as their recipe says.
COMPARED = {
    "thresholds": option("confidence thresholds to try", nargs="*", metavar="P", at_least=0, at_most=1),
    "block_sizes": option("other block sizes to try", nargs="*", metavar="S", **COUNT),
    "samplers": option(
        "samplers of mask diffusion to try, each a name and numbers such as factor:0.9 (docs/generation.md)",
        nargs="*",
        metavar="NAME:NUMBERS",
    ),
}
HELD_OUT = {
    "sequences": option("windows of text to score", at_least=2),
    "sequence_length_tokens": option("tokens of each window", "--length", at_least=2),
    "steps": option("denoiser passes per block to try", nargs="*", metavar="N", **COUNT),
    "every": option("try all combinations of these, not one list at a time"),
    "prompts": option("prompts to continue with each setting", **COUNT),
    "prompt_tokens": option("tokens of each prompt", **COUNT),
    "samples": option("prompts to continue in every mode, for reading", at_least=0),
}
TASKS = {
    "mode": option("how answers are written", choices=("mask_diffusion", "mock_ar", "ar", "speculative")),
    "scoring": option(
        "how given answers are scored: by the context tower, the diffusion bound or mock AR",
        choices=("ar", "bound", "mock_ar"),
    ),
    "batch_size": option("rows at a time", **COUNT),
    "max_length_tokens": option(
        "tokens of context and answer; the model's own if left out", "--max-length", at_least=2
    ),
    "steps_per_block": option("denoiser passes per block, at most, mode mask_diffusion", **COUNT),
    "draft_steps": option("denoiser passes per draft, mode speculative", **COUNT),
    "prefill_chunk_size": option("positions of each context that the context tower reads at a time", **COUNT),
    "sampler": option("another rule to commit tokens than the confidence threshold", metavar="NAME:NUMBERS"),
}
DRAFTS = {
    "drafts": option(
        "tokens that the denoiser sees for drafts that the context tower verifies, to compare with AR",
        nargs="*",
        metavar="S",
        at_least=2,
    )
}
TASK_OPTIONS = ("--shots", "--limit", "--task-files", "--allow-code-execution", "--apply-chat-template", "--questions")


# The options of one mode or scoring are accepted with another one: a comparison of them has one
# command line.
IDLE = (
    Idle(("--data", *flags(HELD_OUT)), lambda found: bool(found.tasks), "--tasks"),
    Idle((*flags(TASKS | DRAFTS), *TASK_OPTIONS, *ENGINE_FLAGS), lambda found: not found.tasks, "no --tasks"),
    *ONE_PROCESS_IDLE,
    Idle(("--confidence-threshold",), lambda found: found.sampler is not None, "--sampler"),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from megatron_twotower.evaluate.harness_settings import Compared, HarnessSettings
    from megatron_twotower.evaluate.held_out import EvaluationSettings

    parser.add_argument("--model", type=Path, required=True, help="two-tower Hugging Face folder")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file to write; the pictures are written next to it"
    )
    add_options(parser, EvaluationSettings, SHARED | COMPARED, unset=True)
    text = parser.add_argument_group("likelihoods and sweeps on held-out text")
    text.add_argument("--data", type=Path, help="prepared data folder, whose held-out text or answers are read")
    add_options(text, EvaluationSettings, HELD_OUT, unset=True)
    tasks = parser.add_argument_group(
        "tasks of lm-evaluation-harness (needs the extra `eval`)",
        f"Other defaults than above: --new-tokens {HarnessSettings.max_new_tokens} for tasks that do not say, "
        f"--draws {HarnessSettings.bound_draws}.",
    )
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="the harness's names, recipes of recipes/evaluation (card, code_small), or their paths",
    )
    add_options(tasks, HarnessSettings, TASKS, unset=True)
    add_options(tasks, Compared, DRAFTS, unset=True)
    add_number(tasks, "--shots", help="examples before each question, in place of the recipe's", at_least=0)
    add_number(tasks, "--limit", help="documents of each task", **COUNT)
    tasks.add_argument("--task-files", type=Path, metavar="DIR", help="folder of further task files")
    tasks.add_argument(
        "--questions", type=Path, metavar="DIR", help="folder of `twotower data questions`; made anew if left out"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="ask questions as turns of a conversation")
    tasks.add_argument("--allow-code-execution", action="store_true", help="run code that the model writes")
    add_engine(tasks)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.tasks:
        return _run_tasks(arguments)
    if arguments.data is None:
        raise UserError("evaluate: found neither --data nor --tasks, expected a prepared data folder or task names")
    from megatron_twotower.evaluate import answers, held_out

    settings = held_out.EvaluationSettings(**arguments_for(SHARED | COMPARED | HELD_OUT, arguments))
    run = answers.run if answers.has_conversations(arguments.data) else held_out.run
    run(arguments.model, data=arguments.data, output=arguments.output, settings=settings)
    return 0


def _run_tasks(arguments: argparse.Namespace) -> int:
    from megatron_twotower.evaluate import tasks
    from megatron_twotower.evaluate.harness_settings import Compared

    compare = arguments_for(COMPARED | DRAFTS, arguments)
    tasks.run(
        arguments.model,
        chosen=arguments.tasks,
        output=arguments.output,
        shots=arguments.shots,
        limit=arguments.limit,
        task_files=arguments.task_files,
        allow_code_execution=arguments.allow_code_execution,
        engine=one_process_settings(arguments),
        apply_chat_template=arguments.apply_chat_template,
        questions=arguments.questions,
        compare=Compared(**compare) if compare else None,
        settings=arguments_for(SHARED_WITH_TASKS | TASKS, arguments),
    )
    return 0


COMMAND = Command(
    "evaluate",
    "measure likelihoods, speed against quality, and benchmark tasks",
    (
        "twotower evaluate --model runs/model --data runs/data --output evaluation.json",
        "twotower evaluate --model runs/model --tasks card --mode mask_diffusion --output card.json",
        "twotower evaluate --model runs/model --tasks code_small --output code.json",
    ),
    _add_options,
    _run,
    idle=IDLE,
)
