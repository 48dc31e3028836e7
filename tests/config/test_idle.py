"""Settings that the others make useless are refused by name."""

import dataclasses

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.idle import IDLE, refuse_idle
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.schema import PhaseConfig, RunConfig, flatten

LAYOUTS = sorted(path.stem for path in (recipes_folder() / "parallel").glob("*.yaml"))


def changed(changes, *, pattern="ME*", **others):
    config = dataclasses.replace(RunConfig(), **others)
    for key, value in {"model.hybrid_override_pattern": pattern, **changes}.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


REFUSED = [
    (
        {"noise.time_per": "block"},
        {"objective": "ar"},
        "noise.time_per: found 'block' with objective ar, which does no",
    ),
    ({"conditioning.period": 5.0}, {"objective": "ar"}, "conditioning.period: found 5.0 with objective ar"),
    ({"train.recompute_layers": "M"}, {"objective": "ar"}, "train.recompute_layers: found 'M' with objective ar"),
    ({"conditioning.initialisation": "released", "init.denoiser": "d"}, {}, "found 'released' with init.denoiser"),
    ({"schedule.kind": "cosine", "schedule.decay_steps": 5}, {}, "found 5 with another schedule.kind than wsd"),
    ({"schedule.kind": "constant", "schedule.minimum_learning_rate": 1e-5}, {}, "with schedule.kind constant"),
    ({"data.shuffle_run_tokens": 7}, {}, "data.shuffle_run_tokens: found 7 with another data.shuffle than windowed"),
    ({"fp8.margin": 2, "train.precision": "fp8_current"}, {}, "fp8.margin: found 2 with another train.precision than"),
    ({"fp8.format": "e4m3"}, {}, "fp8.format: found 'e4m3' with train.precision and train.context_precision without"),
    ({"parallel.bucket_parameters": 9}, {}, "parallel.bucket_parameters: found 9 with parallel.overlap_grad_reduce fa"),
    ({"train.sequence_aux_loss": 0.1}, {"pattern": "M*"}, "found 0.1 with a model without experts, which does not use"),
    ({"train.recompute_layers": "ME-"}, {}, "train.recompute_layers: found -, expected letters of the pattern ME*"),
    ({}, {"phases": [PhaseConfig("a", mixture="m")]}, "phases.0.mixture: found 'm' with no data.blend, which does not"),
]


@pytest.mark.parametrize(("changes", "others", "message"), REFUSED, ids=[each[2][:40] for each in REFUSED])
def test_a_setting_without_effect_is_refused(changes, others, message):
    with pytest.raises(UserError) as error:
        refuse_idle(changed(changes, **others))
    assert message in str(error.value)
    assert str(error.value).partition(" with ")[2].count("\n") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule.minimum_learning_rate": 1e-5},
        {"train.validation_sequences": 8, "logging.wandb": "disabled", "logging.name": "a"},
        {"fp8.format": "e4m3", "train.context_precision": "fp8_current"},
        {"data.shuffle": "windowed", "data.shuffle_run_tokens": 7},
        {"parallel.overlap_grad_reduce": True, "parallel.bucket_parameters": 9},
    ],
)
def test_what_is_used_or_switched_off_is_accepted(changes):
    refuse_idle(changed(changes))


def test_every_key_is_a_setting():
    known = {*dict(flatten(RunConfig())), *(f"phases.{item.name}" for item in dataclasses.fields(PhaseConfig))}
    assert {key for idle in IDLE for key in idle.keys} <= known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_recipes_of_the_real_model_set_nothing_in_vain(layout):
    refuse_idle(load_recipe("nano_30b_a3b", [f"parallel={layout}"], planning=True))
