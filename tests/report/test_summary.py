"""The summary of a run, as rows and as a table."""

import pytest

from helpers.report_runs import make_run, quiet, records, write_records
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
