"""The report of a run: one HTML page with its pictures, and one table on the console.

A run folder holds `ar/` and `twotower/` (each with `metrics.jsonl`, `config.yaml`,
`provenance.json`), `evaluation.json`, and, where starts of the time conditioning were compared,
`conditioning/NAME/metrics.jsonl`; and `generation.html` of `twotower generate --html`, if its
replay is to stand in the report.
"""

import base64
import html
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.plots import Curve, Theme
from megatron_twotower.common.run_folder import CONFIG_FILE, METRICS_FILE, PROVENANCE_FILE, read_metrics
from megatron_twotower.generate.replay import page as replay

# What evaluation.json must hold.
EVALUATION_KEYS = (
    "ar_loss",
    "ar_loss_per_byte",
    "ar_loss_on_bound_tokens",
    "masked_loss_by_noise",
    "diffusion_bound",
    "diffusion_bound_stderr",
    "sweep",
    "ar_generation",
    "samples",
    "settings",
    "device",
    "dtype",
    "threads",
)
RUNS = ("ar", "twotower")
REPLAY = "generation.html"


@dataclass(frozen=True)
class Series:
    """One training run: its records by kind."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    def curve(self, kind: str) -> Curve:
        return [(record["step"], record["loss"]) for record in getattr(self, kind)]


@dataclass(frozen=True)
class Findings:
    """Everything a report is made of. texts: name -> configuration or provenance, word for word. recording: of the
    replay; None where none was made."""

    name: str
    ar: Series
    twotower: Series
    evaluation: dict[str, Any]
    conditioning: dict[str, Series] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    recording: dict[str, Any] | None = None

    @property
    def backbone(self) -> str | None:
        """The folder that both towers started from, as the run wrote it down."""
        text = self.texts.get("twotower/provenance.json")
        return None if text is None else json.loads(text).get("backbone")


def _read_series(path: Path) -> Series:
    records = read_metrics(path)
    kinds = {kind: [record for record in records if record.get("kind") == kind] for kind in ("train", "validation")}
    for kind, found in kinds.items():
        if not found:
            raise UserError(f"{path}: found no record of kind {kind!r}, expected a run that logs and validates")
    return Series(kinds["train"], kinds["validation"])


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: not found, expected the output of `twotower evaluate`")
    try:
        evaluation = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    missing = [key for key in EVALUATION_KEYS if key not in evaluation]
    if missing:
        raise UserError(f"{path}: expected the keys {', '.join(missing)}")
    return evaluation


def read_findings(run: Path) -> Findings:
    """Read a run folder.

    Raises:
        UserError: a file is missing or cannot be read; the message names it.
    """
    files = [run / name / file for name in RUNS for file in (CONFIG_FILE, PROVENANCE_FILE)]
    compared = sorted((run / "conditioning").glob(f"*/{METRICS_FILE}"))
    ar, twotower = (_read_series(run / name / METRICS_FILE) for name in RUNS)
    evaluation = _read_evaluation(run / "evaluation.json")
    texts = {str(path.relative_to(run)): path.read_text() for path in files if path.is_file()}
    return Findings(
        name=run.resolve().name,
        ar=ar,
        twotower=twotower,
        evaluation=evaluation,
        conditioning=_conditioning_runs(compared, twotower, texts.get("twotower/config.yaml", "")),
        texts=texts | {"evaluation settings": json.dumps(evaluation["settings"], indent=1)},
        recording=replay.read_page(run / REPLAY) if (run / REPLAY).is_file() else None,
    )


def _conditioning_runs(compared: Sequence[Path], main: Series, configuration: str) -> dict[str, Series]:
    """The runs that tried a start of the time conditioning, and the main run's first steps beside them."""
    runs = {path.parent.name: _read_series(path) for path in compared}
    own = re.search(r"^  initialisation: (\w+)$", configuration, re.MULTILINE)
    if runs and own and own[1] not in runs:
        last = max(series.validation[-1]["step"] for series in runs.values())
        parts = ([record for record in records if record["step"] <= last] for records in (main.train, main.validation))
        runs[own[1]] = Series(*parts)
    return dict(sorted(runs.items()))


