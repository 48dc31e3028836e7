"""The command `bench generate`: tokens per second of generation, by batch size and mode.

The prompts are windows of source text of many lengths. Every case continues all prompts by the same
number of tokens, in batches as `twotower generate --prompts` makes them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.bench import measure
from megatron_twotower.bench.results import report
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table, wide_console
from megatron_twotower.data.documents import find_documents, training_texts
from megatron_twotower.data.tokenizer import text_encoder
from megatron_twotower.generate.engine import (
    GenerationSettings,
    check_mode,
    default_devices,
    generate_ids,
    load,
    pad_left,
    place_towers,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

UNSORTED = ", unsorted"
_SEED = 0

# Token ids and attention mask of a padded batch, see `prompt_file.padded`.
Padded = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class GenerateOptions:
    """What to measure.

    Attributes:
        prompts: The number of prompts.
        shortest: Tokens of the shortest prompt; lengths are log-uniform.
        longest: Tokens of the longest prompt.
        new_tokens: Tokens to generate for each prompt.
        batch_sizes: Prompts per batch.
        modes: Modes of generation. The first one is also measured on unsorted prompts.
        confidence_threshold: See `GenerationSettings`.
        repeats: See `measure.time_cases`.
        budget_seconds: See `measure.time_cases`.
    """

    prompts: int = 32
    shortest: int = 8
    longest: int = 128
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    modes: tuple[str, ...] = ("mask_diffusion", "ar", "speculative")
    confidence_threshold: float = 0.8
    repeats: int = 7
    budget_seconds: float = 600.0


QUICK = GenerateOptions(prompts=4, longest=16, new_tokens=8, batch_sizes=(1, 4), repeats=1)


def quick(options: GenerateOptions) -> GenerateOptions:
    """The modes of the options at tiny sizes, which only show that the command works."""
    return replace(QUICK, modes=options.modes)


def check_options(options: GenerateOptions) -> None:
    """Check the options.

    Raises:
        UserError: A mode is unknown, or a number is too small.
    """
    for mode in options.modes:
        check_mode(mode)
    require(options.prompts >= 1, f"--prompts: found {options.prompts}, expected at least 1")
    require(options.new_tokens >= 1, f"--new-tokens: found {options.new_tokens}, expected at least 1")
    for size in options.batch_sizes:
        require(size >= 1, f"--batch-sizes: found {size}, expected at least 1")


def source_prompts(tokenizer: PreTrainedTokenizerFast, options: GenerateOptions) -> list[list[int]]:
    """Windows of files of Python's standard library, each from the start of a line.

    They are the same in every call.

    Raises:
        UserError: The library has too few files that are long enough.
    """
    rng, encode = random.Random(_SEED), text_encoder(tokenizer)
    prompts: list[list[int]] = []
    for text in training_texts(find_documents(["python-stdlib"]), holdout_fraction=0.0, text_field="text"):
        lines = text.splitlines(keepends=True)
        if len(lines) < 100:
            continue
        first = rng.randrange(len(lines) // 2)
        length = round(math.exp(rng.uniform(math.log(options.shortest), math.log(options.longest))))
        ids = encode(["".join(lines[first : first + options.longest])])[0][:length]
        prompts += [ids] if len(ids) == length else []
        if len(prompts) == options.prompts:
            return prompts
    raise UserError(f"--prompts: found {len(prompts)} files that are long enough, expected {options.prompts}")


def make_batches(prompts: Sequence[list[int]], size: int, *, by_length: bool) -> list[Padded]:
    """Padded batches of all prompts, in order of length or as they come."""
    rows = sorted(prompts, key=len, reverse=True) if by_length else list(prompts)
    return [pad_left(rows[start : start + size]) for start in range(0, len(rows), size)]


def padding_share(batches: Sequence[Padded]) -> float:
    """The share of the prompts' positions that are padding."""
    text = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in batches)
    return 1 - text / sum(ids.numel() for ids, _ in batches)


