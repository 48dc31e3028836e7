"""A report of small metrics files: every figure on the page, every missing file named."""

import base64
import io
import json
import math
import re
import shutil

import pytest
from rich.console import Console

from helpers.browser import in_browser, tiles
from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import METRICS_FILE
from megatron_twotower.generate.replay import page as replay
from megatron_twotower.report import read_findings, summary_rows, write_report

BUCKETS = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")
STARTS = (5.9, 6.3, 6.9, 7.6, 8.3)
ENDS = (2.13, 2.74, 3.41, 4.32, 5.23)
PNG = b"\x89PNG\r\n\x1a\n"


def records(steps=400, *, start=8.35, end=4.0, by_noise=True):
    """Losses that fall from `start` at step 0 towards `end`."""
    for step in range(0, steps + 1, 10):
        part = math.exp(-5 * step / steps)
        loss = end + (start - end) * part
        if step:
            yield {"kind": "train", "step": step, "loss": loss + 0.05 * math.sin(step), "seconds": step / 5}
        if step % 100 == 0:
            noise = {b: e + (s - e) * part for b, s, e in zip(BUCKETS, STARTS, ENDS, strict=True)} if by_noise else {}
            yield {"kind": "validation", "step": step, "loss": loss, "loss_by_noise": noise, "tokens": 16384}


def sweep_row(threshold, tokens_per_pass, speedup, nats):
    return {
        "confidence_threshold": threshold,
        "tokens_per_pass": tokens_per_pass,
        "passes": 310,
        "speedup": speedup,
        "tokens_per_second": 210.0 * speedup,
        "nats_per_token": nats,
    }


