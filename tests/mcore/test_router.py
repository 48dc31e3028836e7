"""Balancing of experts: the sequence loss and the selection bias, against explicit sums."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from megatron_twotower.mcore import parallel, transformer_config
from megatron_twotower.mcore.releases import RELEASE
from megatron_twotower.model.mixers import MixtureOfExperts
from megatron_twotower.types import Blocks

COEFFICIENT, LENGTH, EXPERTS, TOP = 0.5, 16, 6, 2


@pytest.fixture
def experts(groups):
    """A MoE layer of float64 with random weights, in training."""
    config = tiny_config("E", sequence_aux_loss=COEFFICIENT, router_bias_update_rate=0.25)
    layer = MixtureOfExperts(config.model, transformer_config.transformer_config(config), groups).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    # The schedules set it before each backward pass.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    return layer


def hidden_of(sequences, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTH, sequences, 24, generator=generator, dtype=torch.float64)


def router_gradient(experts, hidden, blocks=None):
    """The gradient of the balancing loss alone: the other loss is zero times the output."""
    experts.zero_grad()
    (experts(hidden, blocks or Blocks(), mode="causal")[0] * 0).sum().backward()
    return experts.moe.router.weight.grad.clone()


def balance(weight, hidden, real, counted):
    """sum_b counted_b E sum_e f_be P_be, sequence by sequence."""
    total = 0
    for b in range(hidden.shape[1]):
        scores = (hidden[real[b], b] @ weight.t()).sigmoid()
        scores = scores / scores.sum(-1, keepdim=True)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(TOP).indices, 1.0)
        share, mean = chosen.sum(0) / (len(scores) * TOP), scores.mean(0)
        total = total + counted[b] * EXPERTS * (share * mean).sum()
    return COEFFICIENT * total


@pytest.mark.parametrize("counted", [None, [3.0, 16.0, 0.0]])
def test_the_sequence_loss_is_the_sum_over_sequences(experts, counted):
    hidden = hidden_of(3)
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[0, 5:], padding[2, 12:] = True, True
    weights = None if counted is None else torch.tensor(counted, dtype=torch.float64)
    got = router_gradient(experts, hidden, Blocks(padding=padding, sequence_weights=weights))
    weight = experts.moe.router.weight.detach().clone().requires_grad_()
    real = ~padding
    balance(weight, hidden, real, real.sum(1) if counted is None else weights).backward()
    # Megatron 0.19 scores in fp32 for the loss, whatever the router's precision.
    near = {"rtol": 1e-5, "atol": 1e-9} if RELEASE == "0.16" else {"rtol": 2e-4, "atol": 1e-7}
    torch.testing.assert_close(got, weight.grad, **near)
    assert got.abs().max() > 1e-3


@pytest.mark.parametrize("counted", [None, [3.0, 16.0, 0.0]])
def test_with_noise_each_range_of_levels_is_balanced_by_itself(experts, counted):
    """A range counts like a sequence, with its share of what the sequence counts."""
    hidden, ranges = hidden_of(3), torch.zeros(3, LENGTH, dtype=torch.int64)
    ranges[0, 4:8], ranges[0, 8:], ranges[1, 2:] = 1, 4, 3
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[0, 6:12], padding[1, :2] = True, True
    weights = None if counted is None else torch.tensor(counted, dtype=torch.float64)
    blocks = Blocks(padding=padding, sequence_weights=weights, noise_buckets=ranges)
    got = router_gradient(experts, hidden, blocks)
    weight = experts.moe.router.weight.detach().clone().requires_grad_()
    total = 0
    for b in range(3):
        real = ~padding[b]
        for level in ranges[b, real].unique():
            of_range = real & (ranges[b] == level)
            share = of_range.sum() if counted is None else counted[b] * of_range.sum() / real.sum()
            total = total + balance(weight, hidden[:, b : b + 1], of_range[None], [share])
    total.backward()
    near = {"rtol": 1e-5, "atol": 1e-9} if RELEASE == "0.16" else {"rtol": 2e-4, "atol": 1e-7}
    torch.testing.assert_close(got, weight.grad, **near)
    together = router_gradient(experts, hidden, Blocks(padding=padding, sequence_weights=weights))
    assert (got - together).abs().max() > 1e-3


def test_the_grouping_of_sequences_in_micro_batches_does_not_matter(experts):
    hidden = hidden_of(4)
    padding = torch.zeros(4, LENGTH, dtype=torch.bool)
    padding[0, 3:], padding[1, 9:] = True, True
    together = router_gradient(experts, hidden, Blocks(padding=padding))
    alone = sum(router_gradient(experts, hidden[:, i : i + 1], Blocks(padding=padding[i : i + 1])) for i in range(4))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-9)


def test_padding_is_not_counted_and_draws_of_a_sequence_are(experts):
    router, hidden = experts.moe.router, hidden_of(6)
    padding = torch.zeros(3, LENGTH, dtype=torch.bool)
    padding[1, 10:] = True
    experts(hidden, Blocks(padding=padding), mode="causal")
    assert router.local_tokens_per_expert.sum() == TOP * 2 * int((~padding).sum())
    counted = router.local_tokens_per_expert.clone()
    with torch.no_grad():
        experts(hidden, Blocks(padding=padding), mode="causal")
    assert torch.equal(router.local_tokens_per_expert, counted), "a pass without gradients counts nothing"


def test_padding_changes_no_output(experts):
    hidden, padding = hidden_of(2), torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, 4:] = True
    with_padding, _ = experts(hidden, Blocks(padding=padding), mode="causal")
    torch.testing.assert_close(with_padding, experts(hidden, Blocks(), mode="causal")[0])


def test_the_bias_moves_towards_idle_experts_and_the_frozen_one_stays(groups):
    config = tiny_config("ME", router_bias_update_rate=0.25)
    model, _ = build_two_tower(config, groups)
    wrapped = parallel.wrap([model], config, groups)
    frozen = {name: tensor.clone() for name, tensor in model.context.named_buffers()}
    model.train()
    model(random_noisy_batch(config)).sum().backward()
    router = model.tower.layers["1"].mixer.moe.router
    tokens, before = router.local_tokens_per_expert.clone(), router.expert_bias.clone()
    assert tokens.sum() == TOP * 2 * LENGTH
    wrapped.config.finalize_model_grads_func(wrapped.chunks, torch.tensor(1, dtype=torch.int), pg_collection=groups)
    torch.testing.assert_close(router.expert_bias, before + 0.25 * (tokens.mean() - tokens).sign().float())
    assert torch.equal(wrapped.expert_tokens[0], tokens) and not router.local_tokens_per_expert.any()
    assert frozen and all(torch.equal(tensor, frozen[name]) for name, tensor in model.context.named_buffers())


def test_without_a_coefficient_there_is_no_balancing(groups):
    config = tiny_config("E")
    layer = MixtureOfExperts(config.model, transformer_config.transformer_config(config), groups).double().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
    assert not router_gradient(layer, hidden_of(2)).any()
