"""Megatron's top-k router, balanced by the same numbers on every layout."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """The router of a MoE layer, which counts sequences where Megatron's counts micro-batches.

    Megatron 0.16.1 (transformer/moe/router.py) takes the sequence loss of all sequences of a
    micro-batch as if each were as long as the average one, and weights it by the tokens of a rank:
    the objective then depends on how sequences share micro-batches, on padding, and on the ranks
    that split a sequence.

    sequence_weights: (b,) what each sequence adds to the count that the loss is divided by, set
    before each forward pass; None for its positions that are not padding.
    """

    sequence_weights: Tensor | None = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices (l b, experts). The choice is made in the router's precision; kernels of grouped experts
        and of dispatchers read weights in fp32 at most."""
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
        """Add `coefficient * sum_b counted_b * E * sum_e f_be P_be` to the summed loss, through `probs`.

        f_be is the share of expert e in the choices of sequence b, P_be its mean score there
        (DeepSeek-V3, equations 17 to 20). Divided by the global count like the loss itself, the
        term is the mean over sequences, weighted as the loss weights them. Padding is zero in
        scores and map already.

        Args: scores_for_aux_loss, routing_map: (l b, experts), l of this rank under sequence
            parallelism.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        chosen = routing_map.unflatten(0, (seq_length, bsz)).sum(0, dtype=torch.float32)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        real = chosen.sum(dim=1, keepdim=True) / self.topk
        scores = scores_for_aux_loss.unflatten(0, (seq_length, bsz)).sum(0)
        each = self.num_experts * (chosen / self.topk * scores).sum(dim=1) / real.square().clamp(min=1).squeeze(1)
        weights = real.squeeze(1) if self.sequence_weights is None else self.sequence_weights
        return MoEAuxLossAutoScaler.apply(probs, coefficient * (weights * each).sum())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert, padding left out, for the selection bias.

        Megatron's mask has no dimension of experts, and it compiles these two lines in every
        process.
        """
        if torch.is_grad_enabled():
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += counted.sum(dim=0)
