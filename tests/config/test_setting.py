"""Every setting states the values that it accepts, and what it refuses is named in one line."""

import dataclasses

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import PhaseConfig, RunConfig
from megatron_twotower.config.setting import accepts, check_settings, setting
from megatron_twotower.config.validation import validate


def leaves(config, prefix=""):
    """Every leaf field of nested dataclasses: its dataclass, its name, and its key."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield type(config), item, f"{prefix}{item.name}"


LEAVES = [*leaves(RunConfig()), *leaves(PhaseConfig(), "phases.0.")]


@pytest.mark.parametrize(("owner", "item"), [leaf[:2] for leaf in LEAVES], ids=[leaf[2] for leaf in LEAVES])
def test_every_setting_has_limits_or_is_marked_as_free(owner, item):
    """`setting` refuses a field that has neither, so a field that it declared has one of both."""
    accepted = accepts(owner, item.name)
    kind = str(item.type)
    if accepted.limited:
        texts = bool(accepted.choices or accepted.letters)
        assert texts == ("str" in kind), "choices and letters are for texts, limits for numbers"
    else:
        assert "int" not in kind.replace("list[int]", "") and "float" not in kind, "every number has a limit"


def test_a_setting_without_limits_must_say_so():
    with pytest.raises(AssertionError, match="expected limits, or free=True"):
        setting(1, unit="steps")
    with pytest.raises(AssertionError, match="and not both"):
        setting(1, at_least=0, free=True)


def test_all_defaults_are_accepted():
    check_settings(RunConfig(phases=[PhaseConfig()]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.beta2=1.5", "optimizer.beta2: found 1.5, expected at least 0 and below 1"),
        ("optimizer.beta2=1", "optimizer.beta2: found 1.0, expected at least 0 and below 1"),
        ("optimizer.epsilon=0", "optimizer.epsilon: found 0.0, expected above 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: found nan, expected at least 0"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: found inf, expected a finite number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: found -1.0, expected at least 0"),
        (f"seed={2**63}", f"seed: found {2**63}, expected less than 2^63 = {2**63}"),
        (f"train.steps={10**30}", f"train.steps: found {10**30}, expected less than 2^63 = {2**63}"),
        ('output="a\0b"', "output: found 'a\\x00b', expected a text without NUL"),
        ("train.validation_sequences=0", "train.validation_sequences: found 0, expected at least 1"),
        ("noise.time_max=2", "noise.time_max: found 2.0, expected above 0 and at most 1"),
        ("train.recompute_layers=MX", "train.recompute_layers: found 'MX', expected letters of M*E-"),
        ("conditioning.frequencies=3", "conditioning.frequencies: found 3, expected at least 2 and a multiple of 2"),
        ("data.shuffle=some", "data.shuffle: found 'some', expected one of full, windowed, none"),
        (
            "phases=[{name: a, tokens: 2560, warmup_tokens: -1}]",
            "phases.0.warmup_tokens: found -1, expected at least 0",
        ),
    ],
)
def test_what_is_not_accepted_is_refused_in_one_line(override, expected):
    config = load_recipe("tiny_ar", [override, "schedule.warmup_steps=0"])
    with pytest.raises(UserError) as error:
        validate(config, world_size=1)
    assert str(error.value) == expected
