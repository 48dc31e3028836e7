"""The summary of a run, as rows and as a table."""

import pytest

from helpers.report_runs import EVALUATION, LONGER, make_run, quiet, records, write_evaluation, write_records
from megatron_twotower.common.errors import UserError
from megatron_twotower.report import denoisers
from megatron_twotower.report.findings import read_findings
from megatron_twotower.report.summary import print_summary, summary_rows


@pytest.fixture
def findings(tmp_path):
    return read_findings(make_run(tmp_path))


def test_the_summary_compares_end_with_start(findings):
    rows = {label: (value, against) for label, value, against in summary_rows(findings)}
    assert rows["AR from random weights"] == (f"{findings.ar.validation[-1]['loss']:.2f}", "8.35 at step 0")
    assert rows["AR, context tower, nats/token"] == ("3.92", "")
    assert rows["AR, context tower, nats/byte"] == ("1.234", "")
    assert rows["diffusion bound, nats/token"] == ("4.61 ± 0.04", "AR 3.77, same tokens")
    assert rows["masked loss, noise 0.8-1.0"] == ("5.25", "8.30 at step 0")
    assert rows["tokens/pass, threshold 0.8"] == ("1.73", "1.21 x AR speed")
    assert list(rows)[-3:] == [f"tokens/pass, threshold {t}" for t in (0.9, 0.8, 0.5)]


def test_the_summary_is_printed_as_one_table(findings):
    console = quiet()
    print_summary(findings, console)
    text = console.file.getvalue()
    assert text.count("figure") == 1
    for row in summary_rows(findings):
        assert all(cell in text for cell in row)


def test_a_loss_that_was_not_finite_is_a_dash(tmp_path):
    run = make_run(tmp_path)
    items = list(records())
    items[-1]["loss"] = None
    write_records(run / "twotower", items)
    rows = {row[0]: row[1] for row in summary_rows(read_findings(run))}
    assert rows["masked loss, nats/token"] == "-"


def test_a_longer_trained_pair_is_compared_in_a_second_table(tmp_path):
    run, console = make_run(tmp_path), quiet()
    assert list(denoisers.rows(read_findings(run))) == []
    write_evaluation(run, LONGER, "longer.json")
    findings = read_findings(run)
    rows = list(denoisers.rows(findings))
    assert rows[0] == ("nats/token, same tokens; the bound", "3.77", "4.61 ± 0.04", "4.05 ± 0.04")
    assert rows[1:5] == [
        ("masked loss at t = 0.1", "", "2.15", "1.65"),
        ("masked loss at t = 0.4", "", "3.20", "2.70"),
        ("masked loss at t = 0.7", "", "4.25", "3.75"),
        ("masked loss at t = 1", "", "5.30", "4.80"),
    ]
    assert rows[5:] == [
        ("tokens/pass, threshold 0.9", "1", "1.41", "3.33"),
        ("… speed, x AR", "1", "0.98", "2.10"),
        ("… as AR would choose, %", "100", "86.2", "87.0"),
        ("tokens/pass, threshold 0.8", "1", "1.73", "4.44"),
        ("… speed, x AR", "1", "1.21", "2.50"),
        ("… as AR would choose, %", "100", "85.5", "86.0"),
    ]
    print_summary(findings, console)
    text = console.file.getvalue()
    assert text.count("figure") == 2
    assert all(cell in text for row in rows for cell in row)


@pytest.mark.parametrize(("key", "value"), [("tokenizer_sha256", "b0b0"), ("settings", {"prompt_tokens": 60})])
def test_pairs_measured_on_other_text_are_not_compared(tmp_path, key, value):
    run = make_run(tmp_path)
    write_evaluation(run, EVALUATION | {key: value}, "longer.json")
    with pytest.raises(UserError, match=rf"longer\.json: found {key} .*, expected that of evaluation\.json, [^\n]+$"):
        read_findings(run)
