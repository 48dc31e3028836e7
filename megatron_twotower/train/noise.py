"""Absorbing-diffusion noise: times, masks, and the randomness they come from. Pure functions of their arguments.

Randomness is counter-based: every uniform number is a hash of (seed, purpose, epoch, sample, ...),
computed in integers. The same sequence therefore meets the same noise on any number of ranks, in
any micro-batch, after any resume, on CPU and CUDA alike, and no generator has a state to save.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.common.keyed_random import keyed_uniform
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.types import Batch, NoisyBatch

# Separate streams of numbers under one seed; those of a sequence's later draws are this far apart.
_TIMES, _MASKS, _STRATA = 1, 2, 3
_DRAW = 16

# The list of scored places is as long as a multiple of this: few shapes for the head, and full
# matrix products.
SCORED_MULTIPLE = 64


def sample_times(batch: Batch, noise: NoiseConfig, *, seed: int, draw: int = 0) -> Tensor:
    """Noise levels in (time_min, time_max] of one draw: (b, n) float32 per block, or (b, 1) per sequence.

    `stratified` spreads them evenly: over the blocks of a sequence (a random offset and a random
    order, BD3-LM section 4), or, with one time per sequence, over consecutive samples of the run (a
    Weyl sequence); and the draws of one sequence or block over the range. `uniform` draws are
    independent.
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


def corrupt(batch: Batch, noise: NoiseConfig, *, seed: int, times: Tensor | None = None) -> NoisyBatch:
    """Replace each token by the mask token with probability t, its block's noise level, in `draws_per_context` draws.

    Args:
        times: (b, n) or (b, 1) float32 noise levels to use instead of sampled ones, in one draw.
    """
    if times is not None:
        levels = [times]
    else:
        levels = [sample_times(batch, noise, seed=seed, draw=draw) for draw in range(noise.draws_per_context)]
    masked = [_mask(batch, noise, seed, draw, each) for draw, each in enumerate(levels)]
    return noisy_batch(batch, torch.cat(masked), torch.cat(levels), noise)


def _mask(batch: Batch, noise: NoiseConfig, seed: int, draw: int, times: Tensor) -> Tensor:
    """(b, l) bool of one draw."""
    device, length = batch.tokens.device, batch.tokens.shape[1]
    blocks = torch.arange(length // noise.block_size_tokens, device=device).unsqueeze(-1)
    offsets = torch.arange(noise.block_size_tokens, device=device)
    epochs, samples = (key.reshape(-1, 1, 1) for key in (batch.epochs, batch.samples))
    uniform = keyed_uniform(seed, _MASKS + _DRAW * draw, epochs, samples, blocks, offsets)
    return (uniform < times.unsqueeze(-1)).reshape(-1, length)


def noisy_batch(batch: Batch, masked: Tensor, times: Tensor, noise: NoiseConfig) -> NoisyBatch:
    """The record of a mask (r b, l) bool and its noise levels. Padding is masked like the rest, and not scored."""
    draws = len(masked) // len(batch.tokens)
    real = torch.ones_like(masked) if batch.padding is None else ~batch.padding.repeat(draws, 1)
    scored = masked & real
    places = scored.flatten().nonzero().squeeze(-1)
    noisy = batch.tokens.repeat(draws, 1).masked_fill(masked, noise.mask_token_id)
    return NoisyBatch(
        tokens=batch.tokens,
        noisy=noisy,
        times=times,
        scored_positions=F.pad(places, (0, -len(places) % SCORED_MULTIPLE)),
        num_scored=torch.tensor(len(places), dtype=torch.int32),
        num_tokens=real.sum(dtype=torch.int32),
        block=noise.block_size_tokens,
        documents=batch.documents,
        padding=batch.padding,
        sequence_weights=(real if noise.weighting == "elbo" else scored).sum(dim=1, dtype=torch.float32),
    )
