import dataclasses
import math

import pytest
import torch

from helpers.models import tiny_config
from megatron_twotower.bench import gradient_variance, training_steps
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.data.tokenizer import load_tokenizer
from megatron_twotower.train.losses import masked_diffusion_loss
from megatron_twotower.train.noise import corrupt

SMALL = recipes_folder() / "backbones" / "small"


def test_variance_is_the_unbiased_one_summed_over_entries():
    gradients = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    variance, error = gradient_variance.total_variance(list(gradients))
    assert variance == pytest.approx(float(gradients.double().var(dim=0).sum()))
    distances = (gradients - gradients.mean(0)).square().sum(1) * 6 / 5
    assert error == pytest.approx(float(distances.std() / math.sqrt(6)), rel=1e-5)


def test_rows_weigh_cost_against_variance():
    rows = gradient_variance.variance_rows({1: (8.0, 1.0), 4: (2.0, 0.5)}, {1: 1.0, 4: 3.0}, data=2.0)
    assert [row["draws"] for row in rows] == [1, 4]
    assert (rows[0]["cost_x_noise"], rows[0]["cost_x_total"]) == (1.0, 1.0)
    assert rows[1]["relative_cost_per_copy"] == 0.75
    assert rows[1]["cost_x_noise"] == 3.0 * 2 / 8
    assert rows[1]["cost_x_total"] == 3.0 * (2 + 2) / (8 + 2)


def test_held_out_text_in_the_backbones_own_tokens():
    tokens = gradient_variance.held_out_tokens(SMALL, count=300)
    assert tokens.shape == (300,) and tokens.dtype == torch.int64
    assert len(load_tokenizer(SMALL).decode(tokens).split()) > 50
    with pytest.raises(UserError, match="held-out tokens, expected at least"):
        gradient_variance.held_out_tokens(SMALL, count=10**9)


def test_the_gradient_is_divided_by_the_count_and_noise_is_fresh_each_time(groups):
    config = gradient_variance.without_router_updates(tiny_config())
    trainer = training_steps.build_trainer(config, groups)
    tokens = torch.randint(4, config.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = gradient_variance.batch_of_epoch(tokens, 3)
    found = gradient_variance.flat_gradient(trainer, batch)
    noisy = corrupt(batch, config.noise, seed=config.seed)
    module = trainer.model.only.module
    report = masked_diffusion_loss(module.tower, module(noisy), noisy, config.noise, groups)
    trained = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(report.total / report.count, trained, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert torch.equal(found, gradient_variance.flat_gradient(trainer, batch))
    assert not torch.equal(found, gradient_variance.flat_gradient(trainer, gradient_variance.batch_of_epoch(tokens, 4)))
    two = gradient_variance.with_draws(trainer, 2)
    assert two.config.noise == dataclasses.replace(config.noise, draws_per_context=2)
