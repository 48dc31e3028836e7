"""What an exported two-tower folder is worth on held-out text: likelihoods, and speed against quality. Needs no
Megatron.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import write_file
from megatron_twotower.common.machine import machine, machine_line
from megatron_twotower.common.progress import OnProgress, silent, stage_bars
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.data.dataset import evenly_spaced_windows
from megatron_twotower.data.documents import VALIDATION
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import tokenizer_fingerprint
from megatron_twotower.evaluate import likelihood
from megatron_twotower.evaluate.likelihood import LEVELS, Estimate
from megatron_twotower.evaluate.speed_quality import front, points, sweep
from megatron_twotower.generate.engine import GenerationSettings, decode, default_devices, load, mask_token_id, write
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure on, in the order of cost.

    block_size_tokens: what the denoiser was trained with. bound_draws: noise draws per block of the
    likelihood bound.
    prompts: how many stretches of held-out text of `prompt_tokens` each setting of the sweep
    continues by
    `new_tokens`: the thresholds at that block size and a step per token, other block sizes and
    fewer steps at `threshold`; or, with `every`, all combinations. samples: how many of the prompts
    to show in every mode.
    """

    sequences: int = 32
    sequence_length_tokens: int = 256
    block_size_tokens: int = 16
    levels: tuple[float, ...] = LEVELS
    bound_draws: int = 4
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    threshold: float = 0.8
    block_sizes: tuple[int, ...] = (8, 32)
    steps: tuple[int, ...] = (2, 4, 8)
    every: bool = False
    prompts: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 96
    samples: int = 2
    seed: int = 1234

    def __post_init__(self) -> None:
        least = {
            "sequences": 2,
            "prompts": 1,
            "prompt_tokens": 1,
            "new_tokens": 4,
            "samples": 0,
            "bound_draws": 1,
            "block_size_tokens": 1,
        }
        for name, expected in least.items():
            found = getattr(self, name)
            if found < expected:
                raise UserError(f"{name}: found {found}, expected at least {expected}")
        if self.prompts > self.sequences:
            raise UserError(f"prompts {self.prompts}: expected at most {self.sequences}, the sequences to begin")
        if self.prompt_tokens > self.sequence_length_tokens:
            length = self.sequence_length_tokens
            raise UserError(f"prompt_tokens {self.prompt_tokens}: expected at most the sequence length {length}")
        for threshold in (*self.thresholds, self.threshold):
            if not 0 <= threshold <= 1:
                raise UserError(f"threshold: found {threshold}, expected 0 to 1")
        for name, values in (("block sizes", self.block_sizes), ("steps", self.steps)):
            if any(value < 1 for value in values):
                raise UserError(f"{name}: found {min(values)}, expected at least 1")


# --- figures ------------------------------------------------------------------------------------------------------


