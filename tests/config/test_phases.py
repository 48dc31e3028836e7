"""Phases: complete global batches, defaults of the run, and errors that name the setting."""

import dataclasses

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.phases import document_alignment, phase_number, resolve_phases
from megatron_twotower.config.recipes import load_recipe, to_yaml
from megatron_twotower.config.schema import PhaseConfig, RunConfig

STEP = 256 * 8  # tokens of a global batch


def run(*phases, steps=None, **changes):
    config = dataclasses.replace(RunConfig(), phases=list(phases), **changes)
    total = sum(round(phase.tokens / STEP) for phase in phases) if steps is None else steps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=total))


def curriculum():
    return run(
        PhaseConfig("breadth", 50 * STEP, block_size_tokens=32, warmup_tokens=5 * STEP, decay_tokens=10 * STEP),
        PhaseConfig("quality", 40 * STEP + 100, mixture="best", block_size_tokens=32, learning_rate=5e-4),
        PhaseConfig("short", 21 * STEP, mixture="best", minimum_learning_rate=1e-5),
    )


def test_a_run_without_phases_is_one():
    config = RunConfig()
    (phase,) = resolve_phases(config)
    assert (phase.first, phase.steps, phase.sequences) == (0, 100, 800)
    assert phase.noise == config.noise
    assert (phase.learning_rate, phase.warmup_steps) == (1e-3, 20)


def test_what_a_phase_does_not_say_is_the_runs():
    breadth, quality, short = resolve_phases(curriculum())
    assert [phase.steps for phase in (breadth, quality, short)] == [50, 40, 21]
    assert [phase.first_step for phase in (breadth, quality, short)] == [0, 50, 90]
    assert [phase.first for phase in (breadth, quality, short)] == [0, 400, 720]
    assert [phase.noise.block_size_tokens for phase in (breadth, quality, short)] == [32, 32, 16]
    assert [phase.mixture for phase in (breadth, quality, short)] == ["breadth", "best", "best"]
    assert [phase.learning_rate for phase in (breadth, quality, short)] == [1e-3, 5e-4, 1e-3]
    assert [phase.minimum_learning_rate for phase in (breadth, quality, short)] == [0, 0, 1e-5]
    assert [(phase.warmup_steps, phase.decay_steps) for phase in (breadth, quality, short)] == [
        (5, 10),
        (20, 0),
        (20, 0),
    ]


def test_a_cursor_has_one_phase():
    phases = resolve_phases(curriculum())
    names = [phases[phase_number(phases, cursor)].name for cursor in (0, 399, 400, 719, 720, 887, 888, 10**15)]
    assert names == ["breadth", "breadth", "quality", "quality", "short", "short", "short", "short"]


def test_documents_are_padded_to_the_largest_block_of_the_run():
    assert document_alignment(curriculum()) == 32
    assert document_alignment(RunConfig()) == 16
    assert document_alignment(dataclasses.replace(RunConfig(), objective="ar")) == 1


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (PhaseConfig("", STEP), r"phases.1.name: found nothing"),
        (PhaseConfig("b", 10), r"phases.1.tokens: found 10, expected at least one global batch, 2048 tokens"),
        (PhaseConfig("b", 30 * STEP, block_size_tokens=24), r"phases.1.block_size_tokens: found 24, .* divisor .* 256"),
        (PhaseConfig("b", 30 * STEP, block_size_tokens=0), r"phases.1.block_size_tokens: found 0"),
        (PhaseConfig("b", 10 * STEP), r"phases.1: found 20 steps of warm-up and 0 of decay, expected at most its 10"),
        (PhaseConfig("b", 30 * STEP, decay_tokens=11 * STEP), r"phases.1: found 20 steps of warm-up and 11 of decay"),
        (PhaseConfig("b", 30 * STEP, minimum_learning_rate=2e-3), r"phases.1.minimum_learning_rate: found 0.002"),
        (PhaseConfig("a", 30 * STEP), r"phases: found the names a, a, expected each once"),
    ],
)
def test_a_phase_that_does_not_fit_is_named(phase, message):
    with pytest.raises(UserError, match=message):
        resolve_phases(run(PhaseConfig("a", 30 * STEP), phase))


def test_steps_must_be_those_of_the_phases():
    with pytest.raises(UserError, match=r"train.steps: found 100, expected 30, the sum of all phases, or 0"):
        resolve_phases(run(PhaseConfig("a", 30 * STEP), steps=100))


def test_a_recipe_sets_phases_and_overrides_change_them(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [tiny_ar, _self_]\ntrain: {steps: 0}\nschedule: {warmup_steps: 1}\nphases:\n"
        "  - {name: a, tokens: 2_560}\n  - {name: b, tokens: 512, learning_rate: 1.0e-3}\n"
    )
    config = load_recipe(str(recipe))
    assert config.train.steps == 12
    assert [phase.steps for phase in resolve_phases(config)] == [10, 2]
    changed = load_recipe(str(recipe), ["phases.1.tokens=1024"])
    assert [phase.steps for phase in resolve_phases(changed)] == [10, 4]
    other = load_recipe(str(recipe), ["phases=[{name: c, tokens: 5120}]"])
    assert [phase.name for phase in resolve_phases(other)] == ["c"] and other.train.steps == 20
    with pytest.raises(UserError, match="toknes"):
        load_recipe(str(recipe), ["phases=[{name: c, toknes: 5120}]"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == config
