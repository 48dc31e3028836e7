"""FP8: the shapes, layers and settings that it accepts, and the errors for others."""

import dataclasses

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.precision import CONTEXT_PRECISIONS, PRECISIONS
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.validation import validate

FP8 = [name for name, precision in PRECISIONS.items() if precision.recipe]


def nano(parallel="h100x64", **changes):
    config = load_recipe("nano_30b_a3b", [f"parallel={parallel}"], planning=True)
    return changed(config, {"train.precision": "fp8_current"} | changes)


def changed(config: RunConfig, changes) -> RunConfig:
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def check(config):
    validate(config, world_size=config.parallel.ranks)


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("parallel", ["h100x8", "h200x8", "h100x64", "h100x256", "h100x1024"])
def test_nano_is_accepted_on_every_shipped_layout(parallel, precision):
    check(nano(parallel, **{"train.precision": precision}))
    check(nano(parallel, **{"train.precision": precision, "train.context_precision": "fp8_blockwise"}))


def test_precisions_of_the_frozen_tower_have_no_history():
    assert "delayed" not in CONTEXT_PRECISIONS.values() and PRECISIONS["fp8_delayed"].recipe == "delayed"


TENSOR = {"parallel.sequence": True, "parallel.ranks": 64}
REFUSED = {
    # 1856 over 8 ranks: 232 is 14.5 times 16.
    "experts": (
        {"parallel.expert_tensor": 8, "parallel.expert": 8},
        "model.moe_intermediate_size 1856 over 8 ranks is 232: expected a multiple of 16 with train.precision fp8_curr",
    ),
    "mamba": (
        {"parallel.tensor": 8, "model.num_key_value_heads": 8, "parallel.expert_tensor": 1} | TENSOR,
        "width of in_proj of Mamba 10304 over 8 ranks is 1288: expected a multiple of 16",
    ),
    "tokens": (
        {"data.sequence_length_tokens": 8200, "noise.block_size_tokens": 8},
        "data.sequence_length_tokens x data.micro_batch_size 8200: expected a multiple of 16",
    ),
    "tokens of a rank": (
        {
            "train.precision": "fp8_blockwise",
            "parallel.tensor": 2,
            "parallel.expert_tensor": 1,
            "data.sequence_length_tokens": 8192 + 64,
        }
        | TENSOR,
        "over 2 ranks is 4128: expected a multiple of 128 with fp8_blockwise and parallel.sequence",
    ),
    "local modules": (
        {"train.transformer_impl": "local"},
        "train.transformer_impl: found local with train.precision fp8_current, expected transformer_engine or auto",
    ),
    "ends of delayed": (
        {"train.precision": "fp8_delayed", "fp8.first_layers_bf16": 1},
        "fp8.first_layers_bf16 1, fp8.last_layers_bf16 0: expected 0 with train.precision fp8_delayed",
    ),
    "too many ends": (
        {"fp8.last_layers_bf16": 53},
        "fp8.last_layers_bf16: found 53, expected at most the 52 layers of a pipeline stage",
    ),
    "padding": (
        {"fp8.router_padding": True, "parallel.moe_dispatcher": "allgather"},
        "fp8.router_padding: found true with parallel.moe_dispatcher allgather, expected another or false",
    ),
    "context beside fp32": (
        {"train.precision": "fp32", "train.context_precision": "fp8_current"},
        "train.context_precision: found fp8_current with objective two_tower and train.precision fp32, expected",
    ),
    "dispatcher": (
        {"train.precision": "bf16", "parallel.moe_dispatcher": "deepep", "parallel.expert": 1},
        "parallel.moe_dispatcher: found deepep with experts on one rank, expected alltoall, or parallel.expert above 1",
    ),
    "unknown": ({"train.precision": "fp8"}, "train.precision: found 'fp8', expected one of fp32, bf16, fp8_delayed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fp8_cannot_compute_is_refused_in_one_line(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check(nano(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_backbone_alone_has_no_context_tower():
    config = changed(nano(**{"train.context_precision": "fp8_current"}), {})
    with pytest.raises(UserError, match=r"train\.context_precision: found fp8_current with objective ar"):
        check(dataclasses.replace(config, objective="ar"))


def test_only_layers_of_the_pattern_must_fit():
    """An odd width of experts is accepted in a model without experts."""
    odd = {"model.moe_intermediate_size": 1857, "parallel.expert": 1}
    with pytest.raises(UserError, match=r"model\.moe_intermediate_size 1857"):
        check(nano(**odd))
    check(nano(**odd, **{"model.hybrid_override_pattern": "M*M*"}))
