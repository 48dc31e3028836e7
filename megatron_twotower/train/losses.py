"""The objectives: sums and counts of a forward pass, which are added up and divided once.

Megatron adds up the counts over micro-batches and ranks, and divides the gradients by the global
count (`calculate_per_token_loss` in `mcore.transformer_config`). Nothing here divides by a count.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.config.context_split import COMPLETE
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.model.towers import Tower
from megatron_twotower.ops.context_parallel import ContextRanks, context_ranks, finish, rows_of_stretches
from megatron_twotower.ops.cross_entropy import Teacher, linear_cross_entropy
from megatron_twotower.train.noise import has_next_token
from megatron_twotower.types import Batch, LossReport, NoisyBatch, TargetBatch, noise_buckets


def _head(
    tower: Tower, hidden: Tensor, targets: Tensor, weights: Tensor, groups: ProcessGroupCollection, **more: Any
) -> tuple[Tensor, Tensor]:
    first = tower.vocabulary_start()
    return linear_cross_entropy(hidden, tower.output_layer(), targets, weights, group=groups.tp, first=first, **more)


def next_tokens(batch: Batch, stretches: Sequence[slice] = COMPLETE) -> TargetBatch:
    """The target of every position: the next token, if it is of the same document and scored.

    Args:
        batch: Clean sequences.
        stretches: The positions that this rank has of each sequence (`config.context_split`). Of
            the other tokens of the batch only the one after each stretch is used.
    """

    def rows(tensor: Tensor) -> Tensor:
        return rows_of_stretches(tensor, stretches)

    return TargetBatch(
        tokens=rows(batch.tokens),
        targets=rows(F.pad(batch.tokens[:, 1:], (0, 1))),
        weights=rows(has_next_token(batch).float()),
        documents=None if batch.documents is None else rows(batch.documents),
        padding=None if batch.padding is None else rows(batch.padding),
        sequence_documents=None if stretches == COMPLETE else batch.documents,
    )


def autoregressive_loss(tower: Tower, hidden: Tensor, batch: TargetBatch, groups: ProcessGroupCollection) -> LossReport:
    """Compute the next-token cross-entropy of every position that has a weight.

    Args:
        tower: The tower with the head.
        hidden: (l, b, h) final hidden states.
        batch: The targets.
        groups: Process groups of this rank.
    """
    weights, targets = batch.weights.t().flatten(), batch.targets.t().flatten()
    total, losses = _head(tower, hidden.flatten(0, 1), targets, weights, groups)
    count = weights.sum()
    return LossReport(total, count.to(torch.int32), (losses * weights).sum().view(1), count.view(1))


def _states_before(clean: Tensor, positions: Tensor, ranks: ContextRanks | None) -> Tensor:
    """The final states (m, h) from which the distributions of the tokens at `positions` follow.

    Args:
        clean: (l, b, h) final states of the clean stream.
        positions: (m,) in the flattened (b, l).
        ranks: The ranks that share the sequences.
    """
    rows = clean.transpose(0, 1)
    states = rows.flatten(0, 1)[(positions - 1).clamp(min=0)]
    if ranks is None:
        return states
    length = rows.shape[1]
    last_of_others = finish(ranks.before(rows, 1)).squeeze(1)[positions // length]
    return torch.where((positions % length == 0).unsqueeze(-1), last_of_others, states)


def masked_diffusion_loss(
    tower: Tower,
    hidden: Tensor,
    batch: NoisyBatch,
    noise: NoiseConfig,
    groups: ProcessGroupCollection,
    *,
    context: Tower | None = None,
) -> LossReport:
    """Compute the cross-entropy of the masked targets.

    `masked_mean` divides by the number of masked positions: the objective of the published trainer,
    but over the global batch. `elbo` weights each position by 1 / t and divides by the number of
    all tokens that may be scored, masked or not: the likelihood bound of absorbing diffusion with a
    linear schedule (MDLM, Sahoo et al. 2024, equation 10; BD3-LM section 3).

    With `batch.teacher_shares`, targets are shared between the clean tokens and the context tower's
    next-token distributions. With `noise.certainty` the entropy of what is predicted right is
    added. With `batch.distance_weights` positions have weights, and the count stays that of the
    positions. The sums by noise level are those of the clean tokens, unweighted, in any case.

    Args:
        tower: The tower with the head.
        hidden: (l, r b, h) final hidden states of the noisy stream. With `batch.teacher_shares`
            those of the clean stream follow: (l, r b + b, h).
        batch: The noisy sequences and their targets.
        noise: The settings of the noise.
        groups: Process groups of this rank.
        context: The context tower, for `batch.teacher_shares`.
    """
    levels = batch.position_times.flatten()[batch.scored_positions]
    scored = (torch.arange(len(levels), device=levels.device) < batch.num_scored).to(levels.dtype)
    elbo = noise.weighting == "elbo"
    weights = scored / levels if elbo else scored
    if batch.distance_weights is not None:
        weights = weights * batch.distance_weights
    positions = batch.scored_positions % batch.tokens.numel()
    rows = hidden[:, : len(batch.noisy)].transpose(0, 1).flatten(0, 1)[batch.scored_positions]
    teacher = None
    if batch.teacher_shares is not None:
        assert context is not None, "the targets of teacher_shares are those of a context tower"
        clean = hidden[:, len(batch.noisy) :].detach()
        if noise.token_shift:
            states = clean.transpose(0, 1).flatten(0, 1)[positions]
        else:
            states = _states_before(clean, positions, context_ranks(groups.cp, batch.sequence_documents))
        teacher = Teacher(states, context.output_layer(), batch.teacher_shares)
    targets = batch.targets.flatten()[positions]
    total, losses = _head(tower, rows, targets, weights, groups, teacher=teacher, certainty=noise.certainty)
    index = noise_buckets(levels, noise.report_buckets)
    zeros = torch.zeros(noise.report_buckets, device=levels.device)
    count = batch.num_tokens if elbo else batch.num_scored
    return LossReport(total, count, zeros.index_add(0, index, losses * scored), zeros.index_add(0, index, scored))
