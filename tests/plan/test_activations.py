"""The formulas of what a step keeps, against the tensors that autograd keeps."""

import dataclasses
import gc

import pytest
import torch

from helpers.kept_bytes import MODEL, config_of, kept_bytes
from helpers.models import build_two_tower, random_noisy_batch
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.plan.activations import MicroBatchShape, bytes_by_kind, layer_tensors


@pytest.fixture(autouse=True)
def new_objects_alone():
    """Objects from before a test are not searched for tensors."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "length"), [(8, 128), (4, 128), (16, 256)])
@pytest.mark.parametrize("kind", "M*-E")
def test_formulas_are_what_autograd_keeps(groups, kind, block, length, dtype):
    config = config_of(kind, block=block, length=length)
    model, _ = build_two_tower(config, groups, dtype=dtype)
    shape = MicroBatchShape(2, length, block, time_per_block=True, activation_bytes=dtype.itemsize)
    predicted = sum(tensor.bytes for tensor in layer_tensors(config.model, kind, shape))
    measured = kept_bytes(model.train(), random_noisy_batch(config), dtype)
    # A scalar for each head beside the formulas; in experts, what the router keeps is approximate.
    assert abs(measured - predicted) <= (0.05 if kind == "E" else 0.002) * measured, (measured, predicted)


@pytest.mark.parametrize("kind", "M*-E")
def test_recompute_keeps_the_input_and_a_handoff_independent_of_the_number_of_blocks(groups, kind):
    measured = {}
    for block, length in ((8, 128), (32, 128), (8, 256)):
        config = config_of(kind, block=block, length=length, recompute=kind)
        model, _ = build_two_tower(config, groups, dtype=torch.float32)
        shape = MicroBatchShape(2, length, block, time_per_block=True)
        predicted = sum(tensor.bytes for tensor in layer_tensors(config.model, kind, shape, recompute=True))
        measured[block, length] = kept_bytes(model.train(), random_noisy_batch(config), torch.float32)
        # Megatron's recompute keeps random states, and its dispatcher some of what the router made.
        measured[block, length] -= 2 * torch.get_rng_state().nbytes
        router = 2 * length * (12 * MODEL.n_routed_experts + 40 * MODEL.num_experts_per_tok) if kind == "E" else 0
        assert -0.002 * predicted <= measured[block, length] - predicted <= 0.002 * predicted + router
    assert measured[8, 256] == pytest.approx(2 * measured[8, 128], rel=1e-3), "linear in the length"
    assert measured[8, 128] == measured[32, 128], "independent of the block size"


def test_the_bytes_of_a_run(groups):
    config = config_of("ME*-M*", block=8, length=128)
    config = dataclasses.replace(config, noise=NoiseConfig(block_size_tokens=8, draws_per_context=3))
    shape = MicroBatchShape(8, 128, 8, draws=3)
    assert bytes_by_kind(config)["M"] == 2 * sum(tensor.bytes for tensor in layer_tensors(config.model, "M", shape))
    assert list(bytes_by_kind(config)) == ["M", "*", "-", "E"]
    smaller = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute_layers="M"))
    assert bytes_by_kind(smaller)["M"] < bytes_by_kind(config)["M"] / 2
    assert bytes_by_kind(smaller)["E"] == bytes_by_kind(config)["E"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length", "recompute"), [("M", 131_072, ""), ("M", 131_072, "M"), ("*", 8192, "*")])
def test_formulas_of_long_sequences(groups, kind, length, recompute):
    """What autograd keeps is linear in the length, without a term of its square."""
    config = config_of(kind, block=16, length=length, recompute=recompute)
    model, _ = build_two_tower(config, groups, dtype=torch.float32)
    shape = MicroBatchShape(2, length, 16, time_per_block=True)
    predicted = sum(t.bytes for t in layer_tensors(config.model, kind, shape, recompute=bool(recompute)))
    measured = kept_bytes(model.train(), random_noisy_batch(config), torch.float32)
    assert measured == pytest.approx(predicted, rel=0.002)
