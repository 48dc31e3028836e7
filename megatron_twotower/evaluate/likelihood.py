"""How probable held-out text is: under the context tower, and under the denoiser by its variational bound.

What is measured comes as nats per token and sequence; `estimate` and `by_position` make means of
it, with standard errors over sequences. Dimensions: n sequences, l length, s block size, b rows of
a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import OnProgress, silent
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as Model

LEVELS = tuple(level / 10 for level in range(1, 11))
ROWS = 32  # sequences evaluated at a time


# --- means --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token over `tokens` tokens; its standard error is that over sequences."""

    nats_per_token: float
    stderr: float
    tokens: int


def ratio(sums: Tensor, counts: Tensor) -> tuple[float | None, float | None, int]:
    """A mean over all tokens, its standard error and their count, from sums and counts (n,) of n sequences.

    The error is that of a ratio of two sums, to first order: sequences, not tokens, are
    independent. None of nothing.
    """
    total, n = int(counts.sum()), len(counts)
    if not total:
        return None, None, 0
    mean = float(sums.double().sum() / total)
    residual = sums.double() - mean * counts.double()
    return mean, float((residual.square().sum() * n / (n - 1)).sqrt() / total), total


def estimate(nats: Tensor) -> Estimate:
    """From nats (n, tokens)."""
    mean, stderr, tokens = ratio(nats.double().sum(-1), torch.full((len(nats),), nats.shape[1]))
    assert mean is not None and stderr is not None
    return Estimate(mean, stderr, tokens)


def by_position(nats: Tensor, block_size: int) -> list[Estimate]:
    """From nats (n, blocks x s): one estimate for each position in the block."""
    return [estimate(nats[:, position::block_size]) for position in range(block_size)]


def check_sequences(sequences: Tensor, block_size: int) -> None:
    count, length = sequences.shape
    if count < 2:
        raise UserError(f"sequences: found {count}, expected at least 2 for a standard error")
    if length % block_size or length == block_size:
        raise UserError(f"sequence length {length}: expected two or more blocks of {block_size} tokens")


# --- measures -----------------------------------------------------------------------------------------------------


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(b, l) cross-entropy of targets (b, l) under logits (b, l, v), float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.transpose(1, 2), targets.to(logits.device), reduction="none")


@torch.no_grad()
def ar_nats(model: Model, sequences: Tensor, *, progress: OnProgress = silent) -> Tensor:
    """(n, l - 1) float64: next-token cross-entropy of the context tower at every position of (n, l) but the first."""
    parts = []
    for first in range(0, len(sequences), ROWS):
        rows = sequences[first : first + ROWS]
        parts.append(-model.score(rows)[:, 1:].double().cpu())
        progress("AR loss", min(first + ROWS, len(sequences)), len(sequences))
    return torch.cat(parts)


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
    return token_nats(logits, clean).cpu() * masked


