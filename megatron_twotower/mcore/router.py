"""Megatron's top-k router, with a balancing loss that does not depend on the parallel layout."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

# Ranges of noise levels whose experts the sequence loss balances by themselves.
BALANCED_RANGES = 5


class Router(TopKRouter):
    """The router of a MoE layer. Its sequence loss is a sum over sequences, not over micro-batches.

    Megatron 0.16.1 (transformer/moe/router.py) computes the sequence loss of all sequences of a
    micro-batch as if each had the average length, and weights it by the tokens of a rank. The
    objective then depends on how sequences are grouped in micro-batches, on padding, and on the
    number of ranks that split a sequence.

    Attributes:
        sequence_weights: (sequences,) what each sequence adds to the count that the loss is divided
            by. It is set before each forward pass. `None` uses the number of positions that are not
            padding.
        rows_per_sequence: The number of rows that this rank has of each sequence: its stretches,
            with context parallelism.
        noise_buckets: (l b,) int64, the range of noise levels of each position: one of
            `BALANCED_RANGES` in training, of those that are reported in validation. It is set
            before each forward pass; `None` without noise, or with nothing to balance or count.
        tokens_by_noise: (ranges, experts) float32, the tokens of each expert in passes without
            gradients since it was made; `None` does not count.
    """

    sequence_weights: Tensor | None = None
    rows_per_sequence: int = 1
    noise_buckets: Tensor | None = None
    tokens_by_noise: Tensor | None = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the weights and choices of experts, both (l b, experts).

        The choice is made in the router's precision. The kernels of grouped experts and of token
        dispatchers read weights in at most fp32.
        """
        weights, chosen = super().forward(input, padding_mask)
        return (weights.float() if self.config.moe_grouped_gemm else weights), chosen

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Add the sequence loss to the summed loss, through the gradient of `probs`.

        The term is `coefficient * sum_b counted_b * E * sum_e f_be P_be`.
        f_be is the share of expert e in the choices of sequence b, and P_be its mean score there
        (DeepSeek-V3, equations 17 to 20). Like the loss, the term is divided by the global count
        later. It is then the mean over sequences, with the weights of the loss. The scores and the
        routing map are already zero for padding.

        With noise, b is the positions of one range of noise levels in a sequence, and counted_b is
        shared by the number of positions: masked positions go to few experts, which visible ones
        must not hide.

        Args:
            probs: The weights of the experts, through which the gradient of the term is added.
            scores_for_aux_loss: (l b, experts), with this rank's l under sequence parallelism.
            routing_map: (l b, experts) bool, likewise.
            seq_length: l of this rank.
            bsz: b, the number of rows.
            with_padding_mask: Not used.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        shape = (seq_length, bsz // self.rows_per_sequence, self.rows_per_sequence)
        if self.noise_buckets is None:
            ranges = torch.ones_like(scores_for_aux_loss[:, :1])
        else:
            ranges = F.one_hot(self.noise_buckets, BALANCED_RANGES).to(scores_for_aux_loss.dtype)
        members = ranges.unflatten(0, shape)

        def summed(rows: Tensor) -> Tensor:
            """(l b, experts) -> (sequences, ranges, experts)."""
            return torch.einsum("lsrn,lsre->sne", members, rows.to(members.dtype).unflatten(0, shape))

        chosen, scores = summed(routing_map), summed(scores_for_aux_loss)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        real = chosen.sum(dim=2) / self.topk
        losses = self.num_experts * (chosen / self.topk * scores).sum(dim=2) / real.square().clamp(min=1)
        weights = real
        if self.sequence_weights is not None:
            of_sequences = self.sequence_weights / real.sum(dim=1).clamp(min=1)
            weights = real * of_sequences.unsqueeze(1)
        return MoEAuxLossAutoScaler.apply(probs, coefficient * (weights * losses).sum())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert without padding.

        In training for the update of the selection bias; in validation by noise level. This
        replaces Megatron's method, whose padding mask lacks the dimension of experts, and which is
        compiled again in every process.
        """
        counted = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
        if torch.is_grad_enabled():
            self.local_tokens_per_expert += counted.sum(dim=0)
        elif self.tokens_by_noise is not None and self.noise_buckets is not None:
            self.tokens_by_noise.index_add_(0, self.noise_buckets, counted.to(self.tokens_by_noise.dtype))