# Figures
# ------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _threshold_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the sweep that ran at a threshold, highest first; AR's own row has none."""
    rows = [row for row in evaluation["sweep"] if row.get("confidence_threshold") is not None]
    return sorted(rows, key=lambda row: -row["confidence_threshold"])


def summary_rows(findings: Findings) -> Iterator[tuple[str, str, str]]:
    """What was measured, its value, and what to hold it against."""
    evaluation, ar, towers = findings.evaluation, findings.ar.validation, findings.twotower.validation
    first, last = towers[0], towers[-1]
    bound, error = evaluation["diffusion_bound"], evaluation["diffusion_bound_stderr"]
    yield "AR from random weights", _number(ar[-1]["loss"]), f"{_number(ar[0]['loss'])} at step {ar[0]['step']}"
    yield "AR, context tower, nats/token", _number(evaluation["ar_loss"]), ""
    yield "AR, context tower, nats/byte", _number(evaluation["ar_loss_per_byte"], 3), ""
    same = _number(evaluation["ar_loss_on_bound_tokens"])
    yield "diffusion bound, nats/token", f"{_number(bound)} ± {_number(error)}", f"AR {same}, same tokens"
    yield "masked loss, nats/token", _number(last["loss"]), f"{_number(first['loss'])} at step {first['step']}"
    for bucket, loss in last["loss_by_noise"].items():
        start = first["loss_by_noise"].get(bucket)
        yield f"masked loss, noise {bucket}", _number(loss), f"{_number(start)} at step {first['step']}"
    for row in _threshold_rows(evaluation):
        label = f"tokens/pass, threshold {row['confidence_threshold']:g}"
        yield label, _number(row["tokens_per_pass"]), f"{_number(row['speedup'])} x AR speed"


