"""Progress bars: what they print, and what they count."""

from megatron_twotower.common import progress


def clock_of(monkeypatch, *seconds):
    clock = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("COLUMNS", "200")


def test_a_bar_for_each_stage_with_tokens_per_second_and_the_time_left(capsys, monkeypatch):
    clock_of(monkeypatch, 0.0, 10.0, 20.0, 22.0)
    with progress.corpus_bars() as report:
        # Done by an interrupted run: not this run's speed.
        report(progress.CorpusProgress("tokenising", 5, 10, 100, 1000))
        report(progress.CorpusProgress("tokenising", 10, 10, 300, 51_000))
        report(progress.CorpusProgress("writing", 0, 51_000, 0, 0))
        report(progress.CorpusProgress("writing", 51_000, 51_000, 300, 51_000))
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert any(
        "tokenising" in line
        and "100%" in line
        and "300 documents, 51,000 tokens, 5,000 tokens/s" in line
        and "0:00:00" in line
        for line in lines
    )
    assert any("writing" in line and "25,500 tokens/s" in line for line in lines)


def test_a_bar_of_bytes(capsys, monkeypatch):
    clock_of(monkeypatch, 0.0, 1.0)
    with progress.bytes_bar("exporting") as begin:
        advance = begin(4_000_000)
        advance(2_000_000)
        advance(2_000_000)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "exporting" in line and "100%" in line and "4.0 MB of 4.0 MB, 2.0 MB/s" in line


def test_nothing_is_printed_before_the_first_report(capsys):
    with progress.stage_bars(), progress.bytes_bar("importing") as begin:
        begin(10)
    assert capsys.readouterr().err == ""
