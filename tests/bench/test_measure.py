import json
import os

import pytest
import torch

from megatron_twotower.bench import measure
from megatron_twotower.bench.measure import Case, Times
from megatron_twotower.common import machine, tables
from megatron_twotower.common.errors import UserError


def test_cases_take_turns_and_the_first_round_is_not_counted():
    order = []
    cases = [
        Case("a", {"first": lambda: order.append("a1"), "second": lambda: order.append("a2")}),
        Case("b", {"all": lambda: order.append("b")}),
    ]
    times = measure.in_turns(cases, repeats=5, budget_seconds=100.0)
    assert order == ["a1", "a2", "b"] * 6
    assert [len(times["a"].stages[name]) for name in ("first", "second")] == [5, 5]
    assert len(times["b"].totals) == 5


def test_long_rounds_are_fewer_but_never_below_the_least():
    assert len(measure.in_turns([Case("a", {"all": int})], repeats=9, budget_seconds=0.0)["a"].totals) == 3
    assert len(measure.in_turns([Case("a", {"all": int})], repeats=2, budget_seconds=0.0)["a"].totals) == 2


def test_a_first_round_that_compiles_does_not_make_rounds_fewer(monkeypatch):
    now, long = [0.0], iter([60.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(long, 1.0)

    assert measure.in_turns([Case("a", {"all": work})], repeats=9, budget_seconds=10.0)["a"].totals == [1.0] * 9


def test_what_the_allocator_keeps_of_earlier_cases_can_be_filled(monkeypatch):
    monkeypatch.setattr(measure.host, "is_host", lambda: False)
    for name, found in (("mem_get_info", (10, 100)), ("memory_reserved", 80), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    assert measure.fillable_bytes() == int(measure.FILLABLE * 70)


def test_figures_of_times():
    figures = Times({"first": [1.0, 3.0, 2.0], "second": [0.5, 0.5, 4.0]}).figures()
    assert figures == {
        "median_seconds": 3.5,
        "minimum_seconds": 1.5,
        "stage_seconds": {"first": 2.0, "second": 0.5},
        "rounds": 3,
    }


def filled(mebibytes):
    return measure.extra_peak_bytes(lambda: torch.ones(mebibytes, 2**18).sum())


def test_peak_memory_of_work_in_a_process_of_its_own():
    peak = measure.apart(filled, 96, preload="megatron_twotower.bench.measure")
    # The kernel counts pages in batches, so that a figure may be a little low; a CUDA build of
    # torch brings some of its own.
    assert 95 <= peak / 2**20 < (112 if torch.version.cuda is None else 144)
    assert 47 <= filled(48) / 2**20 < 64  # and in this one


def ended(_):
    os._exit(3)


def test_a_process_that_is_ended_is_the_users_to_know():
    with pytest.raises(UserError, match="status 3, expected a figure"):
        measure.apart(ended, 1, preload="megatron_twotower.bench.measure")


def test_facts_of_the_machine_and_the_files(tmp_path):
    facts = machine.machine()
    assert {"device", "processor", "threads", "torch", "commit"} <= facts.keys()
    assert torch.__version__ in machine.machine_line(facts)
    measure.write_files(tmp_path / "new", "ops", {"machine": facts}, b"png")
    assert json.loads((tmp_path / "new" / "ops.json").read_text())["machine"] == facts
    assert (tmp_path / "new" / "ops.png").read_bytes() == b"png"
    assert measure.fillable_bytes() > 0
    assert tables.wide_console().width >= 80
