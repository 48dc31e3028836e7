"""The likelihood of text under the context tower, and its variational bound under the denoiser.

The measures return nats for each token and sequence. `estimate` and `by_position` compute means
with standard errors over sequences. Dimensions: n sequences, l length, s block size, b rows of a
batch.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.progress import OnProgress, silent
from megatron_twotower.hf.modeling_nemotron_h_twotower import ContextCache
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# Noise levels at which the masked loss is measured.
LEVELS = tuple(level / 10 for level in range(1, 11))
# Sequences in a batch, at most, and their tokens unless one sequence has more.
BATCH_ROWS, BATCH_TOKENS = 32, 1 << 18
# Logits that are computed at a time (rows x positions).
LOGIT_ROWS = 1024


# --- means ---


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        nats_per_token: The mean.
        stderr: Its standard error over sequences.
        tokens: Number of tokens.
    """

    nats_per_token: float
    stderr: float
    tokens: int


def ratio(sums: Tensor, counts: Tensor) -> tuple[float | None, float | None, int]:
    """The mean over all tokens, its standard error and the number of tokens.

    The error is that of a ratio of two sums, to first order, because sequences are independent but
    tokens are not.

    Args:
        sums: (n,) sum over the tokens of each sequence.
        counts: (n,) tokens of each sequence.

    Returns:
        Mean and error are None if there are no tokens.
    """
    total, n = int(counts.sum()), len(counts)
    if not total:
        return None, None, 0
    mean = float(sums.double().sum() / total)
    residual = sums.double() - mean * counts.double()
    return mean, float((residual.square().sum() * n / (n - 1)).sqrt() / total), total


def estimate(nats: Tensor) -> Estimate:
    """The mean of nats (n, tokens)."""
    mean, stderr, tokens = ratio(nats.double().sum(-1), torch.full((len(nats),), nats.shape[1]))
    assert mean is not None and stderr is not None
    return Estimate(mean, stderr, tokens)


def by_position(nats: Tensor, block_size: int) -> list[Estimate]:
    """The mean of nats (n, blocks x s) at each position in the block."""
    return [estimate(nats[:, position::block_size]) for position in range(block_size)]


def check_sequences(sequences: Tensor, block_size: int) -> None:
    """Raise a `UserError` unless (n, l) is two or more sequences of two or more whole blocks."""
    count, length = sequences.shape
    if count < 2:
        raise UserError(f"sequences: found {count}, expected at least 2 for a standard error")
    if length % block_size or length == block_size:
        raise UserError(f"sequence length {length}: expected two or more blocks of {block_size} tokens")


# --- measures ---


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (b, l) of targets (b, l) under logits (b, l, v), in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.transpose(1, 2), targets.to(logits.device), reduction="none")


@torch.no_grad()
def ar_nats(model: TwoTowerModel, sequences: Tensor, *, progress: OnProgress = silent) -> Tensor:
    """Next-token cross-entropy of the context tower on sequences (n, l): (n, l - 1) float64.

    The first token of a sequence has none.
    """
    parts = []
    for batch in _batches(sequences):
        parts.append(-model.score(sequences[batch])[:, 1:].double().cpu())
        progress("AR loss", min(batch.stop, len(sequences)), len(sequences))
    return torch.cat(parts)


def _batches(sequences: Tensor) -> Iterator[slice]:
    """The rows of each batch of sequences (n, l)."""
    rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // sequences.shape[1]))
    return (slice(first, first + rows) for first in range(0, len(sequences), rows))


def _blocks(
    model: TwoTowerModel, sequences: Tensor, block_size: int
) -> Iterator[tuple[slice, slice, Tensor, ContextCache]]:
    """Yield every block of every batch that has text before it: all but the first.

    Yields:
        Its rows and columns in `sequences`, its clean ids (b, s), and the cache of the text before
        it.
    """
    for rows in _batches(sequences):
        cache = model.prefill(sequences[rows, :0], for_denoiser=True)
        for start in range(0, sequences.shape[1], block_size):
            columns = slice(start, start + block_size)
            clean = sequences[rows, columns]
            if start:
                yield rows, columns, clean, cache
            if start + block_size < sequences.shape[1]:
                model.extend(cache, clean)


