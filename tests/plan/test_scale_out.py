"""Estimates for several numbers of GPUs: values, assumptions, and the word estimate."""

import json

import pytest

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.plan import scale_out, search
from megatron_twotower.plan.estimate import Assumptions, estimate
from megatron_twotower.plan.layout import ACCELERATORS, layout_of
from megatron_twotower.plan.traffic import crosses_nodes

NANO = ("recipe=nano_30b_a3b_phase1", "parallel=h100x64")


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """A complete search takes long."""
    for name, values in (("TENSOR", (1,)), ("PIPELINE", (1,)), ("MICRO_BATCH", (1,))):
        monkeypatch.setattr(search, name, values)


def nano(*overrides):
    return load_recipe("nano_30b_a3b_phase1", ["parallel=h100x64", *overrides], planning=True)


def told(capsys, *arguments):
    status = main.main(["plan", *NANO, *arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("overrides", "far"),
    [
        ([], {"data", "expert data"}),
        (["parallel.expert=16"], {"expert", "data", "expert data"}),
        (["parallel.tensor=4", "parallel.sequence=true", "parallel.expert=4"], {"expert", "data", "expert data"}),
        (
            ["parallel.expert=4", "parallel.expert_tensor=1", "parallel.tensor=2", "parallel.sequence=true"],
            {"data", "expert data"},
        ),
    ],
)
def test_which_groups_cross_nodes(overrides, far):
    layout, accelerator = layout_of(nano(*overrides), ranks=64), ACCELERATORS["h100"]
    kinds = ("tensor", "expert", "expert tensor", "data", "expert data", "pipeline")
    assert {kind for kind in kinds if crosses_nodes(kind, layout, accelerator)} == far


def test_a_plan_says_which_groups_cross_nodes(capsys):
    status, said = told(capsys)
    assert status == 0
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    where = {line.partition(" groups")[0]: line for line in lines if line.startswith("sent in")}
    assert where["sent in expert"].endswith("a rank, within a node")
    assert where["sent in data"].endswith("a rank, between nodes")


def test_each_number_of_gpus_has_the_estimate_of_its_layout(capsys):
    status, said = told(capsys, "--scaling", "256", "8", "64", "--json")
    found = json.loads(said.out)
    assert status == 0 and found["estimate"] is True
    assert [row["cards"] for row in found["scaling"]] == [8, 64, 256]
    none, own, large = found["scaling"]
    assert none == {"cards": 8, "fits": False}
    assert own["seconds"] == pytest.approx(estimate(nano(), ranks=64).seconds)
    # The same work on four times the GPUs, and no less to send: gradients do not shrink.
    assert large["phases"][0]["compute_seconds"] == pytest.approx(own["phases"][0]["compute_seconds"] / 4)
    assert own["seconds"] / 4 < large["seconds"] < own["seconds"]


def test_a_layout_that_does_not_fit_gives_way_to_one_that_does():
    config = nano("train.recompute_layers=''")
    assert not estimate(config, ranks=64).fits
    found = scale_out.estimate_for(config, ranks=64, assumptions=Assumptions())
    assert found.fits and found.layout.ranks == 64
    assert search.overrides(config, found.config), "another layout"


def test_the_table_says_that_it_is_an_estimate_and_what_is_assumed(capsys):
    status, said = told(capsys, "--scaling", "64", "256", "--utilisation", "0.3")
    text = " ".join(said.out.split())
    assert status == 0
    assert "an estimate, nothing of it measured on a cluster" in text and "(taken, not measured)" in text
    assert "30.0% of 989 TFLOP/s" in text and "70% of 450 GB/s" in text and "50 GB/s between nodes" in text
    assert " 1.00 " in text and " 0.97 " in text and "data, expert data" in text, "the efficiencies"
    assert "hidden: gradient reduction, during the last backward pass of a step; parameter gathering" in text
    assert "The busiest rank of experts has 1 times the mean of their tokens" in text


def bench_json(path, **changes):
    row = {"case": "two towers", "utilisation": 0.37}
    machine = {"device": "NVIDIA H100 80GB HBM3", "commit": "abc"}
    path.write_text(json.dumps({"steps": [row | changes], "machine": machine, "pattern": "MEMEM*"}))
    return path


def test_utilisation_can_be_measured_on_one_gpu(capsys, tmp_path):
    path = bench_json(tmp_path / "gpu.json")
    assert scale_out.measured(path).utilisation == 0.37
    status, said = told(capsys, "--scaling", "64", "--measured", str(path), "--json")
    found = json.loads(said.out)
    assert status == 0 and found["scaling"][0]["assumptions"]["utilisation"] == 0.37
    assert "measured: MEMEM* on one NVIDIA H100 80GB HBM3, commit abc" in found["assumptions"][0]
    status, said = told(capsys, "--measured", str(path), "--json")
    assert json.loads(said.out)["assumptions"]["utilisation"] == 0.37


def test_measurements_without_a_utilisation_are_errors(tmp_path, capsys):
    with pytest.raises(UserError, match=r"expected those of a100|expected those of h100"):
        scale_out.measured(bench_json(tmp_path / "gpu.json", utilisation=None))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected gpu\.json"):
        scale_out.measured(tmp_path / "other.json")
    status, said = told(capsys, "--scaling", "0")
    assert status == 2 and said.err == "twotower: --scaling: found 0, expected at least 1\n"