@torch.no_grad()
def masked_loss_by_noise(
    model: Model,
    sequences: Tensor,
    *,
    block_size: int,
    levels: Sequence[float] = LEVELS,
    seed: int,
    mask_id: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """The denoiser's cross-entropy at masked positions, every block beside its clean past, at fixed noise levels.

    The uniform numbers are the same for all levels, so that a level masks what every lower one
    does, and more.

    Args:
        sequences: (n, l) int64 on the CPU.

    Returns: For every level {"t": level, "loss": nats per masked token, "stderr", "count": of
        those, "by_position": the same three for each position in the block}; None where nothing was
        masked.
    """
    check_sequences(sequences, block_size)
    uniform = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(seed))
    sums = torch.zeros(len(levels), len(sequences), block_size, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for rows, columns, clean, cache in _blocks(model, sequences, block_size):
        for i, level in enumerate(levels):
            masked = uniform[rows, columns] < level
            sums[i, rows] += _masked_nats(model, clean, masked, torch.full((len(clean),), level), cache, mask_id)
            counts[i, rows] += masked
        progress("masked loss", rows.start * sequences.shape[1] + len(clean) * columns.stop, sequences.numel())

    def cell(total: Tensor, count: Tensor) -> dict[str, float | int | None]:
        return dict(zip(("loss", "stderr", "count"), ratio(total, count), strict=True))

    return [
        {
            "t": level,
            **cell(total.sum(-1), count.sum(-1)),
            "by_position": [cell(total[:, j], count[:, j]) for j in range(block_size)],
        }
        for level, total, count in zip(levels, sums, counts, strict=True)
    ]


def masks_by_count(u: Tensor, noise: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly k tokens masked, k uniform on 1..s; conditioned on t = k / s, as at generation.

    The integral of the bound over t, done exactly for every mask: int C(s, k) t^k (1 - t)^(s - k)
    dt / t = 1 / k (LLaDA, Nie et al. 2025, equation 6, by block). It is the bound of writing a
    block one token at a time in a random order, and no weight exceeds s, where 1 / t is unbounded.

    lengths: (b,) of blocks that hold less than s tokens of text. What stands behind those is masked
    always, as when the text was written first: k is uniform on 1..length, and t counts all masks.
    """
    size = noise.shape[1]
    if lengths is None:
        lengths = torch.full((len(noise),), size)
    behind = torch.arange(size) >= lengths.unsqueeze(-1)
    k = (u * lengths).floor() + 1
    masked = noise.masked_fill(behind, 2.0).argsort(-1).argsort(-1) < k.unsqueeze(-1)
    return masked | behind, (k + size - lengths) / size, lengths / k


def _masks_by_time(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token masked with probability t, t uniform on (0.001, 1], weight 1 / t (MDLM; BD3-LM, section 3)."""
    t = 1 - u * (1 - 1e-3)
    return noise < t.unsqueeze(-1), t, 1 / t


# u (b,) float64 and noise (b, s), uniform -> masked (b, s) bool, noise levels (b,), weights (b,)
BOUND_NOISE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "count": masks_by_count,
    "time": _masks_by_time,
}


@torch.no_grad()
def bound_nats(
    model: Model,
    sequences: Tensor,
    *,
    block_size: int,
    draws: int,
    seed: int,
    mask_id: int,
    noise: str = "count",
    progress: OnProgress = silent,
) -> Tensor:
    """An upper bound on the denoiser's negative log-likelihood of every block after the first, by Monte Carlo.

    Per block E[weight x sum of the cross-entropies at masked positions], noise drawn as
    `BOUND_NOISE` says, in `draws` strata. The first block is left out, so that `ar_nats(...)[:, s -
    1:]` scores the very same tokens, with text before them in both.

    Args:
        sequences: (n, l) int64 on the CPU.

    Returns: (n, l - s) float64, what each token adds to the bound, so that a mean over tokens is
        the bound per token; a standard error over sequences covers the choice of text and the
        noise.
    """
    check_sequences(sequences, block_size)
    generator = torch.Generator().manual_seed(seed)
    nats = torch.zeros(sequences.shape, dtype=torch.float64)
    for rows, columns, clean, cache in _blocks(model, sequences, block_size):
        if columns.start == 0:
            continue
        for draw in range(draws):
            u = (draw + torch.rand(len(clean), generator=generator, dtype=torch.float64)) / draws
            masked, t, weight = BOUND_NOISE[noise](u, torch.rand(clean.shape, generator=generator))
            each = _masked_nats(model, clean, masked, t, cache, mask_id)
            nats[rows, columns] += weight.unsqueeze(-1) * each.double() / draws
        progress("likelihood bound", rows.start * sequences.shape[1] + len(clean) * columns.stop, sequences.numel())
    return nats[:, block_size:]


# --- scores of continuations --------------------------------------------------------------------------------------


@torch.no_grad()
def ar_scores(model: Model, cache: ContextCache, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Continuations (b, l) of the cached text under the context tower: log-probabilities (b, l), and which tokens are
    the most probable ones (b, l) bool. What stands behind a row's end is of no consequence for what is before it."""
    assert cache.hidden is not None
    logits = model.context_lm_head(cache.hidden).unsqueeze(1)
    if ids.shape[1] > 1:
        logits = torch.cat([logits, model.verify(cache, ids[:, :-1])], dim=1)
    wanted = ids.to(logits.device)
    return -token_nats(logits, wanted), logits.argmax(-1) == wanted


@torch.no_grad()
def bound_scores(
    model: Model,
    cache: ContextCache,
    ids: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    draws: int,
    seed: int,
    mask_id: int,
) -> Tensor:
    """A lower bound (b,) on the log-probability of continuations under the denoiser, by Monte Carlo.

    Blocks begin behind the cached text. All rows meet the same noise, so that what is compared
    differs by its text alone. One token behind the text is scored without noise, from a block of
    masks. The cache is extended.

    Args:
        ids: (b, l); lengths: (b,) of each row's continuation, what stands behind it is ignored.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, total = ids.cpu(), torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, int(lengths.max()), block_size):
        if start:
            model.extend(cache, ids[:, start - block_size : start])
        clean = F.pad(ids[:, start : start + block_size], (0, max(0, start + block_size - ids.shape[1])))
        some = (lengths - start).clamp(0, block_size)
        text = torch.arange(block_size) < some.unsqueeze(-1)
        for draw in range(draws if int(some.max()) > 1 else 1):
            u = (draw + torch.rand(1, generator=generator, dtype=torch.float64)).expand(len(ids)) / draws
            noise = torch.rand(1, block_size, generator=generator).expand(len(ids), -1)
            masked, t, weight = masks_by_count(u, noise, some.clamp(min=1))
            nats = _masked_nats(model, clean, masked, t.float(), cache, mask_id) * text
            total -= weight * nats.double().sum(-1) / (draws if int(some.max()) > 1 else 1)
    return total


@torch.no_grad()
def mock_ar_scores(model: Model, cache: ContextCache, last: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `ar_scores`, by the denoiser as a next-token model; the cache holds all text but its last token (b, 1)."""
    parts = []
    for token in torch.cat([last, ids[:, :-1].to(last.device)], dim=1).split(1, dim=1):
        parts.append(model.denoise_block(token, None, cache))
        model.extend(cache, token)
    logits = torch.cat(parts, dim=1)
    wanted = ids.to(logits.device)
    return -token_nats(logits, wanted), logits.argmax(-1) == wanted
