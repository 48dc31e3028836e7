import dataclasses

import pytest
import torch

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from megatron_twotower.bench import concatenated
from megatron_twotower.convert import initial_weights, load
from megatron_twotower.mcore import transformer_config
from megatron_twotower.model import parameter_map
from megatron_twotower.ops.attention import block_attention_ref


@pytest.mark.parametrize("queries", [4, 8, 256])
def test_its_attention_and_all_its_gradients(monkeypatch, queries):
    monkeypatch.setattr(concatenated, "QUERIES", queries)
    torch.manual_seed(0)
    shapes = [(2, 4, 24, 6), *[(2, 2, 24, 6)] * 4]
    query, *keys = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    named = dict(zip(("key", "value", "clean_key", "clean_value"), keys, strict=True))
    ours = concatenated.concatenated_block_attention(query, **named, block=4)
    expected = block_attention_ref(query, **named, block=4)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(expected, (query, *keys), grad),
        torch.autograd.grad(ours, (query, *keys), grad),
        strict=True,
    ):
        torch.testing.assert_close(b, a)


def test_it_computes_what_two_equal_towers_compute(groups):
    """With conditioning at its identity and equal towers, the noisy half is the denoiser."""
    config = tiny_config("*E-*")
    two_tower, source = build_two_tower(config, groups)
    megatron, model = transformer_config.transformer_config(config), config.model
    identity = initial_weights.fresh_conditioning(model, config.conditioning, seed=0)

    def start(name):
        if name.startswith(("t_embedder.", "t_block.", "scale_shift_tables.")):
            return identity(name)
        return source(_context_name(name))

    entries = parameter_map.denoiser_entries(model, config.conditioning.frequencies)
    load.load_weights(two_tower, entries, start, model=model, groups=groups)
    one = concatenated.ConcatenatedModel(config, megatron, groups).double()
    load.load_weights(
        one,
        parameter_map.trained_backbone_entries(model),
        lambda name: source(_context_name(name)),
        model=model,
        groups=groups,
    )
    batch = random_noisy_batch(config)
    torch.testing.assert_close(one(batch), two_tower(batch))


def _context_name(name):
    """The context tower's name of a tensor of a backbone or a denoiser."""
    if name.startswith(("lm_head", "context_lm_head")):
        return "context_lm_head.weight"
    return name.replace("denoiser_tower.", "context_tower.", 1).replace("backbone.", "context_tower.", 1)


def test_it_has_no_mamba_layers(groups):
    config = dataclasses.replace(tiny_config("M*"))
    with pytest.raises(AssertionError, match="clean state"):
        concatenated.ConcatenatedModel(config, transformer_config.transformer_config(config), groups)
