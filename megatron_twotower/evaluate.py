"""Likelihoods, and speed against confidence threshold, of an exported two-tower folder. Needs no Megatron."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.data.shards import VALIDATION, Corpus
from megatron_twotower.generate import GenerationSettings, decode, load, mask_token_id, write
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache, GenerationStats
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model
from megatron_twotower.records import UserError
from megatron_twotower.tokenizer import tokenizer_fingerprint

LEVELS = tuple(level / 10 for level in range(1, 11))
ROWS = 32  # sequences evaluated at a time

# Called with: what is being measured, how much of it is done, how much there is.
OnProgress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure on, in the order of cost.

    bound_draws: noise draws per block of the likelihood bound. prompts: how many stretches of held-out text of
    `prompt_tokens` each threshold continues by `new_tokens`. samples: how many of them to show in every mode.
    """

    sequences: int = 32
    sequence_length_tokens: int = 256
    block_size_tokens: int = 16
    levels: tuple[float, ...] = LEVELS
    bound_draws: int = 4
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    prompts: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 96
    samples: int = 2
    seed: int = 1234


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token over `tokens` tokens; its standard error is that over sequences."""

    nats_per_token: float
    stderr: float
    tokens: int


def _estimate(sums: Tensor, tokens_per_sequence: int) -> Estimate:
    """From the sums of nats (n,) of n sequences of equal length."""
    means = sums.double() / tokens_per_sequence
    stderr = float(means.std() / math.sqrt(len(means)))
    return Estimate(float(means.mean()), stderr, tokens_per_sequence * len(means))


def _check(sequences: Tensor, block_size: int) -> None:
    count, length = sequences.shape
    if count < 2:
        raise UserError(f"sequences: found {count}, expected at least 2 for a standard error")
    if length % block_size or length == block_size:
        raise UserError(f"sequence length {length}: expected two or more blocks of {block_size} tokens")


# --- likelihoods --------------------------------------------------------------------------------------------------


def _token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(b, l) cross-entropy of targets (b, l) under logits (b, l, v), float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.transpose(1, 2), targets.to(logits.device), reduction="none")


@torch.no_grad()
def ar_loss(model: Model, sequences: Tensor, *, start: int = 1, progress: OnProgress = _silent) -> Estimate:
    """Next-token cross-entropy of the context tower.

    Args:
        sequences: (n, l) int64.
        start: first position that is scored, at least 1.
    """
    sums = []
    for first in range(0, len(sequences), ROWS):
        rows = sequences[first : first + ROWS]
        nats = _token_nats(model(rows).logits[:, start - 1 : -1], rows[:, start:])
        sums.append(nats.double().sum(-1))
        progress("AR loss", min(first + ROWS, len(sequences)), len(sequences))
    return _estimate(torch.cat(sums), sequences.shape[1] - start)


def _blocks(model: Model, sequences: Tensor, block_size: int) -> Iterator[tuple[slice, slice, Tensor, ContextCache]]:
    """Every block with the context tower's states before it: rows, columns, clean ids (b, s), cache."""
    for first in range(0, len(sequences), ROWS):
        rows = slice(first, first + ROWS)
        cache = model.prefill(sequences[rows, :0])
        for start in range(0, sequences.shape[1], block_size):
            columns = slice(start, start + block_size)
            clean = sequences[rows, columns]
            yield rows, columns, clean, cache
            if start + block_size < sequences.shape[1]:
                model.extend(cache, clean)


def _masked_nats(model: Model, clean: Tensor, masked: Tensor, t: Tensor, cache: ContextCache, mask_id: int) -> Tensor:
    """(b, s) cross-entropy of the denoiser where masked, else 0."""
    logits = model.denoise_block(clean.masked_fill(masked, mask_id), t, cache)
    return _token_nats(logits, clean).cpu() * masked


