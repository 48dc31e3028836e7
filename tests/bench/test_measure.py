import os

import pytest
import torch

from megatron_twotower.bench import measure
from megatron_twotower.bench.measure import CaseTimes, TimedCase
from megatron_twotower.common.errors import UserError


def test_cases_alternate_and_the_first_round_is_not_counted():
    order = []
    cases = [
        TimedCase("a", {"first": lambda: order.append("a1"), "second": lambda: order.append("a2")}),
        TimedCase("b", {"all": lambda: order.append("b")}),
    ]
    times = measure.time_cases(cases, repeats=5, budget_seconds=100.0)
    assert order == ["a1", "a2", "b"] * 6
    assert [len(times["a"].parts[name]) for name in ("first", "second")] == [5, 5]
    assert len(times["b"].totals) == 5


def test_long_rounds_are_fewer_but_at_least_the_minimum():
    assert len(measure.time_cases([TimedCase("a", {"all": int})], repeats=9, budget_seconds=0.0)["a"].totals) == 3
    assert len(measure.time_cases([TimedCase("a", {"all": int})], repeats=2, budget_seconds=0.0)["a"].totals) == 2


def test_a_first_round_that_compiles_does_not_make_rounds_fewer(monkeypatch):
    now, long = [0.0], iter([60.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(long, 1.0)

    assert measure.time_cases([TimedCase("a", {"all": work})], repeats=9, budget_seconds=10.0)["a"].totals == [1.0] * 9


def test_memory_that_the_allocator_caches_can_be_filled(monkeypatch):
    monkeypatch.setattr(measure.device, "is_cpu", lambda: False)
    for name, found in (("mem_get_info", (10, 100)), ("memory_reserved", 80), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    assert measure.fillable_bytes() == int(measure.FILLABLE_SHARE * 70)


def test_the_summary_of_times():
    summary = CaseTimes({"first": [1.0, 3.0, 2.0], "second": [0.5, 0.5, 4.0]}).summary()
    assert summary == {
        "median_seconds": 3.5,
        "minimum_seconds": 1.5,
        "stage_seconds": {"first": 2.0, "second": 0.5},
        "rounds": 3,
    }


def filled(mebibytes):
    return measure.extra_peak_bytes(lambda: torch.ones(mebibytes, 2**18).sum())


def test_peak_memory_of_work_in_a_process_of_its_own():
    peak = measure.in_new_process(filled, 96, preload="megatron_twotower.bench.measure")
    # The kernel counts pages in batches, so that a figure may be a little low; a CUDA build of
    # torch brings some of its own.
    assert 95 <= peak / 2**20 < (112 if torch.version.cuda is None else 144)
    assert 47 <= filled(48) / 2**20 < 64  # and in this one


def ended(_):
    os._exit(3)


def test_a_process_that_ends_without_a_result_is_an_error_for_the_user():
    with pytest.raises(UserError, match="status 3, expected a result"):
        measure.in_new_process(ended, 1, preload="megatron_twotower.bench.measure")