def print_summary(findings: Findings, console: Console | None = None) -> None:
    """The summary as one table on the console."""
    table = Table(title=f"{findings.name}: held-out text", title_style="bold", box=box.SIMPLE_HEAD)
    for heading, justify in (("figure", "left"), ("value", "right"), ("against", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in summary_rows(findings):
        table.add_row(*row)
    (console or Console()).print(table)


def draw(findings: Findings) -> dict[str, Callable[[Theme], bytes]]:
    """File name of each picture, without its ending, and how to draw it in a theme."""
    towers, evaluation = findings.twotower, findings.evaluation
    first, last = towers.validation[0]["loss_by_noise"], towers.validation[-1]["loss_by_noise"]
    drawings: dict[str, Callable[[Theme], bytes]] = {
        "ar_loss": lambda theme: plots.loss_curve(
            findings.ar.curve("train"),
            findings.ar.curve("validation"),
            title="Backbone: next-token loss",
            subtitle="objective ar; validation on held-out files",
            unit="nats per token",
            theme=theme,
        ),
        "twotower_loss": lambda theme: plots.loss_curve(
            towers.curve("train"),
            towers.curve("validation"),
            title="Denoiser: masked loss",
            subtitle="objective two_tower, context tower frozen; validation on held-out files",
            unit="nats per masked token",
            theme=theme,
        ),
        "noise_levels": lambda theme: plots.noise_levels(first, last, theme=theme),
        "threshold_sweep": lambda theme: plots.threshold_sweep(
            _threshold_rows(evaluation),
            ar_nats_per_token=evaluation["ar_generation"].get("nats_per_token"),
            theme=theme,
        ),
    }
    if findings.conditioning:
        curves = {name: series.curve("validation") for name, series in findings.conditioning.items()}
        drawings["conditioning"] = lambda theme: plots.comparison(
            curves,
            title="Starts of the time conditioning",
            subtitle="the same recipe, seed and data; held-out files",
            unit="nats per masked token",
            theme=theme,
        )
    return drawings


# Page
# ---------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --muted: #6b7280; --line: #e3e6ea; --back: #f5f6f8; --card: #fff;
  --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --text: #e8eaed; --muted: #9aa1ac; --line: #2c3038; --back: #0f1115;
  --card: #16181d; --accent: #7aa8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { color: var(--muted); margin: .25rem 0 1rem; max-width: 75ch; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem;
  margin: 0 0 1rem; overflow-x: auto; }
.cards .card, .pair .card { margin: 0; }
.pair { align-items: start; }
.value { font-size: 1.65rem; font-weight: 650; color: var(--accent); font-variant-numeric: tabular-nums; }
.note { color: var(--muted); font-size: .87rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 500; font-size: .87rem; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:not(:first-child), td:not(:first-child) { text-align: right; }
pre { margin: .6rem 0 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre .prompt { color: var(--muted); }
summary { cursor: pointer; }
"""


def _picture(name: str, images: Mapping[str, bytes]) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(images[f"{name}{ending}"]).decode()
        for ending in (".png", "-dark.png")
    )
    return (
        f'<div class="card"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(name.replace("_", " "))}" src="{light}"></picture></div>'
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="card"><table><thead>{line("th", headings)}</thead><tbody>{body}</tbody></table></div>'


def _card(label: str, value: str, note: str) -> str:
    label, value, note = html.escape(label), html.escape(value), html.escape(note)
    return f'<div class="card"><div>{label}</div><div class="value">{value}</div><div class="note">{note}</div></div>'


def _cards(findings: Findings) -> str:
    evaluation, towers = findings.evaluation, findings.twotower.validation
    per_byte, same = _number(evaluation["ar_loss_per_byte"], 3), _number(evaluation["ar_loss_on_bound_tokens"])
    bound = f"{_number(evaluation['diffusion_bound'])} ± {_number(evaluation['diffusion_bound_stderr'])}"
    start = f"{_number(towers[0]['loss'])} at step {towers[0]['step']}"
    cards = [
        _card("AR loss", _number(evaluation["ar_loss"]), f"nats per token; {per_byte} per byte"),
        _card("Masked loss", _number(towers[-1]["loss"]), f"nats per masked token; {start}"),
        _card("Likelihood bound of the denoiser", bound, f"nats per token; AR {same} on the same tokens"),
    ]
    for row in _threshold_rows(evaluation):
        if row["confidence_threshold"] == 0.8:
            note = f"at confidence threshold 0.8; {_number(row['speedup'])} x the speed of AR"
            cards.append(_card("Tokens per denoiser pass", _number(row["tokens_per_pass"]), note))
    return f'<div class="cards">{"".join(cards)}</div>'


def _sweep_table(evaluation: Mapping[str, Any]) -> str:
    headings = (
        "confidence threshold",
        "tokens per pass",
        "passes",
        "tokens per second",
        "speed against AR",
        "nats per token of the text",
    )
    rows = [
        (
            f"{row['confidence_threshold']:g}",
            _number(row["tokens_per_pass"]),
            _number(row["passes"], 0),
            _number(row["tokens_per_second"], 1),
            f"{_number(row['speedup'])} x",
            _number(row["nats_per_token"]),
        )
        for row in _threshold_rows(evaluation)
    ]
    ar = evaluation["ar_generation"]
    rows.append(
        (
            "AR, cached",
            "1.00",
            "-",
            _number(ar.get("tokens_per_second"), 1),
            "1.00 x",
            _number(ar.get("nats_per_token")),
        )
    )
    return _table(headings, rows)


def _noise_table(evaluation: Mapping[str, Any]) -> str:
    rows = [
        (f"{row['t']:g}", _number(row["loss"], 3), _number(row["count"], 0))
        for row in evaluation["masked_loss_by_noise"]
    ]
    return _table(("noise level t", "nats per masked token", "masked tokens"), rows)


def _conditioning(findings: Findings, images: Mapping[str, bytes]) -> str:
    """Which start of the time conditioning learns faster; nothing where only one was tried."""
    if not findings.conditioning:
        return ""
    rows = []
    for name, series in findings.conditioning.items():
        first, last = series.validation[0], series.validation[-1]
        rows.append((name, _number(first["loss"], 3), _number(last["loss"], 3), f"{last['step']:,}"))
    table = _table(("start", "loss at the first validation", "at the last", "steps"), rows)
    picture = _picture("conditioning", images)
    return f'<h2>Starts of the time conditioning</h2><div class="pair">{picture}{table}</div>'


def _sample(sample: Mapping[str, Any]) -> str:
    """What was written, after its prompt, dimmed."""
    note = f"{sample['new_tokens']} tokens, {sample['passes']} passes, {_number(sample['seconds'], 1)} s"
    return (
        f'<div class="card"><strong>{html.escape(sample["mode"])}</strong> '
        f'<span class="note">{html.escape(note)}</span>'
        f'<pre><span class="prompt">{html.escape(sample["prompt"])}</span>{html.escape(sample["text"])}</pre></div>'
    )


def _replay(recording: Mapping[str, Any] | None) -> str:
    """One generation to play, step by step, with its style and its script; nothing where none was recorded."""
    if recording is None:
        return ""
    settings = recording["settings"]
    note = (
        f"Each block of {settings['block_size']} tokens starts from masks; a pass of the denoiser predicts all of "
        "them, and those it is most sure of stay. "
        f"Confidence threshold {settings['confidence_threshold']:g}, temperature {settings['temperature']:g}."
    )
    return (
        f"<h2>One generation, step by step</h2><p>{html.escape(note)}</p><style>{replay.STYLE}</style>"
        f"{replay.fragment(recording)}<script>{replay.SCRIPT}</script>"
    )


def _page(findings: Findings, images: Mapping[str, bytes]) -> str:
    evaluation, title = findings.evaluation, html.escape(findings.name)
    texts = "".join(
        f'<details class="card"><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>'
        for name, text in findings.texts.items()
    )
    machine = f"{evaluation['device']}, {evaluation['dtype']}, {evaluation['threads']} threads"
    origin = f", both started from {html.escape(findings.backbone)}" if findings.backbone else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Two-tower run {title}</title><style>{_STYLE}</style></head><body>
<h1>Two-tower run {title}</h1>
<p>A backbone trained on the next token, then a denoiser trained beside a frozen context tower{origin}. Losses are
of held-out files unless a curve says training.</p>
{_cards(findings)}
<h2>Learning</h2>
<div class="pair">{_picture("ar_loss", images)}{_picture("twotower_loss", images)}</div>
<h2>Masked loss by noise level</h2>
<div class="pair">{_picture("noise_levels", images)}{_noise_table(evaluation)}</div>
{_conditioning(findings, images)}
<h2>Generation</h2>
<p>Speeds are wall-clock, against cached AR generation by the context tower in the same process, on {machine}.</p>
{_picture("threshold_sweep", images)}{_sweep_table(evaluation)}
{_replay(findings.recording)}
<h2>Samples</h2>
{"".join(_sample(sample) for sample in evaluation["samples"])}
<h2>All figures</h2>
{_table(("figure", "value", "against"), list(summary_rows(findings)))}
<h2>Exact configuration</h2>
{texts}
</body></html>
"""


def write_report(run: Path, *, console: Console | None = None) -> Path:
    """Write `report/` into the run folder, replacing an older one, and print the summary.

    Returns: `report/index.html`: one page that needs no other file. The pictures lie beside it as
        PNG, light and dark.

    Raises:
        UserError: a file of the run is missing or cannot be read; the message names it.
    """
    findings = read_findings(run)
    images = {}
    for name, drawing in draw(findings).items():
        images[f"{name}.png"], images[f"{name}-dark.png"] = (drawing(theme) for theme in plots.THEMES)
    partial, folder = run / "report.partial", run / "report"
    for leftover in (partial, run / "report.old"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    for name, image in images.items():
        (partial / name).write_bytes(image)
    (partial / "index.html").write_text(_page(findings, images), encoding="utf-8")
    if folder.exists():
        os.replace(folder, run / "report.old")
    os.replace(partial, folder)
    shutil.rmtree(run / "report.old", ignore_errors=True)
    print_summary(findings, console)
    return folder / "index.html"