@torch.no_grad()
def masked_loss_by_noise(
    model: Model, sequences: Tensor, *, block_size: int, levels: Sequence[float] = LEVELS, seed: int, mask_id: int,
    progress: OnProgress = _silent,
) -> list[dict[str, float | int | None]]:  # fmt: skip
    """The denoiser's cross-entropy at masked positions, every block beside its clean past, at fixed noise levels.

    The uniform numbers are the same for all levels, so that a level masks what every lower one does, and more.

    Args:
        sequences: (n, l) int64 on the CPU.

    Returns:
        For every level {"t": level, "loss": nats per masked token (None where there is none), "count": of those}.
    """
    _check(sequences, block_size)
    uniform = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(seed))
    sums, counts = [0.0] * len(levels), [0] * len(levels)
    for rows, columns, clean, cache in _blocks(model, sequences, block_size):
        for i, level in enumerate(levels):
            masked = uniform[rows, columns] < level
            nats = _masked_nats(model, clean, masked, torch.full((len(clean),), level), cache, mask_id)
            sums[i] += float(nats.double().sum())
            counts[i] += int(masked.sum())
        progress("masked loss", rows.start * sequences.shape[1] + len(clean) * columns.stop, sequences.numel())
    return [
        {"t": level, "loss": total / count if count else None, "count": count}
        for level, total, count in zip(levels, sums, counts, strict=True)
    ]


def _masks_by_count(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly k tokens masked, k uniform on 1..s; conditioned on t = k / s, as at generation.

    The integral of the bound over t, done exactly for every mask: int C(s, k) t^k (1 - t)^(s - k) dt / t = 1 / k
    (LLaDA, Nie et al. 2025, equation 6, by block). It is the bound of writing a block one token at a time in a random
    order, and no weight exceeds s, where 1 / t is unbounded.
    """
    size = noise.shape[1]
    k = (u * size).floor() + 1
    return noise.argsort(-1).argsort(-1) < k.unsqueeze(-1), k / size, size / k


def _masks_by_time(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token masked with probability t, t uniform on (0.001, 1], weight 1 / t (MDLM; BD3-LM, section 3)."""
    t = 1 - u * (1 - 1e-3)
    return noise < t.unsqueeze(-1), t, 1 / t


# u (b,) float64 and noise (b, s), uniform -> masked (b, s) bool, noise levels (b,), weights (b,)
BOUND_NOISE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "count": _masks_by_count, "time": _masks_by_time,
}  # fmt: skip


@torch.no_grad()
def diffusion_bound(
    model: Model, sequences: Tensor, *, block_size: int, draws: int, seed: int, mask_id: int, noise: str = "count",
    progress: OnProgress = _silent,
) -> Estimate:  # fmt: skip
    """An upper bound on the denoiser's negative log-likelihood of every block after the first, by Monte Carlo.

    Per block E[weight x sum of the cross-entropies at masked positions], noise drawn as `BOUND_NOISE` says, in
    `draws` strata. The first block is left out, so that `ar_loss(start=block_size)` scores the very same tokens, with
    text before them in both.

    Args:
        sequences: (n, l) int64 on the CPU.

    Returns:
        The estimate; its standard error covers the choice of text and the noise.
    """
    _check(sequences, block_size)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for rows, columns, clean, cache in _blocks(model, sequences, block_size):
        if columns.start == 0:
            continue
        for draw in range(draws):
            u = (draw + torch.rand(len(clean), generator=generator, dtype=torch.float64)) / draws
            masked, t, weight = BOUND_NOISE[noise](u, torch.rand(clean.shape, generator=generator))
            nats = _masked_nats(model, clean, masked, t, cache, mask_id)
            sums[rows] += weight * nats.double().sum(-1) / draws
        progress("likelihood bound", rows.start * sequences.shape[1] + len(clean) * columns.stop, sequences.numel())
    return _estimate(sums, sequences.shape[1] - block_size)


# --- generation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _written_nats(model: Model, ids: Tensor, prompt_tokens: int) -> float:
    """Negative log-likelihood of what was written, under the context tower: the sum over new tokens, in nats."""
    logits = model(ids).logits[:, prompt_tokens - 1 : -1]
    return float(_token_nats(logits, ids[:, prompt_tokens:]).double().sum())


