"""The bar of `twotower data prepare`."""

from megatron_twotower.common import progress


def test_a_bar_for_each_stage_with_tokens_per_second(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    clock = iter([0.0, 0.0, 10.0, 20.0, 20.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar() as report:
        report(progress.Stage("tokenising", 5, 10, 100, 1000))  # done by an interrupted run: not this run's speed
        report(progress.Stage("tokenising", 10, 10, 300, 51_000))
        report(progress.Stage("writing", 0, 51_000, 0, 0))
        report(progress.Stage("writing", 51_000, 51_000, 300, 51_000))
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert any(
        "tokenising" in line and "100%" in line and "300 documents, 51,000 tokens, 5,000 tokens/s" in line
        for line in lines
    )
    assert any("writing" in line and "25,500 tokens/s" in line for line in lines)
