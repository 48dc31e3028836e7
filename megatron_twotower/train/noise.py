"""Absorbing-diffusion noise: noise levels and masks. Pure functions of their arguments.

Randomness is counter-based: every uniform number is a hash of (seed, purpose, epoch, sample, ...),
computed in integers. So the noise of a sequence is the same on any number of ranks, in any
micro-batch, after any resume, on CPU and on CUDA, and no generator has a state to save.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.common.keyed_random import keyed_uniform
from megatron_twotower.config.context_split import COMPLETE
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.ops.context_parallel import rows_of_stretches
from megatron_twotower.types import Batch, NoisyBatch

# Purposes: separate streams of numbers with one seed. The purposes of consecutive draws of a
# sequence differ by `_DRAW`.
_TIMES, _MASKS, _STRATA, _COUNTS = 1, 2, 3, 4
_DRAW = 16

# The list of scored positions is padded to a multiple of this: few shapes for the head, and full
# tiles in matrix products.
SCORED_MULTIPLE = 64


def sample_times(batch: Batch, noise: NoiseConfig, *, seed: int, draw: int = 0) -> Tensor:
    """Sample the noise levels of one draw.

    `uniform` levels are independent. `stratified` levels are spread evenly over the range: over the
    blocks of a sequence (a random offset and a random order, BD3-LM section 4), or, with one level
    per sequence, over consecutive samples of the run (a Weyl sequence). The draws of one sequence
    or block are spread evenly too.

    Returns:
        (b, n) float32 with a level per block, or (b, 1) with one per sequence, in
        (time_min, time_max].
    """
    device, length = batch.tokens.device, batch.tokens.shape[1]
    count = length // noise.block_size_tokens if noise.time_per == "block" else 1
    samples, epochs = batch.samples.unsqueeze(-1), batch.epochs.unsqueeze(-1)
    blocks = torch.arange(count, device=device)
    independent = draw if noise.time_sampling == "uniform" else 0
    uniform = keyed_uniform(seed, _TIMES + _DRAW * independent, epochs, samples, blocks)
    if noise.time_sampling == "stratified" and noise.time_per == "block":
        strata = keyed_uniform(seed, _STRATA, epochs, samples, blocks).argsort(dim=-1)
        uniform = (strata + uniform) / count
    elif noise.time_sampling == "stratified":
        golden_ratio = (math.sqrt(5) - 1) / 2
        offset = keyed_uniform(seed, _STRATA, 0, device=device)
        uniform = (offset + batch.positions.unsqueeze(-1).to(torch.float64) * golden_ratio) % 1.0
    if draw and noise.time_sampling == "stratified":
        uniform = (uniform + draw / noise.draws_per_context) % 1.0
    return (noise.time_max - uniform * (noise.time_max - noise.time_min)).to(torch.float32)


def corrupt(
    batch: Batch, noise: NoiseConfig, *, seed: int, times: Tensor | None = None, stretches: Sequence[slice] = COMPLETE
) -> NoisyBatch:
    """Replace each token by the mask token with probability t, the noise level of its block.

    There are `noise.draws_per_context` draws.

    Args:
        batch: The clean sequences.
        noise: The settings of the noise.
        seed: Seed of levels and masks.
        times: (b, n) or (b, 1) float32 noise levels instead of sampled ones; then there is one
            draw.
        stretches: The positions that this rank has of each sequence (`config.context_split`). Other
            tokens of the batch are not used.
    """
    if times is not None:
        levels = [times]
    else:
        levels = [_draw_times(batch, noise, seed, draw) for draw in range(noise.draws_per_context)]
    masked = [_mask(batch, noise, seed, draw, each) for draw, each in enumerate(levels)]
    return noisy_batch(batch, torch.cat(masked), torch.cat(levels), noise, stretches)


def _is_second(noise: NoiseConfig, draw: int) -> bool:
    """Whether a draw follows from the one before it."""
    return noise.paired_draws != "independent" and draw % 2 == 1


def _draw_times(batch: Batch, noise: NoiseConfig, seed: int, draw: int) -> Tensor:
    """The noise levels of one draw, as `sample_times` samples them or as its pair has them."""
    if not _is_second(noise, draw):
        return sample_times(batch, noise, seed=seed, draw=draw)
    first = sample_times(batch, noise, seed=seed, draw=draw - 1)
    return first if noise.paired_draws == "mirrored" else noise.time_min + noise.time_max - first


def _mask(batch: Batch, noise: NoiseConfig, seed: int, draw: int, times: Tensor) -> Tensor:
    """Sample the mask of one draw, (b, l) bool."""
    device, length = batch.tokens.device, batch.tokens.shape[1]
    blocks = torch.arange(length // noise.block_size_tokens, device=device).unsqueeze(-1)
    offsets = torch.arange(noise.block_size_tokens, device=device)
    epochs, samples = (key.reshape(-1, 1, 1) for key in (batch.epochs, batch.samples))
    second, levels = _is_second(noise, draw), times.unsqueeze(-1).to(torch.float64)

    def uniform(purpose: int, *keys: Tensor) -> Tensor:
        numbers = keyed_uniform(seed, purpose + _DRAW * (draw - second), epochs, samples, blocks, *keys)
        return 1.0 - numbers if second else numbers

    if noise.mask_counts == "random":
        return (uniform(_MASKS, offsets) < levels).reshape(-1, length)
    in_blocks = maskable(batch, noise).unflatten(1, (-1, noise.block_size_tokens))
    counts = (levels * in_blocks.sum(-1, keepdim=True) + uniform(_COUNTS)).floor()
    if noise.mask_counts == "at_least_one":
        counts = counts.clamp(min=1)
    # The masked positions are the first of a race, in which a position wins with odds in proportion
    # to its weight.
    times_of_arrival = -torch.log1p(-uniform(_MASKS, offsets)) * torch.exp(-noise.late_bias * (1 - levels) * offsets)
    times_of_arrival = times_of_arrival.masked_fill(~in_blocks, math.inf)  # others are never masked
    places = times_of_arrival.argsort(dim=-1).argsort(dim=-1)
    return (places < counts).reshape(-1, length)


def maskable(batch: Batch, noise: NoiseConfig) -> Tensor:
    """Which targets may be masked, (b, l) bool: all, or of conversations those of answers."""
    if batch.scored is None:
        return torch.ones_like(batch.tokens, dtype=torch.bool)
    return _targets(batch.scored, noise)


def _targets(of_tokens: Tensor, noise: NoiseConfig) -> Tensor:
    """Values (b, l) of tokens -> those of the targets of positions; 0 beyond the sequence."""
    return F.pad(of_tokens[:, 1:], (0, 1)) if noise.token_shift else of_tokens


def _scorable(batch: Batch, noise: NoiseConfig) -> Tensor:
    """Which targets may be scored, (b, l) bool: those that are text, and may be masked.

    With `token_shift` the first token of a sequence, and of a document, is no target.
    """
    if noise.token_shift:
        return has_next_token(batch)
    return maskable(batch, noise) if batch.padding is None else maskable(batch, noise) & ~batch.padding


def has_next_token(batch: Batch) -> Tensor:
    """Where the next token is text of the same document that may be scored, (b, l) bool."""
    found = torch.ones_like(batch.tokens[:, 1:], dtype=torch.bool)
    if batch.documents is not None:
        found = found & (batch.documents[:, 1:] == batch.documents[:, :-1])
    if batch.padding is not None:
        found = found & ~batch.padding[:, 1:]
    if batch.scored is not None:
        found = found & batch.scored[:, 1:]
    return F.pad(found, (0, 1))


def _hidden(masked: Tensor, noise: NoiseConfig) -> Tensor:
    """Which positions of the noisy stream hold the mask token, for masked targets (r b, l) bool.

    With `token_shift` the first position of a block holds the last token of the text before it, and
    each other one the target of the position before.
    """
    if not noise.token_shift:
        return masked
    in_blocks = masked.unflatten(1, (-1, noise.block_size_tokens))
    return F.pad(in_blocks[..., :-1], (1, 0)).flatten(1)


def noisy_batch(
    batch: Batch, masked: Tensor, times: Tensor, noise: NoiseConfig, stretches: Sequence[slice] = COMPLETE
) -> NoisyBatch:
    """Apply a mask to clean sequences. Padding is masked like other tokens, and not scored.

    With `batch.scored`, other positions are neither masked nor scored: they stand clean in both
    streams, padding too.

    Args:
        batch: The clean sequences.
        masked: (r b, l) bool, the targets that are masked.
        times: (r b, n) or (r b, 1) float32 noise levels.
        noise: The settings of the noise.
        stretches: As in `corrupt`.
    """
    draws = len(masked) // len(batch.tokens)
    masked = masked & maskable(batch, noise).repeat(draws, 1)
    scorable = _scorable(batch, noise).repeat(draws, 1)
    scored = masked & scorable
    noisy = batch.tokens.repeat(draws, 1).masked_fill(_hidden(masked, noise), noise.mask_token_id)
    shares = teacher_shares(batch, masked, noise) if noise.distils else None
    weights = distance_weights(masked, noise) if noise.distance_decay else None

    def rows(tensor: Tensor) -> Tensor:
        return rows_of_stretches(tensor, stretches)

    positions = rows(scored).flatten().nonzero().squeeze(-1)
    scored_positions = F.pad(positions, (0, -len(positions) % SCORED_MULTIPLE))
    return NoisyBatch(
        tokens=rows(batch.tokens),
        noisy=rows(noisy),
        targets=rows(_targets(batch.tokens, noise)),
        times=_times_of_rows(times, stretches, block=noise.block_size_tokens),
        scored_positions=scored_positions,
        num_scored=torch.tensor(len(positions), dtype=torch.int32),
        num_tokens=rows(scorable).sum(dtype=torch.int32),
        block=noise.block_size_tokens,
        documents=None if batch.documents is None else rows(batch.documents),
        padding=None if batch.padding is None else rows(batch.padding),
        sequence_documents=None if stretches == COMPLETE else batch.documents,
        sequence_weights=(scorable if noise.weighting == "elbo" else scored).sum(dim=1, dtype=torch.float32),
        teacher_shares=None if shares is None else rows(shares).flatten()[scored_positions],
        distance_weights=None if weights is None else rows(weights).flatten()[scored_positions],
    )


def _times_of_rows(times: Tensor, stretches: Sequence[slice], *, block: int) -> Tensor:
    """Noise levels (r b, n) or (r b, 1) of sequences -> of rows."""
    if stretches == COMPLETE:
        return times
    if times.shape[1] == 1:
        return times.repeat_interleave(len(stretches), dim=0)
    return rows_of_stretches(times, [slice(part.start // block, part.stop // block) for part in stretches])


def teacher_shares(batch: Batch, masked: Tensor, noise: NoiseConfig) -> Tensor:
    """Compute the share of the context tower's next-token distribution in the target of a position.

    For a masked token x_i with no visible token after it in its block, p(x_i | x_<i) of the context
    tower is an unbiased target: its mean over the masked tokens of x_<i is the distribution of x_i
    given what the denoiser sees. For another position it ignores the visible tokens after i.
    The first token of a sequence or of a document has no such distribution.

    Args:
        batch: The clean sequences.
        masked: (r b, l) bool, the targets that are masked.
        noise: The settings of the noise.

    Returns:
        (r b, l) float32.
    """
    visible = ~masked.unflatten(1, (-1, noise.block_size_tokens))
    if noise.token_shift:  # no position of the block holds its last target
        visible[..., -1] = False
    visible_from_here = visible.flip(-1).cumsum(-1).flip(-1) > 0
    visible_later = F.pad(visible_from_here[..., 1:], (0, 1)).flatten(1)
    shares = torch.where(visible_later, noise.distillation_elsewhere, noise.distillation)
    if noise.token_shift:  # such a token is no target
        return shares
    starts = torch.zeros_like(batch.tokens, dtype=torch.bool)
    starts[:, 0] = True
    if batch.documents is not None:
        starts[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    return shares.masked_fill(starts.repeat(len(masked) // len(starts), 1), 0.0)


def distance_weights(masked: Tensor, noise: NoiseConfig) -> Tensor:
    """Compute the weight exp(-(d - 1) / noise.distance_decay) of each masked position.

    d is the distance from the last visible token before it; the token before the block is visible.

    Args:
        masked: (r b, l) bool, the targets that are masked.
        noise: The settings of the noise.

    Returns:
        (r b, l) float32, 1 where nothing is masked.
    """
    in_blocks = masked.unflatten(1, (-1, noise.block_size_tokens))
    places = torch.arange(noise.block_size_tokens, device=masked.device)
    last_visible = places.expand(in_blocks.shape).masked_fill(in_blocks, -1).cummax(dim=-1).values
    beyond_next = (places - last_visible - 1).clamp(min=0).to(torch.float32)
    return torch.exp(-beyond_next / noise.distance_decay).flatten(1)