@dataclass
class _Tally:
    """Sums over the prompts of one row of the sweep."""

    passes: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    nats: float = 0.0

    def add(self, stats: GenerationStats, nats: float) -> None:
        self.passes += stats.passes
        self.new_tokens += stats.new_tokens
        self.seconds += stats.seconds
        self.nats += nats

    def row(self, threshold: float | None, ar_rate: float, prompts: int) -> dict[str, Any]:
        rate = self.new_tokens / self.seconds
        return {
            "confidence_threshold": threshold, "tokens_per_pass": self.new_tokens / self.passes,
            "passes": self.passes, "new_tokens": self.new_tokens, "seconds": self.seconds,
            "tokens_per_second": rate, "speedup": rate / ar_rate, "nats_per_token": self.nats / self.new_tokens,
            "prompts": prompts,
        }  # fmt: skip


def threshold_sweep(
    model: Model, prompts: Tensor, *, thresholds: Sequence[float], max_new_tokens: int, block_size: int, mask_id: int,
    progress: OnProgress = _silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Speed and likelihood of mask diffusion at each threshold, against cached AR generation in the same run.

    Greedy, one prompt at a time, always `max_new_tokens` long (no EOS, so that all write the same amount); for every
    prompt AR first and then all thresholds, so that a drift of the machine meets all alike.

    Args:
        prompts: (n, l) int64.

    Returns:
        Rows, the first of which is AR's (confidence_threshold None, speedup 1): passes of the tower that predicts,
        new tokens, seconds, tokens per pass and per second, speedup over AR, and nats per token of what was written,
        under the context tower.
    """
    base = GenerationSettings(max_new_tokens=max_new_tokens, block_size=block_size, steps_per_block=block_size)
    kinds: list[float | None] = [None, *thresholds]
    tallies = [_Tally() for _ in kinds]

    def once(ids: Tensor, threshold: float | None, settings: GenerationSettings) -> tuple[Tensor, GenerationStats]:
        if threshold is None:
            return write(model, ids, mode="ar", settings=settings, mask_id=mask_id, eos_id=None)
        settings = replace(settings, confidence_threshold=threshold)
        return write(model, ids, mode="mask_diffusion", settings=settings, mask_id=mask_id, eos_id=None)

    for threshold in kinds[:2]:  # the first calls of any kind are slower
        once(prompts[:1], threshold, replace(base, max_new_tokens=min(2 * block_size, max_new_tokens)))
    for number in range(len(prompts)):
        ids = prompts[number : number + 1]
        for i, threshold in enumerate(kinds):
            written, stats = once(ids, threshold, base)
            tallies[i].add(stats, _written_nats(model, written, ids.shape[1]))
            progress("threshold sweep", number * len(kinds) + i + 1, len(prompts) * len(kinds))
    ar_rate = tallies[0].new_tokens / tallies[0].seconds
    return [tally.row(kind, ar_rate, len(prompts)) for kind, tally in zip(kinds, tallies, strict=True)]


def write_samples(
    model: Model, tokenizer: PreTrainedTokenizerFast, prompts: Tensor, *, max_new_tokens: int, block_size: int,
    progress: OnProgress = _silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Text in every mode from prompts (n, l), greedy, with `GenerationSettings`' own threshold."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens, block_size=block_size, steps_per_block=block_size)
    samples: list[dict[str, Any]] = []
    modes = ("mask_diffusion", "mock_ar", "ar")
    for row in prompts:
        for mode in modes:
            ids, stats = write(
                model, row.unsqueeze(0), mode=mode, settings=settings, mask_id=mask_token_id(tokenizer),
                eos_id=tokenizer.eos_token_id,
            )  # fmt: skip
            samples.append({
                "mode": mode, "prompt": tokenizer.decode(row.tolist()), "text": decode(tokenizer, ids[0, len(row) :]),
                "passes": stats.passes, "new_tokens": stats.new_tokens, "seconds": stats.seconds,
            })  # fmt: skip
            progress("samples", len(samples), len(prompts) * len(modes))
    return samples


# --- all of it ----------------------------------------------------------------------------------------------------


def _stretches(corpus: Corpus, *, count: int, length: int) -> Tensor:
    """(count, length) int64 tokens, evenly spread over the corpus; fewer where it is short."""
    count = min(count, corpus.total_tokens // length)
    if count < 2:
        raise UserError(f"{corpus.folder}: found {corpus.total_tokens} tokens, expected at least 2 x {length}")
    starts = [i * (corpus.total_tokens - length) // (count - 1) for i in range(count)]
    return torch.stack([torch.from_numpy(corpus.tokens(start, length)) for start in starts])


def evaluate(
    folder: str | Path, data: str | Path, *, settings: EvaluationSettings = EvaluationSettings(),
    progress: OnProgress = _silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure an exported folder on the held-out part of a prepared data folder. The result is ready for JSON.

    Raises:
        UserError: a folder that is not what it should be, or data of another tokenizer.
    """
    started = time.perf_counter()
    corpus = Corpus.open(Path(data) / VALIDATION)
    model, tokenizer = load(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    found, expected = tokenizer_fingerprint(Path(folder)), corpus.tokenizer_fingerprint
    if found != expected:
        raise UserError(f"{folder}: found a tokenizer with sha256 {found}, expected that of {data}, {expected}")
    length, block = settings.sequence_length_tokens, settings.block_size_tokens
    if settings.prompt_tokens > length:
        raise UserError(f"prompt_tokens {settings.prompt_tokens}: expected at most the sequence length {length}")
    sequences = _stretches(corpus, count=settings.sequences, length=length)
    _check(sequences, block)
    mask_id = mask_token_id(tokenizer)

    ar = ar_loss(model, sequences, progress=progress)
    ar_same = ar_loss(model, sequences, start=block, progress=progress)
    by_noise = masked_loss_by_noise(
        model, sequences, block_size=block, levels=settings.levels, seed=settings.seed, mask_id=mask_id,
        progress=progress,
    )  # fmt: skip
    bound = diffusion_bound(
        model, sequences, block_size=block, draws=settings.bound_draws, seed=settings.seed, mask_id=mask_id,
        progress=progress,
    )  # fmt: skip
    prompts = sequences[: settings.prompts, : settings.prompt_tokens].to(model.context_tower.device)
    rows = threshold_sweep(
        model, prompts, thresholds=settings.thresholds, max_new_tokens=settings.new_tokens, block_size=block,
        mask_id=mask_id, progress=progress,
    )  # fmt: skip
    samples = write_samples(
        model, tokenizer, prompts[: settings.samples], max_new_tokens=settings.new_tokens, block_size=block,
        progress=progress,
    )  # fmt: skip
    bytes_per_token = corpus.total_bytes / corpus.total_tokens
    return {
        "ar_loss": ar.nats_per_token, "ar_loss_stderr": ar.stderr, "ar_loss_tokens": ar.tokens,
        "ar_loss_per_byte": ar.nats_per_token / bytes_per_token, "bytes_per_token": bytes_per_token,
        "masked_loss_by_noise": by_noise,
        "diffusion_bound": bound.nats_per_token, "diffusion_bound_stderr": bound.stderr,
        "diffusion_bound_tokens": bound.tokens, "ar_loss_on_bound_tokens": ar_same.nats_per_token,
        "sweep": rows[1:], "ar_generation": rows[0], "samples": samples,
        "model": str(folder), "sequences": len(sequences), "settings": asdict(settings),
        "device": str(model.context_tower.device), "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def run(folder: str | Path, *, data: str | Path, output: str | Path) -> None:
    """The command `evaluate`: measure with a progress bar, and write the figures as JSON to `output`.

    Raises:
        UserError: see `evaluate`; nothing is written then.
    """
    percent = TextColumn("{task.percentage:>3.0f}%")
    with Progress(TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn()) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        figures = evaluate(folder, data, progress=progress)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(partial, target)
