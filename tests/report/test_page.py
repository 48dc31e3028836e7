"""The page of a report: every number is on it, and it needs no other file."""

import base64
import re
import shutil

import pytest

from helpers.browser import in_browser, tiles
from helpers.report_runs import EVALUATION, LONGER, RECORDING, make_run, quiet, records, write_evaluation, write_records
from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate.replay import page as replay
from megatron_twotower.report.page import write_report

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PIXELS_PER_INCH", 40)
        yield


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that is only read: its folder, the path of its page, and what was printed."""
    run, console = make_run(tmp_path_factory.mktemp("report")), quiet()
    return run, write_report(run, console=console), console.file.getvalue()


def test_the_page_holds_every_figure_and_needs_no_other_file(written):
    run, path, _ = written
    assert path == run / "report" / "index.html"
    page = path.read_text()
    for figure in (
        "3.92",
        "1.234",
        "4.61 ± 0.04",
        "1.73",
        "1.21 x",
        "5.300",
        "10,000",
        "2.16",
        "8.30",
        "3.77",
        "cpu, float32, 2 threads",
        "prompt_tokens&#34;: 61",
    ):
        assert figure in page, figure
    assert "objective: twotower\nseed: 1234" in page
    assert "0123abc" in page
    assert "both started from runs/b&amp;b" in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_pictures_are_saved_and_inlined_in_both_themes(written):
    run, _, _ = written
    names = {path.name for path in (run / "report").iterdir()}
    pngs = ["ar_loss", "noise_levels", "threshold_sweep", "twotower_loss"]
    assert names == {"index.html", *(f"{name}{ending}.png" for name in pngs for ending in ("", "-dark"))}
    page = (run / "report" / "index.html").read_text()
    for name in names - {"index.html"}:
        image = (run / "report" / name).read_bytes()
        assert image.startswith(PNG) and len(image) > 2000
        assert base64.b64encode(image).decode() in page
    light, dark = ((run / "report" / f"ar_loss{ending}.png").read_bytes() for ending in ("", "-dark"))
    assert light != dark


def test_text_is_escaped_and_the_prompt_is_shown_once(written):
    page = written[1].read_text()
    assert "<title>Two-tower run quick&lt;start&gt;</title>" in page
    assert '<span class="prompt">def main():</span>\n    if x &lt; 3 &amp; y:\n        &#39;&lt;b&gt;&#39;' in page
    assert '<span class="prompt">def main():</span>\n    pass</pre>' in page
    assert "<b>" not in page and "<start>" not in page


def test_a_second_report_replaces_the_first(run):
    write_report(run, console=quiet())
    (run / "report" / "stale.txt").write_text("old")
    write_evaluation(run, EVALUATION | {"ar_loss": 3.555})
    assert "3.56" in write_report(run, console=quiet()).read_text()
    assert not (run / "report" / "stale.txt").exists()
    assert sorted(path.name for path in run.iterdir()) == ["ar", "evaluation.json", "report", "twotower"]


def test_losses_that_were_not_finite_leave_a_gap(run):
    items = list(records())
    items[-1]["loss"] = items[-1]["loss_by_noise"]["0.0-0.2"] = items[4]["loss"] = None
    write_records(run / "twotower", items)
    assert write_report(run, console=quiet()).is_file()


def test_starts_of_the_time_conditioning_are_compared(run):
    for name, start in (("identity", 8.0), ("released", 9.0)):
        write_records(run / "conditioning" / name, records(start=start))
    page = write_report(run, console=quiet())
    assert (page.parent / "conditioning.png").read_bytes().startswith(PNG)
    assert "Starts of the time conditioning" in page.read_text()


def test_a_longer_trained_pair_is_shown_beside_the_run(run):
    assert "longer" not in write_report(run, console=quiet()).read_text()
    write_evaluation(run, LONGER, "longer.json")
    path = write_report(run, console=quiet())
    page = path.read_text()
    assert (path.parent / "denoisers.png").read_bytes().startswith(PNG)
    assert "What longer training buys" in page and "recipes/models/longer" in page
    assert "<td>4.44</td>" in page and "return run(&lt;args&gt;)" in page


def test_the_page_plays_the_replay_if_one_was_recorded(run):
    without = write_report(run, console=quiet()).read_text()
    assert "step by step" not in without and "<script" not in without
    replay.write_page(run / "generation.html", RECORDING)
    page = write_report(run, console=quiet()).read_text()
    assert replay.fragment(RECORDING) in page
    assert replay.STYLE in page and replay.SCRIPT in page
    assert page.count("</script>") == 2
    (run / "generation.html").write_text("no page")
    with pytest.raises(UserError, match=r"generation\.html: found no recording"):
        write_report(run, console=quiet())


def test_a_run_that_cannot_be_read_gets_no_report(run):
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation\.json: not found"):
        write_report(run)
    assert not (run / "report").exists()


@pytest.mark.slow
def test_a_browser_plays_the_replay_of_the_report(run, tmp_path):
    replay.write_page(run / "generation.html", RECORDING)
    page = shutil.copy(write_report(run, console=quiet()), tmp_path / "page.html")
    shown = tiles(in_browser(page, tmp_path / "profile", fragment="#step=1"))
    assert [(name.split()[0], text) for name, text in shown] == [("masked", "a"), ("written", " b")]
