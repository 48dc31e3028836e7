"""Rungs of the ladder: their configurations, and what happens if one cannot run or fails."""

import io
import weakref

import pytest
import torch
from rich.console import Console

from megatron_twotower.bench import training_steps
from megatron_twotower.bench.gpu import steps, tables
from megatron_twotower.bench.gpu.command import QUICK_OVERRIDES
from megatron_twotower.bench.gpu.ladder import LADDER, Rung, measure_rung, rung_config, select_rungs
from megatron_twotower.bench.gpu.steps import OBJECTIVES
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe

QUICK = {"repeats": 1, "budget_seconds": 0.0}
ROUTER = "router in fp64"


def test_every_rung_is_a_valid_change():
    """Its keys and values are those of a recipe, and it changes something."""
    config = load_recipe("bench_gpu")
    for rung in LADDER:
        found = rung_config(config, rung, recipe="bench_gpu", overrides=[])
        assert not isinstance(found, str), (rung, found)
        assert (found != config) == bool(rung.overrides)
        assert bool(rung.overrides) != bool(rung.without)
    assert len({rung.name for rung in LADDER}) == len(LADDER)
    same = Rung("as it is", ("train.precision=bf16",))
    assert rung_config(config, same, recipe="bench_gpu", overrides=[]) == "configured so"
    wrong = Rung("wrong", ("noise.block_size_tokens=48",))
    assert "expected a multiple" in rung_config(config, wrong, recipe="bench_gpu", overrides=[])


def test_which_rungs_are_measured():
    assert select_rungs((), full=False) == [] and select_rungs((), full=True) == list(LADDER)
    assert [rung.name for rung in select_rungs((ROUTER,), full=False)] == [ROUTER]
    with pytest.raises(UserError, match="--rungs: found 'rooter', expected some of"):
        select_rungs(("rooter",), full=False)


def test_out_of_memory_ends_a_rung_and_not_the_run(groups, monkeypatch):
    config = load_recipe("bench_gpu", QUICK_OVERRIDES)

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(training_steps, "build_trainer", full)
    row = measure_rung(config, Rung("large", ("data.micro_batch_size=2",)), groups, **QUICK)
    assert row["cases"] == dict.fromkeys(OBJECTIVES)
    base = {"classes": {}, "tokens": 1, "seconds": 1.0, "peak_bytes": 1}
    results = {"steps": [base | {"case": name} for name in OBJECTIVES], "ladder": [row], "on_a_gpu": True}
    results |= {"pattern": "M", "experts": 4, "length": 64, "block": 16, "precision": "bf16"}
    screen = io.StringIO()
    Console(file=screen, width=200).print(tables.ladder_table(results))
    assert screen.getvalue().count("out of memory") == 2


def test_a_trainer_that_cannot_be_built_ends_a_rung_and_not_the_run(groups, monkeypatch):
    def refused(*_, **__):
        raise UserError("train.precision: found fp4")

    monkeypatch.setattr(training_steps, "build_trainer", refused)
    config = load_recipe("bench_gpu", QUICK_OVERRIDES)
    row = measure_rung(config, Rung("narrow", ("train.precision=bf16",)), groups, **QUICK)
    assert row["skipped"] == "train.precision: found fp4" and "cases" not in row


def test_a_trainer_that_ran_out_of_memory_is_freed(groups, monkeypatch):
    """The wrapper and its gradients exist, and the optimizer's state does not fit."""
    config, alive = load_recipe("bench_gpu", QUICK_OVERRIDES), []

    def full(_, wrapped, __):
        alive.append(weakref.ref(wrapped.only))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(training_steps, "build_optimizer", full)
    row = measure_rung(config, Rung("large"), groups, **QUICK)
    assert row["cases"] == dict.fromkeys(OBJECTIVES)
    steps.release_memory()
    assert len(alive) == 2 and all(reference() is None for reference in alive)