EVALUATION = {
    "settings": {"prompt_tokens": 61},
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
    "ar_loss": 3.921,
    "ar_loss_per_byte": 1.2345,
    "ar_loss_on_bound_tokens": 3.77,
    "diffusion_bound": 4.61,
    "diffusion_bound_stderr": 0.04,
    "masked_loss_by_noise": [{"t": t / 10, "loss": 1.8 + 0.35 * t, "count": 1000 * t} for t in range(1, 11)],
    "sweep": [sweep_row(0.5, 3.12, 2.05, 3.4), sweep_row(0.8, 1.73, 1.21, 2.9), sweep_row(0.9, 1.41, 0.98, 2.75)],
    "ar_generation": {"tokens_per_second": 210.0, "nats_per_token": 1.9},
    "samples": [
        {
            "mode": "mask_diffusion",
            "prompt": "def main():",
            "text": "\n    if x < 3 & y:\n        '<b>'",
            "passes": 20,
            "new_tokens": 64,
            "seconds": 1.25,
        },
        {"mode": "ar", "prompt": "def main():", "text": "\n    pass", "passes": 64, "new_tokens": 64, "seconds": 2.5},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PIXELS_PER_INCH", 40)
        yield


def make_run(tmp_path):
    for name, by_noise in (("ar", False), ("twotower", True)):
        folder = tmp_path / "quick<start>" / name
        folder.mkdir(parents=True)
        write_records(folder, records(by_noise=by_noise))
        (folder / "config.yaml").write_text(f"objective: {name}\nseed: 1234\n")
        (folder / "provenance.json").write_text('{"commit": "0123abc", "backbone": "runs/b&b"}\n')
    write_evaluation(tmp_path / "quick<start>", EVALUATION)
    return tmp_path / "quick<start>"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that is only read: its folder, the path of its page, and what was printed."""
    run, console = make_run(tmp_path_factory.mktemp("report")), quiet()
    return run, write_report(run, console=console), console.file.getvalue()


def write_records(folder, items):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(item) + "\n" for item in items))


def write_evaluation(run, evaluation):
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def quiet():
    return Console(file=io.StringIO(), width=100)


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
        "prompt_tokens&quot;: 61",
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


def test_text_is_escaped_and_the_prompt_stands_once(written):
    page = written[1].read_text()
    assert "<title>Two-tower run quick&lt;start&gt;</title>" in page
    assert '<span class="prompt">def main():</span>\n    if x &lt; 3 &amp; y:\n        &#x27;&lt;b&gt;&#x27;' in page
    assert '<span class="prompt">def main():</span>\n    pass</pre>' in page
    assert "<b>" not in page and "<start>" not in page


def test_a_second_report_replaces_the_first(run):
    write_report(run, console=quiet())
    (run / "report" / "stale.txt").write_text("old")
    write_evaluation(run, EVALUATION | {"ar_loss": 3.555})
    assert "3.56" in write_report(run, console=quiet()).read_text()
    assert not (run / "report" / "stale.txt").exists()
    assert sorted(path.name for path in run.iterdir()) == ["ar", "evaluation.json", "report", "twotower"]


def test_the_summary_compares_end_with_start(written):
    findings = read_findings(written[0])
    rows = {label: (value, against) for label, value, against in summary_rows(findings)}
    assert rows["AR from random weights"] == (f"{findings.ar.validation[-1]['loss']:.2f}", "8.35 at step 0")
    assert rows["AR, context tower, nats/token"] == ("3.92", "")
    assert rows["AR, context tower, nats/byte"] == ("1.234", "")
    assert rows["diffusion bound, nats/token"] == ("4.61 ± 0.04", "AR 3.77, same tokens")
    assert rows["masked loss, noise 0.8-1.0"] == ("5.25", "8.30 at step 0")
    assert rows["tokens/pass, threshold 0.8"] == ("1.73", "1.21 x AR speed")
    assert list(rows)[-3:] == [f"tokens/pass, threshold {t}" for t in (0.9, 0.8, 0.5)]


def test_the_summary_is_printed_as_one_table(written):
    run, _, text = written
    assert text.count("figure") == 1
    for row in summary_rows(read_findings(run)):
        assert all(cell in text for cell in row)


def test_figures_that_were_not_finite_leave_a_gap(run):
    items = list(records())
    items[-1]["loss"] = items[-1]["loss_by_noise"]["0.0-0.2"] = items[4]["loss"] = None
    write_records(run / "twotower", items)
    rows = {row[0]: row[1] for row in summary_rows(read_findings(run))}
    assert rows["masked loss, nats/token"] == "-"
    assert write_report(run, console=quiet()).is_file()


def test_conditioning_runs_are_compared_where_there_are_any(run):
    assert read_findings(run).conditioning == {}
    for name, start in (("identity", 8.0), ("released", 9.0)):
        write_records(run / "conditioning" / name, records(start=start))
    assert list(read_findings(run).conditioning) == ["identity", "released"]
    folder = write_report(run, console=quiet()).parent
    assert (folder / "conditioning.png").read_bytes().startswith(PNG)


RECORDING = {
    "version": replay.VERSION,
    "model": "runs/model",
    "settings": {"block_size": 2, "steps_per_block": 2, "confidence_threshold": 0.8, "temperature": 0.3},
    "mode": "mask_diffusion",
    "prompt": "def </script>",
    "text": "a b",
    "new_tokens": 2,
    "passes": 2,
    "seconds": 0.5,
    "summary": "2 tokens in 2 passes",
    "pieces": {"5": "a", "6": " b"},
    "blocks": [
        [
            {"t": 1.0, "predicted": [5, 6], "confidence": [0.4, 0.6], "committed": [1]},
            {"t": 0.5, "predicted": [5, 6], "confidence": [0.7, 0.0], "committed": [0]},
        ]
    ],
}


def test_a_replay_stands_in_the_page_where_one_was_recorded(run):
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


@pytest.mark.parametrize("missing", ["ar/metrics.jsonl", "twotower/metrics.jsonl", "evaluation.json"])
def test_a_missing_file_is_named(run, missing):
    (run / missing).unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(str(run / missing))}: not found, expected [^\n]+$"):
        write_report(run)
    assert not (run / "report").exists()


def test_files_that_cannot_be_used_are_named(run):
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        write_report(run)
    write_evaluation(run, {key: value for key, value in EVALUATION.items() if key not in ("sweep", "samples")})
    with pytest.raises(UserError, match=r"evaluation\.json: expected the keys sweep, samples"):
        write_report(run)
    write_records(run / "ar", [item for item in records() if item["kind"] == "train"])
    with pytest.raises(UserError, match=r"ar.metrics\.jsonl: found no record of kind 'validation'"):
        write_report(run)


def test_equal_figures_draw_equal_bytes():
    curve = [(0, 8.0), (10, 5.0), (20, None), (30, 4.0)]
    draw = {"title": "t", "subtitle": "s", "unit": "nats", "theme": plots.LIGHT}
    image = plots.loss_curve(curve, curve, **draw)
    assert image.startswith(PNG)
    assert image == plots.loss_curve(curve, curve, **draw)
    assert image != plots.loss_curve([(0, 7.0), (20, 5.0)], curve, **draw)


@pytest.mark.slow
def test_a_browser_plays_the_replay_of_the_report(run, tmp_path):
    replay.write_page(run / "generation.html", RECORDING)
    page = shutil.copy(write_report(run, console=quiet()), tmp_path / "page.html")
    shown = tiles(in_browser(page, tmp_path / "profile", fragment="#step=1"))
    assert [(name.split()[0], text) for name, text in shown] == [("masked", "a"), ("written", " b")]
