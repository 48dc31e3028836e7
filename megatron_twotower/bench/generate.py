"""How fast an exported model writes bulk text: tokens per second against batch size, mode by mode.

The prompts are stretches of source text of many lengths. Every case continues all of them by the
same number of tokens, in batches as `twotower generate --prompts` makes them, so that cases differ
in nothing but how they go about it.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.bench import measure
from megatron_twotower.common import machine, tables
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.documents import find_documents, training_texts
from megatron_twotower.data.tokenizer import text_encoder
from megatron_twotower.generate.engine import (
    GenerationSettings,
    check_mode,
    default_devices,
    load,
    mask_token_id,
    place,
    write,
)
from megatron_twotower.generate.prompt_file import padded
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

AS_THEY_COME = ", unsorted"
_SEED = 0


@dataclass(frozen=True)
class Settings:
    """prompts: how many, of `shortest` to `longest` tokens, log-uniform. new_tokens: to each. batch_sizes: prompts
    written at a time. modes: of generation; the first is also measured on prompts in the order they come."""

    prompts: int = 32
    shortest: int = 8
    longest: int = 128
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    modes: tuple[str, ...] = ("mask_diffusion", "ar", "speculative")
    confidence_threshold: float = 0.8
    repeats: int = 7
    budget_seconds: float = 600.0


QUICK = Settings(prompts=4, longest=16, new_tokens=8, batch_sizes=(1, 4), repeats=1)


def check(wanted: Settings) -> None:
    """
    Raises:
        UserError: an unknown mode, or a number that nothing can be measured with.
    """
    for mode in wanted.modes:
        check_mode(mode)
    for name, values in (
        ("prompts", [wanted.prompts]),
        ("new-tokens", [wanted.new_tokens]),
        ("batch-sizes", wanted.batch_sizes),
    ):
        for value in values:
            if value < 1:
                raise UserError(f"--{name}: found {value}, expected at least 1")


def source_prompts(tokenizer: PreTrainedTokenizerFast, wanted: Settings) -> list[list[int]]:
    """Stretches of files of Python's standard library, each from the start of a line; the same for every call."""
    draw, encode = random.Random(_SEED), text_encoder(tokenizer)
    prompts: list[list[int]] = []
    for text in training_texts(find_documents(["python-stdlib"]), holdout_fraction=0.0, text_field="text"):
        lines = text.splitlines(keepends=True)
        if len(lines) < 100:
            continue
        first = draw.randrange(len(lines) // 2)
        length = round(math.exp(draw.uniform(math.log(wanted.shortest), math.log(wanted.longest))))
        ids = encode(["".join(lines[first : first + wanted.longest])])[0][:length]
        prompts += [ids] if len(ids) == length else []
        if len(prompts) == wanted.prompts:
            return prompts
    raise UserError(f"--prompts: found {len(prompts)} files that are long enough, expected {wanted.prompts}")


def batched(prompts: Sequence[list[int]], size: int, *, by_length: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Padded ids and attention mask of every batch."""
    rows = sorted(prompts, key=len, reverse=True) if by_length else list(prompts)
    return [padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def padding(batches: Sequence[tuple[Tensor, Tensor | None]]) -> float:
    """Share of the prompts' positions that hold no text."""
    text = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in batches)
    return 1 - text / sum(ids.numel() for ids, _ in batches)


@dataclass
class Bulk:
    """One case: all prompts, in batches of one size, in one mode. stats: of the last time that it ran, by batch."""

    name: str
    mode: str
    size: int
    batches: list[tuple[Tensor, Tensor | None]]
    stats: list[GenerationStats]

    def case(self, model: Model, settings: GenerationSettings, mask_id: int) -> measure.Case:
        def work() -> None:
            self.stats.clear()
            for ids, mask in self.batches:
                _, stats = write(
                    model, ids, mode=self.mode, settings=settings, mask_id=mask_id, eos_id=None, attention_mask=mask
                )
                self.stats.append(stats)

        return measure.Case(f"{self.name}, {self.size}", {"write": work})

    def row(self, times: measure.Times) -> dict[str, Any]:
        """For JSON. busy: of the rows that passes went over, those in which something was left to decide."""
        figures, tokens = times.figures(), sum(stats.new_tokens for stats in self.stats)
        passed = sum(s.passes * len(ids) for s, (ids, _) in zip(self.stats, self.batches, strict=True))
        own = sum(stats.row_passes for stats in self.stats)
        return {
            "case": self.name,
            "mode": self.mode,
            "batch_size": self.size,
            "new_tokens": tokens,
            "tokens_per_second": tokens / figures["median_seconds"],
            "tokens_per_pass": tokens / own,
            "padding": padding(self.batches),
            "busy": own / passed,
            **figures,
        }


def cases(prompts: Sequence[list[int]], wanted: Settings, move: Callable[[Tensor], Tensor]) -> list[Bulk]:
    """Every mode at every batch size, and the first mode also without sorting, where that makes a difference."""
    ways = [(mode, mode, True) for mode in wanted.modes]
    ways.insert(1, (f"{wanted.modes[0]}{AS_THEY_COME}", wanted.modes[0], False))

    def moved(size: int, by_length: bool) -> list[tuple[Tensor, Tensor | None]]:
        pairs = batched(prompts, size, by_length=by_length)
        return [(move(ids), None if mask is None else move(mask)) for ids, mask in pairs]

    return [
        Bulk(name, mode, size, moved(size, by_length), [])
        for name, mode, by_length in ways
        for size in wanted.batch_sizes
        if by_length or size > 1
    ]


def run(
    output: Path,
    *,
    model: Path,
    wanted: Settings = Settings(),
    devices: Sequence[str] = (),
    threads: int,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `generate.json` and `generate.png` to `output`.

    Raises:
        UserError: see `check`; a folder that is no two-tower model.
    """
    from megatron_twotower.common import plots

    check(wanted)
    console = console or tables.wide_console()
    towers, tokenizer = load(model)
    place(towers, devices or default_devices())
    settings = GenerationSettings(max_new_tokens=wanted.new_tokens, confidence_threshold=wanted.confidence_threshold)
    device = towers.context_tower.device
    bulks = cases(source_prompts(tokenizer, wanted), wanted, lambda tensor: tensor.to(device))
    mask_id = mask_token_id(tokenizer)
    with measure.torch_threads(threads), torch.no_grad():
        times = measure.in_turns(
            [bulk.case(towers, settings, mask_id) for bulk in bulks],
            repeats=wanted.repeats,
            budget_seconds=wanted.budget_seconds,
        )
        facts = machine.machine()
    rows = [bulk.row(times[f"{bulk.name}, {bulk.size}"]) for bulk in bulks]
    title = (
        f"{wanted.prompts} prompts of {wanted.shortest} to {wanted.longest} tokens, {wanted.new_tokens} new tokens "
        f"each, threshold {wanted.confidence_threshold:g}"
    )
    console.print(table(rows, title=title))
    console.print(machine.machine_line(facts), highlight=False)
    figures = {"machine": facts, "model": str(model), "prompts": wanted.prompts, "rows": rows}
    measure.write_files(output, "generate", figures, plots.bulk_speed(rows, subtitle=title, theme=plots.LIGHT))
    console.print(f"{output / 'generate.json'}, {output / 'generate.png'}", highlight=False)


def table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """A line for each case and batch size; speed also in multiples of the case's smallest batch."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("case", "batch", "tokens/s", "of smallest", "tokens/pass", "padding", "busy rows"):
        made.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        least = min((each for each in rows if each["case"] == row["case"]), key=lambda each: each["batch_size"])
        made.add_row(
            row["case"] if row is least else "",
            f"{row['batch_size']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / least['tokens_per_second']:.2f} x",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['padding']:.0%}",
            f"{row['busy']:.0%}",
        )
    return made


def quick(wanted: Settings) -> Settings:
    """Tiny sizes: only to see that it works."""
    return replace(QUICK, modes=wanted.modes)
