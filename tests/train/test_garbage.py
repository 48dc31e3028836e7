"""The garbage collector runs at the steps that are due, and is left as it was found."""

import gc
import itertools

import pytest

from helpers.runs import PLAIN, settings, train
from megatron_twotower.train.garbage import collected_together


@pytest.fixture
def collections():
    """The complete collections so far."""
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def many_objects():
    return [[] for _ in range(20_000)]


def test_it_runs_only_after_the_steps_that_are_due(collections):
    before = gc.get_freeze_count()
    with collected_together(3) as after_step:
        collections.clear()
        for step in range(1, 8):
            many_objects()
            after_step(step)
        assert collections == [2, 2]
        assert gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == before
    many_objects()
    assert len(collections) > 2, "Python collects again"


def test_nothing_changes_without_a_number(collections):
    with collected_together(0) as after_step:
        collections.clear()
        many_objects()
        after_step(1)
        assert collections and gc.isenabled()


def test_a_run_collects_at_its_steps(tiny_data, tmp_path, collections, monkeypatch):
    """Also while it builds nothing: between the steps there is no collection."""
    from megatron_twotower.train import loop

    at, step = [], loop.train_step

    def recording(*arguments, **more):
        at.append(len(collections))
        return step(*arguments, **more)

    monkeypatch.setattr(loop, "train_step", recording)
    arguments = settings(tiny_data, tmp_path / "run", None, *PLAIN, "schedule.warmup_steps=0", "train.steps=5")
    assert train("tiny_ar", *arguments, "train.collect_garbage_every_steps=2")
    assert [after - before for before, after in itertools.pairwise(at)] == [0, 1, 0, 1]
    assert gc.isenabled()
