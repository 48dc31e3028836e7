"""A denoiser without time, states or aligned attention, against blocks computed one by one."""

import dataclasses

import pytest
import torch

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from helpers.reference import context_caches, denoise_block, empty_cache
from megatron_twotower.model.ablations import seen_handoffs

PATTERN = "M*EM*-M"


def reduced(config, **conditioning):
    return dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, **conditioning))


def caches_without(without, caches, model):
    kinds = model.hybrid_override_pattern
    if without == "states":
        return [empty_cache(model, "M") if kind == "M" else each for kind, each in zip(kinds, caches, strict=True)]
    if without == "aligned_attention":
        last = caches[kinds.rindex("*")]
        return [last if kind == "*" else each for kind, each in zip(kinds, caches, strict=True)]
    return caches


@torch.no_grad()
@pytest.mark.parametrize("without", ["nothing", "time", "states", "aligned_attention"])
def test_a_reduced_denoiser_equals_blocks_computed_one_by_one(groups, without):
    config = reduced(tiny_config(PATTERN), without=without)
    model, source = build_two_tower(config, groups)
    batch = random_noisy_batch(config, batch=1)
    got = (model(batch) @ model.tower.output_layer.weight.t())[:, 0]
    for number in range(4):
        block = slice(4 * number, 4 * number + 4)
        caches, _ = context_caches(source, config.model, batch.tokens[0, : 4 * number])
        t = torch.tensor(1.0) if without == "time" else batch.times[0, number]
        caches = caches_without(without, caches, config.model)
        want = denoise_block(source, config.model, 16, batch.noisy[0, block], t, caches)
        torch.testing.assert_close(got[block], want, rtol=1e-5, atol=1e-6)


def test_layers_without_a_handoff_have_none():
    assert seen_handoffs([None, None], "aligned_attention") == [None, None]


def test_every_trained_parameter_still_has_a_gradient(groups):
    for without in ("time", "states", "aligned_attention"):
        config = reduced(tiny_config(PATTERN), without=without)
        model, _ = build_two_tower(config, groups)
        model(random_noisy_batch(config)).sum().backward()
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "tower.layers" in name)