def _masked_nats(
    model: TwoTowerModel, clean: Tensor, masked: Tensor, t: Tensor, cache: ContextCache, mask_id: int
) -> Tensor:
    """Cross-entropy of the denoiser (b, s); 0 where a token is not masked."""
    logits = model.denoise_block(clean.masked_fill(masked, mask_id), t, cache)
    return token_nats(logits, clean).cpu() * masked


@torch.no_grad()
def masked_loss_by_noise(
    model: TwoTowerModel,
    sequences: Tensor,
    *,
    block_size: int,
    levels: Sequence[float] = LEVELS,
    seed: int,
    mask_id: int,
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """The cross-entropy of the denoiser at masked positions, at fixed noise levels.

    Every block but the first is predicted after its clean context. All levels use the same uniform
    numbers, so that a level masks every token that a lower level masks.

    Args:
        model: Two-tower model.
        sequences: (n, l) int64 on the CPU.
        block_size: s.
        levels: Noise levels.
        seed: Seed of the uniform numbers.
        mask_id: Id of the mask token.
        progress: Called after every block.

    Returns:
        For every level a dict. `t` is the level, `loss` the nats per masked token, `stderr` its
        error and `count` the number of masked tokens. `by_position` has the last three for each
        position in the block. Loss and error are None if no token was masked.
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
    """Mask exactly k tokens of a block, k uniform on 1..s, at noise level t = k / s.

    The bound is an integral over t. For every mask it is computed exactly: int C(s, k) t^k
    (1 - t)^(s - k) dt / t = 1 / k (LLaDA, Nie et al. 2025, equation 6, by block). This is also the
    bound of generating a block one token at a time in a random order. No weight exceeds s, whereas
    1 / t is unbounded.

    Args:
        u: (b,) float64, uniform; gives k.
        noise: (b, s) uniform; the k smallest numbers are masked.
        lengths: (b,) text tokens of blocks with less text than s; None for s. The positions after
            the text are always masked, as during generation. Then k is uniform on 1..length, and t
            counts all masks.

    Returns:
        Masked positions (b, s) bool, noise levels (b,) and weights (b,).
    """
    size = noise.shape[1]
    if lengths is None:
        lengths = torch.full((len(noise),), size)
    after_text = torch.arange(size) >= lengths.unsqueeze(-1)
    k = (u * lengths).floor() + 1
    masked = noise.masked_fill(after_text, 2.0).argsort(-1).argsort(-1) < k.unsqueeze(-1)
    return masked | after_text, (k + size - lengths) / size, lengths / k


@torch.no_grad()
def bound_nats(
    model: TwoTowerModel,
    sequences: Tensor,
    *,
    block_size: int,
    draws: int,
    seed: int,
    mask_id: int,
    progress: OnProgress = silent,
) -> Tensor:
    """An upper bound on the negative log-likelihood of blocks under the denoiser, by Monte Carlo.

    The bound of a block is E[weight x sum of the cross-entropies at masked positions], with the
    noise of `masks_by_count` in `draws` strata. The first block is left out: then `ar_nats(...)[:,
    s - 1:]` scores exactly the same tokens, and in both there is text before them.

    Args:
        model: Two-tower model.
        sequences: (n, l) int64 on the CPU.
        block_size: s.
        draws: Draws of noise for each block.
        seed: Seed of the noise.
        mask_id: Id of the mask token.
        progress: Called after every block.

    Returns:
        (n, l - s) float64, the contribution of each token to the bound. The mean over tokens is the
        bound per token. Its standard error over sequences covers the choice of text and the noise.
    """
    check_sequences(sequences, block_size)
    generator = torch.Generator().manual_seed(seed)
    nats = torch.zeros(sequences.shape, dtype=torch.float64)
    for rows, columns, clean, cache in _blocks(model, sequences, block_size):
        for draw in range(draws):
            u = (draw + torch.rand(len(clean), generator=generator, dtype=torch.float64)) / draws
            masked, t, weight = masks_by_count(u, torch.rand(clean.shape, generator=generator))
            block_nats = _masked_nats(model, clean, masked, t, cache, mask_id)
            nats[rows, columns] += weight.unsqueeze(-1) * block_nats.double() / draws
        progress("likelihood bound", rows.start * sequences.shape[1] + len(clean) * columns.stop, sequences.numel())
    return nats[:, block_size:]


# --- scores of continuations ---


@torch.no_grad()
def ar_scores(model: TwoTowerModel, cache: ContextCache, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Score continuations of the cached text by the context tower.

    Args:
        model: Two-tower model.
        cache: The cache of the text before the continuations.
        ids: (b, l) continuations, padded on the right. Padding does not change other scores.

    Returns:
        Log-probabilities (b, l), and whether each token is the most probable one, (b, l) bool.
    """
    if ids.numel() > LOGIT_ROWS:
        first = model.next_token_logits(cache, ids[:, :0])
        return _ar_scores_in_pieces(model, copy.deepcopy(cache), ids, first)
    return _scores(model.next_token_logits(cache, ids[:, :-1]), ids)


def _scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `ar_scores` returns of ids (b, l), from their logits (b, l, v)."""
    targets = ids.to(logits.device)
    return -token_nats(logits, targets), logits.argmax(-1) == targets


def _ar_scores_in_pieces(
    model: TwoTowerModel, cache: ContextCache, ids: Tensor, first_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """`ar_scores` of long continuations; the cache is extended."""
    parts, step = [_scores(first_logits, ids[:, :1])], max(1, LOGIT_ROWS // len(ids))
    for start, hidden in model.read(cache, ids[:, :-1]):
        for offset in range(0, hidden.shape[1], step):
            logits = model.context_lm_head(hidden[:, offset : offset + step])
            first = 1 + start + offset
            parts.append(_scores(logits, ids[:, first : first + logits.shape[1]]))
    return torch.cat([nats for nats, _ in parts], dim=1), torch.cat([greedy for _, greedy in parts], dim=1)


@torch.no_grad()
def bound_scores(
    model: TwoTowerModel,
    cache: ContextCache,
    ids: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    draws: int,
    seed: int,
    mask_id: int,
) -> Tensor:
    """A lower bound on the log-probability of continuations under the denoiser, by Monte Carlo.

    The first block begins directly after the cached text. All rows have the same noise, so that
    only their text makes a difference. A last block with one token of text needs no noise: the
    token is predicted from a block of masks.

    Args:
        model: Two-tower model.
        cache: The `prefill` of the text before the continuations, `for_denoiser`; it is extended.
        ids: (b, l) continuations, padded on the right.
        lengths: (b,) tokens of each continuation.
        block_size: s.
        draws: Draws of noise for each block.
        seed: Seed of the noise.
        mask_id: Id of the mask token.

    Returns:
        (b,) float64, in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, total = ids.cpu(), torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, int(lengths.max()), block_size):
        if start:
            model.extend(cache, ids[:, start - block_size : start])
        clean = F.pad(ids[:, start : start + block_size], (0, max(0, start + block_size - ids.shape[1])))
        text_lengths = (lengths - start).clamp(0, block_size)
        is_text = torch.arange(block_size) < text_lengths.unsqueeze(-1)
        block_draws = draws if int(text_lengths.max()) > 1 else 1
        for draw in range(block_draws):
            u = (draw + torch.rand(1, generator=generator, dtype=torch.float64)).expand(len(ids)) / draws
            noise = torch.rand(1, block_size, generator=generator).expand(len(ids), -1)
            masked, t, weight = masks_by_count(u, noise, text_lengths.clamp(min=1))
            nats = _masked_nats(model, clean, masked, t.float(), cache, mask_id) * is_text
            total -= weight * nats.double().sum(-1) / block_draws
    return total


@torch.no_grad()
def mock_ar_scores(model: TwoTowerModel, cache: ContextCache, last: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Score continuations by the denoiser as a next-token model.

    Args:
        model: Two-tower model.
        cache: The cache of the text before the continuations, without the last token of that text.
            It is extended.
        last: (b, 1) the last token of that text.
        ids: (b, l) continuations, padded on the right.

    Returns:
        As `ar_scores`.
    """
    parts = []
    for token in torch.cat([last, ids[:, :-1].to(last.device)], dim=1).split(1, dim=1):
        parts.append(model.lm_head(model.denoise_hidden(token, None, cache)))
        model.extend(cache, token)
    return _scores(torch.cat(parts, dim=1), ids)
