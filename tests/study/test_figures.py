"""The figures of a study, by hand."""

import json
import math
from dataclasses import replace

import pytest

from megatron_twotower.study.design import Arm, Study, trainings
from megatron_twotower.study.figures import mean, outcome, outcomes, rows, share_to_reach, shares_to_reach_reference

STUDY = Study(
    question="?",
    recipe="quickstart",
    overrides=("train.steps=360", "data.global_batch_size=8"),
    sizes={"small": ("init.backbone=recipes/backbones/small",)},
    seeds=(1, 2),
    reference="whole",
    arms={
        "whole": Arm(("noise=published",), (1.0,), ("small",)),
        "better": Arm(("noise=fast",), (0.25, 0.5), ("small",)),
    },
)
LOSSES = {("whole", 1.0): (5.0, 5.2), ("better", 0.25): (5.3, 5.4), ("better", 0.5): (4.9, 5.0)}


@pytest.fixture
def planned(tmp_path):
    """The trainings of STUDY, all done, with the losses of LOSSES."""
    planned = trainings(STUDY, tmp_path)
    for each in planned:
        loss, steps = LOSSES[each.arm, each.share][each.seed - 1], each.config.train.steps
        records = [
            {"kind": "validation", "step": 0, "loss": 8.0, "loss_by_noise": {"0.0-0.5": 8, "0.5-1.0": 8}},
            {"kind": "validation", "step": steps, "loss": loss, "loss_by_noise": {"0.0-0.5": 3, "0.5-1.0": loss}},
            {"kind": "train", "step": steps, "loss": 1.0},
        ]
        each.folder.mkdir(parents=True)
        (each.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return planned


def test_the_end_of_a_training(planned):
    end = outcome(planned[0])
    assert (end.loss, end.bound, end.tokens) == (5.0, 4.0, 360 * 8 * 256)


def test_a_training_that_has_not_ended(planned):
    longer = replace(planned[0].config, train=replace(planned[0].config.train, steps=400))
    assert outcome(replace(planned[0], config=longer)) is None
    (planned[0].folder / "metrics.jsonl").unlink()
    assert outcome(planned[0]) is None


def test_rows(planned):
    """Differences are paired by seed: their error is not that of the losses."""
    whole, quarter, half = rows(STUDY, outcomes(planned))
    assert (whole.arm, whole.difference, whole.flops) == ("whole", None, 1.0)
    assert whole.loss.value == pytest.approx(5.1) and whole.loss.error == pytest.approx(0.1)
    assert quarter.difference.value == pytest.approx(0.25) and quarter.difference.error == pytest.approx(0.05)
    assert half.difference.value == pytest.approx(-0.15)
    # The head of the context tower and its last layers run too.
    assert 0.25 < quarter.flops < 0.3 and half.flops == pytest.approx(2 * quarter.flops, rel=0.03)
    assert half.by_noise["0.5-1.0"].value == pytest.approx(4.95)


def test_a_seed_without_reference_counts_in_no_difference(planned):
    (planned[0].folder / "metrics.jsonl").unlink()  # the reference of seed 1
    whole, quarter, _ = rows(STUDY, outcomes(planned))
    assert whole.loss == mean([5.2]) and whole.loss.error is None
    assert quarter.difference == mean([5.4 - 5.2]) and quarter.loss.count == 2


def test_share_to_reach():
    assert share_to_reach(5.0, {0.25: 5.2, 1.0: 4.8}) == pytest.approx(0.5)  # the middle, in the logarithm
    assert share_to_reach(5.0, {0.25: 5.2, 0.5: 5.1}) is None
    assert share_to_reach(5.0, {0.5: 4.7, 0.25: 4.9}) == 0.25


def test_share_to_reach_the_reference_of_each_seed(planned):
    found = shares_to_reach_reference(STUDY, outcomes(planned), "small", "better")
    assert found[1] == pytest.approx(0.25 * 2 ** (0.3 / 0.4)) and found[2] == pytest.approx(0.25 * math.sqrt(2))
