"""The objectives: sums and counts of a forward pass, ready to be added up and divided once by a global count."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.config import NoiseConfig
from megatron_twotower.ops.cross_entropy import linear_cross_entropy
from megatron_twotower.records import LossReport, NoisyBatch
from megatron_twotower.towers import Tower


def _head(
    tower: Tower, hidden: Tensor, targets: Tensor, weights: Tensor, groups: ProcessGroupCollection
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(
        hidden, tower.output_layer.weight, targets, weights, group=groups.tp, first=tower.vocabulary_start()
    )


def autoregressive_loss(tower: Tower, hidden: Tensor, tokens: Tensor, groups: ProcessGroupCollection) -> LossReport:
    """Next-token cross-entropy of every position but the last.

    Args:
        hidden: final hidden states (l, b, h).
        tokens: (b, l).
    """
    inputs, targets = hidden[:-1].flatten(0, 1), tokens.t()[1:].flatten()
    total, losses = _head(tower, inputs, targets, torch.ones_like(targets, dtype=torch.float32), groups)
    count = torch.tensor(len(targets), dtype=torch.int32, device=tokens.device)
    return LossReport(total, count, losses.sum().view(1), count.float().view(1))


def noise_buckets(times: Tensor, buckets: int) -> Tensor:
    """Which of the equal parts of (0, 1] each noise level falls in; the first is (0, 1 / buckets]."""
    return (times * buckets).ceil().long().clamp(1, buckets) - 1


def masked_diffusion_loss(
    tower: Tower, hidden: Tensor, batch: NoisyBatch, noise: NoiseConfig, groups: ProcessGroupCollection
) -> LossReport:
    """Cross-entropy of the clean tokens at masked positions.

    `masked_mean` divides by the number of masked positions (the published trainer's objective, but global).
    `elbo` weights each by 1 / t and divides by the number of all tokens: the likelihood bound of absorbing diffusion
    with a linear schedule (MDLM, Sahoo et al. 2024, equation 10; BD3-LM section 3).

    Args:
        hidden: final hidden states (l, b, h) of the noisy stream.
    """
    length = batch.tokens.shape[1]
    times = batch.times.repeat_interleave(length // batch.times.shape[1], dim=1)
    scored = batch.masked.nonzero(as_tuple=True)
    levels = times[scored]
    elbo = noise.weighting == "elbo"
    weights = levels.reciprocal() if elbo else torch.ones_like(levels)
    total, losses = _head(tower, hidden.transpose(0, 1)[scored], batch.tokens[scored], weights, groups)
    count = torch.tensor(batch.tokens.numel() if elbo else len(levels), dtype=torch.int32, device=levels.device)
    index = noise_buckets(levels, noise.report_buckets)
    zeros = torch.zeros(noise.report_buckets, device=levels.device)
    sums = zeros.index_add(0, index, losses)
    return LossReport(total, count, sums, zeros.index_add(0, index, torch.ones_like(losses)))
