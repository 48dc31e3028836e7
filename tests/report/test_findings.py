"""Reading a run folder: what is there, and one line for each fault."""

import re

import pytest

from helpers.report_runs import EVALUATION, make_run, records, write_evaluation, write_records
from megatron_twotower.common.errors import UserError
from megatron_twotower.report.findings import read_findings


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_files_that_cannot_be_used_are_named(run):
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        read_findings(run)
    write_evaluation(run, {key: value for key, value in EVALUATION.items() if key not in ("sweep", "samples")})
    with pytest.raises(UserError, match=r"evaluation\.json: expected the keys sweep, samples"):
        read_findings(run)
    write_evaluation(run, EVALUATION)
    (run / "twotower" / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML [^\n]+$"):
        read_findings(run)
    write_records(run / "ar", [item for item in records() if item["kind"] == "train"])
    with pytest.raises(UserError, match=r"ar.metrics\.jsonl: found no record of kind 'validation'"):
        read_findings(run)


def losses(run):
    return [record["loss"] for record in run.validation]


def test_the_first_steps_of_the_main_run_are_compared_under_the_name_of_its_start(run):
    (run / "twotower" / "config.yaml").write_text("objective: two_tower\nconditioning: {initialisation: identity}\n")
    assert read_findings(run).conditioning == {}
    write_records(run / "conditioning" / "released", records(steps=200, start=9.0))
    found = read_findings(run)
    assert list(found.conditioning) == ["identity", "released"]
    assert losses(found.conditioning["identity"]) == losses(found.twotower)[:3]
    write_records(run / "conditioning" / "identity", records(steps=200, start=7.0))
    assert losses(read_findings(run).conditioning["identity"])[0] == 7.0


@pytest.mark.parametrize("missing", ["ar/metrics.jsonl", "twotower/metrics.jsonl", "evaluation.json"])
def test_a_missing_file_is_named(run, missing):
    (run / missing).unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(str(run / missing))}: not found, expected [^\n]+$"):
        read_findings(run)


def test_configuration_and_provenance_may_be_missing(run):
    for name in ("config.yaml", "provenance.json"):
        (run / "twotower" / name).unlink()
    found = read_findings(run)
    assert found.backbone is None
    assert list(found.texts) == ["ar/config.yaml", "ar/provenance.json", "evaluation settings"]