@dataclass
class GenerationCase:
    """All prompts in batches of one size, in one mode.

    Attributes:
        name: The mode, and whether the prompts are unsorted.
        mode: The mode of generation.
        size: Prompts per batch.
        batches: The prompts.
        stats: Statistics of the newest run, one entry per batch.
    """

    name: str
    mode: str
    size: int
    batches: list[Padded]
    stats: list[GenerationStats]

    @property
    def key(self) -> str:
        """The name of the timed case."""
        return f"{self.name}, {self.size}"

    def timed(self, model: Model, settings: GenerationSettings, mask_id: int) -> measure.TimedCase:
        """The case as work that can be timed. A run replaces `stats`."""

        def work() -> None:
            self.stats.clear()
            for ids, mask in self.batches:
                _, stats = generate_ids(
                    model, ids, mode=self.mode, settings=settings, mask_id=mask_id, eos_id=None, attention_mask=mask
                )
                self.stats.append(stats)

        return measure.TimedCase(self.key, {"write": work})

    def row(self, times: measure.CaseTimes) -> dict[str, Any]:
        """The row for JSON.

        `busy` is the share of rows in forward passes that were not finished yet.
        """
        summary, tokens = times.summary(), sum(stats.new_tokens for stats in self.stats)
        all_rows = sum(s.passes * len(ids) for s, (ids, _) in zip(self.stats, self.batches, strict=True))
        busy_rows = sum(stats.row_passes for stats in self.stats)
        return {
            "case": self.name,
            "mode": self.mode,
            "batch_size": self.size,
            "new_tokens": tokens,
            "tokens_per_second": tokens / summary["median_seconds"],
            "tokens_per_pass": tokens / busy_rows,
            "padding": padding_share(self.batches),
            "busy": busy_rows / all_rows,
            **summary,
        }


def build_cases(
    prompts: Sequence[list[int]], options: GenerateOptions, move: Callable[[Tensor], Tensor]
) -> list[GenerationCase]:
    """Every mode at every batch size, and the first mode also unsorted at batch sizes above 1.

    Args:
        move: Moves a tensor to the device of the model.
    """
    variants = [(mode, mode, True) for mode in options.modes]
    variants.insert(1, (f"{options.modes[0]}{UNSORTED}", options.modes[0], False))

    def moved(size: int, by_length: bool) -> list[Padded]:
        pairs = make_batches(prompts, size, by_length=by_length)
        return [(move(ids), None if mask is None else move(mask)) for ids, mask in pairs]

    return [
        GenerationCase(name, mode, size, moved(size, by_length), [])
        for name, mode, by_length in variants
        for size in options.batch_sizes
        if by_length or size > 1
    ]


def run(
    output: Path,
    *,
    model: Path,
    options: GenerateOptions = GenerateOptions(),
    devices: Sequence[str] = (),
    threads: int,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `generate.json` and `generate.png` to `output`.

    Args:
        devices: One device, or those of the context tower and of the denoiser; CUDA if available
            where empty.

    Raises:
        UserError: An option is wrong, see `check_options`, or the folder is not a two-tower model.
    """
    from megatron_twotower.common import plots

    check_options(options)
    console = console or wide_console()
    towers, tokenizer = load(model)
    place_towers(towers, devices or default_devices())
    settings = GenerationSettings(max_new_tokens=options.new_tokens, confidence_threshold=options.confidence_threshold)
    device = towers.context_tower.device
    cases = build_cases(source_prompts(tokenizer, options), options, lambda tensor: tensor.to(device))
    mask_id = towers.mask_token_id
    with measure.torch_threads(threads), torch.no_grad():
        times = measure.time_cases(
            [case.timed(towers, settings, mask_id) for case in cases],
            repeats=options.repeats,
            budget_seconds=options.budget_seconds,
        )
        facts = machine()
    rows = [case.row(times[case.key]) for case in cases]
    title = (
        f"{options.prompts} prompts of {options.shortest} to {options.longest} tokens, {options.new_tokens} new tokens "
        f"each, threshold {options.confidence_threshold:g}"
    )
    results = {"machine": facts, "model": str(model), "prompts": options.prompts, "rows": rows}
    picture = plots.bulk_speed(rows, subtitle=title, theme=plots.LIGHT)
    report(output, "generate", results, tables=[speed_table(rows, title=title)], console=console, picture=picture)


def speed_table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """A line for each case and batch size.

    The speed is also given relative to the case's smallest batch.
    """
    cells = []
    for row in rows:
        smallest = min((each for each in rows if each["case"] == row["case"]), key=lambda each: each["batch_size"])
        cells.append(
            (
                row["case"] if row is smallest else "",
                f"{row['batch_size']}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / smallest['tokens_per_second']:.2f} x",
                f"{row['tokens_per_pass']:.2f}",
                f"{row['padding']:.0%}",
                f"{row['busy']:.0%}",
            )
        )
    headings = ("case", "batch", "tokens/s", "of smallest", "tokens/pass", "padding", "busy rows")
    return plain_table(title, headings, cells, left=1)
