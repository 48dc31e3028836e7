"""The learning rate of a run, and of each of its phases."""

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_twotower.config.schema import PhaseConfig, RunConfig, ScheduleConfig
from megatron_twotower.train.optimizer import build_schedule

STEP = 256 * 8  # tokens of a global batch


def rates(config):
    """The rate that every step takes, counted from 0; the schedule is at the end."""
    optimizer = SimpleNamespace(param_groups=[{"max_lr": 99.0, "min_lr": 0.5}] if config.phases else [{}])
    schedule, found = build_schedule(config, optimizer), []
    for _ in range(config.train.steps):
        schedule.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found, schedule, optimizer


def run(*phases, steps):
    config = dataclasses.replace(
        RunConfig(),
        phases=list(phases),
        schedule=ScheduleConfig(warmup_steps=4, decay_steps=5, minimum_learning_rate=1e-5),
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def two_phases():
    return run(
        PhaseConfig("a", 20 * STEP),
        PhaseConfig("b", 10 * STEP, learning_rate=4e-4, warmup_tokens=2 * STEP, decay_tokens=0),
        steps=30,
    )


def test_each_phase_warms_up_stays_and_decays_anew():
    found, _, _ = rates(two_phases())
    assert found[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[4:15] == pytest.approx([1e-3] * 11)
    assert found[15:20] == pytest.approx([1e-3 - i / 5 * (1e-3 - 1e-5) for i in range(1, 6)])
    assert found[20:22] == pytest.approx([2e-4, 4e-4])
    assert found[22:] == pytest.approx([4e-4] * 8)


@pytest.mark.parametrize("shape", [{"kind": "wsd"}, {"kind": "wsd", "decay_shape": "cosine"}, {"kind": "cosine"}])
@pytest.mark.parametrize("phased", [False, True])
def test_no_step_has_rate_0_and_the_last_one_has_the_minimum(shape, phased):
    config = run(*[PhaseConfig("a", 20 * STEP)] * phased, steps=20)
    found, _, _ = rates(dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **shape)))
    assert found[3] == max(found) == pytest.approx(1e-3) and found[0] == pytest.approx(2.5e-4)
    assert found[-1] == min(found) == pytest.approx(1e-5)


def test_a_phase_that_is_the_whole_run_has_the_rates_of_the_run():
    whole, _, _ = rates(run(steps=20))
    phase, _, _ = rates(run(PhaseConfig("a", 20 * STEP), steps=20))
    assert phase == whole


def test_a_resumed_schedule_goes_on_inside_its_phase():
    found, _, _ = rates(two_phases())
    for step in (3, 17, 20, 22):
        _, saved, _ = rates(dataclasses.replace(two_phases()))
        state = saved.state_dict() | {"num_steps": step}
        optimizer = SimpleNamespace(param_groups=[{}])
        schedule = build_schedule(two_phases(), optimizer)
        schedule.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == found[step - 1]
        schedule.step(1)
        assert optimizer.param_groups[0]["lr"] == found[step]
