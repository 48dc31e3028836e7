"""The command `bench pooling`: a limit of experts for a block, what it costs and what it saves.

Every limit continues the same held-out prompts by mask diffusion, greedily, one prompt at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_twotower.bench import measure
from megatron_twotower.bench.methods import towers_and_prompts
from megatron_twotower.bench.results import report
from megatron_twotower.common.errors import require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.evaluate.speed_quality import means, text_quality
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model
from megatron_twotower.hf.modeling_nemotron_h_twotower import Router

FIGURES = ("tokens_per_pass", "agreement", "nats_per_token", "repeated_4")


@dataclass(frozen=True)
class PoolingOptions:
    """What to measure.

    Attributes:
        limits: Experts of a block to try; those of a token and all experts are always tried.
        prompts: Windows of held-out text.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to write after each prompt.
        confidence_threshold: Of mask diffusion.
        rounds: Passes that are timed, of each limit.
    """

    limits: tuple[int, ...] = ()
    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 96
    confidence_threshold: float = 0.8
    rounds: int = 50


QUICK = PoolingOptions(prompts=2, prompt_tokens=8, new_tokens=8, rounds=2)


@contextmanager
def distinct_experts(model: Model) -> Iterator[list[int]]:
    """Collect the different experts that each layer of the denoiser uses in each pass."""
    counts: list[int] = []

    def count(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
        counts.append(len(output[1].unique()))

    routers = [each for each in model.denoiser_tower.modules() if isinstance(each, Router)]
    with measure.hooked(routers, after=count):
        yield counts


@dataclass
class LimitTotals:
    """The texts of one limit: a row of figures for each, and the experts of all passes."""

    texts: list[dict[str, float]] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, limit: int) -> dict[str, Any]:
        """The row for JSON: means over prompts and their standard errors."""
        row = {"limit": limit, "experts": fmean(self.experts), "pass_seconds": min(self.seconds)}
        return row | means({key: [text[key] for text in self.texts] for key in FIGURES})


def compare(model: Model, prompts: Tensor, *, options: PoolingOptions) -> list[dict[str, Any]]:
    """Continue every prompt with every limit; one row for each limit, that of all experts last.

    Args:
        prompts: (n, l) int64.
    """
    few, every = model.config.num_experts_per_tok, model.config.n_routed_experts
    totals = {limit: LimitTotals() for limit in sorted({few, *options.limits, every})}
    for ids in prompts.split(1):
        ar_text = model.generate_ar(ids, options.new_tokens, eos_token_id=())[0, ids.shape[1] :]
        for limit, own in totals.items():
            with distinct_experts(model) as counts:
                text = model.generate_mask_diffusion(
                    ids,
                    options.new_tokens,
                    steps_per_block=model.block_size,
                    confidence_threshold=options.confidence_threshold,
                    eos_token_id=(),
                    experts_per_block=limit,
                )
            assert model.last_generation is not None
            cost = {"tokens_per_pass": model.last_generation.tokens_per_pass}
            own.texts.append(text_quality(model, text, ids.shape[1], ar_text) | cost)
            own.experts += counts
    time_passes(model, prompts[:1], totals, rounds=options.rounds)
    return [own.row(limit) for limit, own in totals.items()]


def time_passes(model: Model, prompt: Tensor, totals: dict[int, LimitTotals], *, rounds: int) -> None:
    """Time a pass over a block of masks after a prompt (1, l) with each limit, in turn."""
    block = torch.full((1, model.block_size), model.mask_token_id, device=model.denoiser_tower.device)
    levels, cache = model.modulations(torch.ones(1, device=block.device)), model.prefill(prompt)
    for turn in range(rounds + 1):
        for limit, own in totals.items():
            seconds = measure.elapsed_seconds(partial(model.denoise_hidden, block, levels, cache, limit))
            own.seconds += [seconds] if turn else []


def pooling_table(results: dict[str, Any]) -> Table:
    """A line for each limit."""
    title = f"{results['prompts']} held-out prompts, {results['new_tokens']} new tokens each, greedy"
    rows = [
        (
            str(row["limit"]),
            number(row["experts"], 2),
            f"{1e3 * row['pass_seconds']:.2f}",
            with_error(row["tokens_per_pass"], row["tokens_per_pass_stderr"]),
            f"{row['agreement']:.1%} ± {row['agreement_stderr'] or 0:.1%}",
            with_error(row["nats_per_token"], row["nats_per_token_stderr"]),
            f"{row['repeated_4']:.0%}",
        )
        for row in results["rows"]
    ]
    headings = ("experts, at most", "a pass uses", "ms, least", "tokens/pass", "as AR would choose", "nats/token")
    return plain_table(title, (*headings, "repeated 4-grams"), rows, left=0)


def run(
    output: Path,
    *,
    model: Path,
    data: Path,
    options: PoolingOptions = PoolingOptions(),
    threads: int,
    console: Console | None = None,
) -> None:
    """Measure, print a table, and write `pooling.json` to `output`.

    Args:
        model: Two-tower folder.
        data: A prepared data folder, whose held-out part has the prompts.

    Raises:
        UserError: A folder is wrong, the data has another tokenizer, or a limit is out of range.
    """
    towers, prompts, _ = towers_and_prompts(model, data, count=options.prompts, length=options.prompt_tokens)
    few, every = towers.config.num_experts_per_tok, towers.config.n_routed_experts
    for limit in options.limits:
        require(few <= limit <= every, f"--limits: found {limit}, expected {few} to {every}")
    with measure.torch_threads(threads), torch.no_grad():
        rows = compare(towers, prompts, options=options)
        facts = machine()
    results = {
        "machine": facts,
        "model": str(model),
        "prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "confidence_threshold": options.confidence_threshold,
        "rows": rows,
    }
    report(output, "pooling", results, tables=[pooling_table(results)], console=console or wide_console())
