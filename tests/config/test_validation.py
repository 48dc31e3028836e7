"""Rules between several settings."""

import pytest

from helpers.models import planned_config
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.validation import validate


def test_the_tokens_of_a_global_batch_are_counted_in_32_bits():
    long = {"data.sequence_length_tokens": 2**20, "data.global_batch_size": 1024, "data.micro_batch_size": 1}
    validate(planned_config(long), world_size=1)
    for more in ({"data.global_batch_size": 2048}, {"noise.draws_per_context": 2}):
        with pytest.raises(UserError, match="found 2147483648 tokens, expected fewer than 2147483648") as error:
            validate(planned_config(long | more), world_size=1)
        assert "data.global_batch_size" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise.mask_counts": "at_least_one"}, "noise.mask_counts at_least_one"),
        ({"noise.mask_counts": "exact", "noise.late_bias": 0.5}, "noise.late_bias 0.5"),
        ({"noise.distance_decay": 4.0}, "noise.distance_decay 4.0"),
    ],
)
def test_what_bounds_no_likelihood_is_refused_with_the_weights_of_the_bound(changes, named):
    validate(planned_config(changes), world_size=1)
    with pytest.raises(UserError, match=f"^{named}: found it with noise.weighting elbo"):
        validate(planned_config(changes | {"noise.weighting": "elbo"}), world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.hybrid_override_pattern": "*E"},
            "states with model.hybrid_override_pattern \\*E, expected at least 1 of M",
        ),
        ({"train.recompute_layers": "ME"}, "states with train.recompute_layers ME, expected no M there"),
    ],
)
def test_states_are_left_out_only_where_there_are_some(changes, message):
    without = {"conditioning.without": "states"}
    validate(planned_config(changes), world_size=1)
    validate(planned_config(without), world_size=1)
    with pytest.raises(UserError, match=f"^conditioning.without: found {message}$"):
        validate(planned_config(changes | without), world_size=1)


def test_blocks_that_begin_with_an_answer_have_no_token_shift():
    validate(planned_config({"noise.token_shift": True}), world_size=1)
    with pytest.raises(UserError, match=r"^noise\.token_shift: found true with data\.align_blocks answer"):
        validate(planned_config({"noise.token_shift": True, "data.align_blocks": "answer"}), world_size=1)


def test_attention_of_another_layer_is_on_the_same_stage():
    without = {"conditioning.without": "aligned_attention"}
    with pytest.raises(UserError, match=r"found aligned_attention with .* ME\*-ME, expected at least 2 of \*$"):
        validate(planned_config(without), world_size=1)
    changes = without | {"model.hybrid_override_pattern": "M*E-*E", "parallel.pipeline": 2}
    with pytest.raises(UserError, match=r"found aligned_attention with parallel\.pipeline 2, expected 1"):
        validate(planned_config(changes), world_size=2)
