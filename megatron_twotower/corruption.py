"""Absorbing-diffusion noise: times, masks, and the randomness they come from. Pure functions of their arguments.

Randomness is counter-based: every uniform number is a hash of (seed, purpose, epoch, sample, ...), computed in
integers. The same sequence therefore meets the same noise on any number of ranks, in any micro-batch, after any
resume, on CPU and CUDA alike, and no generator has a state to save.
"""

import math

import torch
from torch import Tensor

from megatron_twotower.config import NoiseConfig
from megatron_twotower.records import Batch, NoisyBatch

# Separate streams of numbers under one seed.
_TIMES, _MASKS, _STRATA = 1, 2, 3


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# The increment and the two multipliers of splitmix64 (Steele, Lea and Flood 2014).
_GOLDEN, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def keyed_uniform(seed: int, *keys: Tensor | int, device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each element of the broadcast integer keys."""
    state = torch.tensor(_signed(seed), dtype=torch.int64, device=device)
    for key in keys:
        state = _mix((state ^ key) * _GOLDEN + _GOLDEN)
    return _shift(_mix(state + _GOLDEN), 11).to(torch.float64) * 2.0**-53


def sample_times(batch: Batch, noise: NoiseConfig, *, seed: int) -> Tensor:
    """Noise levels in (time_min, time_max]: (b, n) float32 per block, or (b, 1) per sequence.

    `stratified` spreads them evenly: over the blocks of a sequence (a random offset and a random order, BD3-LM
    section 4), or, with one time per sequence, over consecutive samples of the run (a Weyl sequence).
    """
    device, length = batch.tokens.device, batch.tokens.shape[1]
    count = length // noise.block_size_tokens if noise.time_per == "block" else 1
    samples, epochs = batch.samples.unsqueeze(-1), batch.epochs.unsqueeze(-1)
    blocks = torch.arange(count, device=device)
    uniform = keyed_uniform(seed, _TIMES, epochs, samples, blocks)
    if noise.time_sampling == "stratified" and noise.time_per == "block":
        strata = keyed_uniform(seed, _STRATA, epochs, samples, blocks).argsort(dim=-1)
        uniform = (strata + uniform) / count
    elif noise.time_sampling == "stratified":
        golden_ratio = (math.sqrt(5) - 1) / 2
        offset = keyed_uniform(seed, _STRATA, 0, device=device)
        uniform = (offset + batch.positions.unsqueeze(-1).to(torch.float64) * golden_ratio) % 1.0
    return (noise.time_max - uniform * (noise.time_max - noise.time_min)).to(torch.float32)


def corrupt(batch: Batch, noise: NoiseConfig, *, seed: int, times: Tensor | None = None) -> NoisyBatch:
    """Replace each token by the mask token with probability t, its block's noise level.

    Args:
        times: (b, n) or (b, 1) float32 noise levels to use instead of sampled ones.
    """
    device, length = batch.tokens.device, batch.tokens.shape[1]
    times = sample_times(batch, noise, seed=seed) if times is None else times
    blocks = torch.arange(length // noise.block_size_tokens, device=device).unsqueeze(-1)
    offsets = torch.arange(noise.block_size_tokens, device=device)
    epochs, samples = (key.reshape(-1, 1, 1) for key in (batch.epochs, batch.samples))
    uniform = keyed_uniform(seed, _MASKS, epochs, samples, blocks, offsets)
    masked = (uniform < times.unsqueeze(-1)).reshape(-1, length)
    return NoisyBatch(batch.tokens, batch.tokens.masked_fill(masked, noise.mask_token_id), masked, times)