def write_samples(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    block_size: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """Text in every mode from prompts (n, l), greedy, with `GenerationSettings`' own threshold."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens, block_size=block_size, steps_per_block=block_size)
    samples: list[dict[str, Any]] = []
    modes = ("mask_diffusion", "mock_ar", "ar")
    for row in prompts:
        for mode in modes:
            ids, stats = write(
                model,
                row.unsqueeze(0),
                mode=mode,
                settings=settings,
                mask_id=mask_token_id(tokenizer),
                eos_id=tokenizer.eos_token_id,
            )
            samples.append(
                {
                    "mode": mode,
                    "prompt": tokenizer.decode(row.tolist()),
                    "text": decode(tokenizer, ids[0, len(row) :]),
                    "passes": stats.passes,
                    "new_tokens": stats.new_tokens,
                    "seconds": stats.seconds,
                }
            )
            progress("samples", len(samples), len(prompts) * len(modes))
    return samples


def likelihoods(
    model: Model, sequences: Tensor, *, settings: EvaluationSettings, mask_id: int, progress: OnProgress = silent
) -> dict[str, Any]:
    """Nats per token of (n, l) sequences under both towers: over all, by noise level, and by position in the block."""
    block = settings.block_size_tokens
    nats = likelihood.ar_nats(model, sequences, progress=progress)
    # Of the tokens that the bound scores: all blocks but the first.
    same = nats[:, block - 1 :]
    by_noise = likelihood.masked_loss_by_noise(
        model,
        sequences,
        block_size=block,
        levels=settings.levels,
        seed=settings.seed,
        mask_id=mask_id,
        progress=progress,
    )
    bound = likelihood.bound_nats(
        model,
        sequences,
        block_size=block,
        draws=settings.bound_draws,
        seed=settings.seed,
        mask_id=mask_id,
        progress=progress,
    )

    def named(name: str, found: Estimate) -> dict[str, Any]:
        return {name: found.nats_per_token, f"{name}_stderr": found.stderr, f"{name}_tokens": found.tokens}

    return {
        **named("ar_loss", likelihood.estimate(nats)),
        **named("ar_loss_on_bound_tokens", likelihood.estimate(same)),
        **named("diffusion_bound", likelihood.estimate(bound)),
        "masked_loss_by_noise": by_noise,
        "ar_loss_by_position": [asdict(each) for each in likelihood.by_position(same, block)],
        "diffusion_bound_by_position": [asdict(each) for each in likelihood.by_position(bound, block)],
    }


def evaluate(
    folder: str | Path,
    data: str | Path,
    *,
    settings: EvaluationSettings = EvaluationSettings(),
    progress: OnProgress = silent,
) -> dict[str, Any]:
    """Measure an exported folder on the held-out part of a prepared data folder. The result is ready for JSON.

    Raises:
        UserError: a folder that is not what it should be, or data of another tokenizer.
    """
    started = time.perf_counter()
    corpus = Corpus.open(Path(data) / VALIDATION)
    model, tokenizer = load(folder, device=default_devices()[0])
    found, expected = tokenizer_fingerprint(Path(folder)), corpus.tokenizer_fingerprint
    if found != expected:
        raise UserError(f"{folder}: found a tokenizer with sha256 {found}, expected that of {data}, {expected}")
    sequences = evenly_spaced_windows(corpus, count=settings.sequences, length=settings.sequence_length_tokens)
    block, mask_id = settings.block_size_tokens, mask_token_id(tokenizer)
    likelihood.check_sequences(sequences, block)

    scored = likelihoods(model, sequences, settings=settings, mask_id=mask_id, progress=progress)
    prompts = sequences[: settings.prompts, : settings.prompt_tokens].to(model.context_tower.device)
    tried = points(
        thresholds=settings.thresholds,
        block_sizes=settings.block_sizes,
        steps=settings.steps,
        trained_block=block,
        threshold=settings.threshold,
        every=settings.every,
    )
    rows = sweep(model, prompts, points=tried, max_new_tokens=settings.new_tokens, mask_id=mask_id, progress=progress)
    samples = write_samples(
        model,
        tokenizer,
        prompts[: settings.samples],
        max_new_tokens=settings.new_tokens,
        block_size=block,
        progress=progress,
    )
    bytes_per_token = corpus.total_bytes / corpus.total_tokens
    return {
        **scored,
        "ar_loss_per_byte": scored["ar_loss"] / bytes_per_token,
        "bytes_per_token": bytes_per_token,
        "ar_generation": rows[0],
        "sweep": _by_threshold(rows, block),
        "generation": rows,
        "samples": samples,
        "model": str(folder),
        "data": str(data),
        "tokenizer_sha256": found,
        "sequences": len(sequences),
        "settings": asdict(settings),
        "machine": machine(),
        "device": str(model.context_tower.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }


def _by_threshold(rows: Sequence[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """Those of the sweep that differ by their threshold alone."""
    return [row for row in rows[1:] if row["block_size"] == block == row["steps_per_block"]]


def _position_tables(found: Mapping[str, Any]) -> list[Table]:
    levels = found["masked_loss_by_noise"]
    noise = [(f"{e['t']:g}", with_error(e["loss"], e["stderr"]), f"{e['count']:,}") for e in levels]
    block = len(found["ar_loss_by_position"])
    chosen = levels[:: max(1, len(levels) // 5)]
    rows = [
        [str(j + 1)]
        + [with_error(e["by_position"][j]["loss"], e["by_position"][j]["stderr"]) for e in chosen]
        + [
            with_error(found[key][j]["nats_per_token"], found[key][j]["stderr"])
            for key in ("diffusion_bound_by_position", "ar_loss_by_position")
        ]
        for j in range(block)
    ]
    headings = ["position", *(f"t {e['t']:g}" for e in chosen), "bound", "AR"]
    return [
        plain_table("masked loss by noise level", ("noise level t", "nats per masked token", "tokens"), noise),
        plain_table("nats per token by position in the block", headings, rows),
    ]


def _sweep_table(found: Mapping[str, Any]) -> Table:
    headings = (
        "S",
        "steps",
        "threshold",
        "tokens/pass",
        "tokens/s",
        "x AR",
        "nats/token",
        "agree %",
        "as AR %",
        "distinct-2 %",
        "repeated-4 %",
    )
    rows = [
        [
            "AR" if row["block_size"] is None else str(row["block_size"]),
            *("-" if row[key] is None else f"{row[key]:g}" for key in ("steps_per_block", "confidence_threshold")),
            number(row["tokens_per_pass"]),
            number(row["tokens_per_second"], 1),
            number(row["speedup"]),
            with_error(row["nats_per_token"], row["nats_per_token_stderr"]),
            *(number(100 * row[key], 1) for key in ("agreement", "same_as_ar", "distinct_2", "repeated_4")),
        ]
        for row in found["generation"]
    ]
    settings = found["settings"]
    title = f"mask diffusion against cached AR, {settings['prompts']} prompts x {settings['new_tokens']} tokens"
    return plain_table(title, headings, rows)


def print_figures(found: Mapping[str, Any], console: Console) -> None:
    lines = {
        "AR, context tower": "ar_loss",
        "AR, tokens of the bound": "ar_loss_on_bound_tokens",
        "diffusion bound": "diffusion_bound",
    }
    rows = [
        (name, with_error(found[key], found[f"{key}_stderr"]), f"{found[f'{key}_tokens']:,}")
        for name, key in lines.items()
    ]
    for table in (plain_table("held-out text", ("", "nats per token", "tokens"), rows), *_position_tables(found)):
        console.print(table)
    console.print(_sweep_table(found))
    console.print(machine_line(found["machine"]), highlight=False)


def positions_picture(found: Mapping[str, Any]) -> bytes:
    levels = found["masked_loss_by_noise"]
    chosen = [levels[i] for i in sorted({0, (len(levels) - 1) // 2, len(levels) - 1})]
    losses = {f"t = {e['t']:g}": [(cell["loss"], cell["stderr"]) for cell in e["by_position"]] for e in chosen}
    references = {
        name: [(cell["nats_per_token"], cell["stderr"]) for cell in found[key]]
        for name, key in (("bound", "diffusion_bound_by_position"), ("AR", "ar_loss_by_position"))
    }
    return plots.positions(losses, references, theme=plots.LIGHT)


def pareto_picture(found: Mapping[str, Any]) -> bytes:
    rows, block = found["generation"][1:], found["settings"]["block_size_tokens"]
    thresholds = _by_threshold(found["generation"], block)
    sizes = [row for row in rows if row["block_size"] != block]
    fewer = [row for row in rows if row["block_size"] == block != row["steps_per_block"]]
    sizes, fewer = sorted(sizes, key=lambda row: row["block_size"]), sorted(fewer, key=lambda r: r["steps_per_block"])
    every = found["settings"]["every"]
    kinds: list[tuple[str, Sequence[dict[str, Any]], Callable[[dict[str, Any]], str], bool]] = [
        (
            f"threshold, S = {block}",
            sorted(thresholds, key=lambda row: row["confidence_threshold"]),
            lambda row: f"{row['confidence_threshold']:g}",
            True,
        ),
        ("other block sizes", sizes, lambda row: f"S {row['block_size']}", not every),
        ("fewer steps", fewer, lambda row: f"{row['steps_per_block']} steps", not every),
    ]
    families = [
        plots.Family(name, [(label(row), row) for row in some], joined) for name, some, label, joined in kinds if some
    ]
    best = front(rows, "agreement")
    return plots.pareto(families, found["ar_generation"], best, theme=plots.LIGHT)


# name behind that of the JSON file, and how to draw it
PICTURES: dict[str, Callable[[Mapping[str, Any]], bytes]] = {"positions": positions_picture, "pareto": pareto_picture}


def run(
    folder: str | Path, *, data: str | Path, output: str | Path, settings: EvaluationSettings = EvaluationSettings()
) -> None:
    """The command `evaluate`: measure with progress bars, print tables, and write `output`, a JSON file, and its
    pictures beside it.

    Raises:
        UserError: see `evaluate`; nothing is written then.
    """
    with stage_bars() as progress:
        figures = evaluate(folder, data, settings=settings, progress=progress)
    target = Path(output)
    for name, draw in PICTURES.items():
        write_file(target.with_name(f"{target.stem}-{name}.png"), draw(figures))
    write_file(target, (json.dumps(figures, indent=1) + "\n").encode())
    print_figures(figures, wide_console())
