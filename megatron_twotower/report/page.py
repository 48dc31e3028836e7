"""The page of a report: its pictures and tables, rendered with the templates into one HTML file."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from rich.console import Console

from megatron_twotower.common import plots
from megatron_twotower.common.files import atomic_folder
from megatron_twotower.common.plots import Theme
from megatron_twotower.common.tables import number, with_error
from megatron_twotower.generate.replay import page as replay
from megatron_twotower.report import denoisers
from megatron_twotower.report.findings import Findings, read_findings
from megatron_twotower.report.summary import HEADINGS, print_summary, summary_rows

# The endings of the picture files of each theme.
ENDINGS = ((plots.LIGHT, ".png"), (plots.DARK, "-dark.png"))
# The confidence threshold whose speed has a card.
CARD_THRESHOLD = 0.8


class Card(NamedTuple):
    """One number at the top of the page."""

    label: str
    value: str
    note: str


class PageTable(NamedTuple):
    """A table of the page, all cells as text."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def write_report(run: Path, *, console: Console | None = None) -> Path:
    """Write `report/` into the run folder, replace an older one, and print the summary.

    Returns:
        `report/index.html`, one page that needs no other file. The pictures are next to it as PNG,
        light and dark.

    Raises:
        UserError: A file of the run is missing or cannot be read; the message names it.
    """
    findings = read_findings(run)
    pictures = {f"{name}{ending}": image for theme, ending in ENDINGS for name, image in draw(findings, theme).items()}
    page = render(findings, pictures)
    with atomic_folder(run / "report", replace=True) as folder:
        for name, image in pictures.items():
            (folder / name).write_bytes(image)
        (folder / "index.html").write_text(page, encoding="utf-8")
    print_summary(findings, console)
    return run / "report" / "index.html"


def draw(findings: Findings, theme: Theme) -> dict[str, bytes]:
    """The pictures in one theme: name of the file, without its ending, and PNG bytes."""
    ar, towers, evaluation = findings.ar, findings.twotower, findings.evaluation
    pictures = {
        "ar_loss": plots.loss_curve(
            ar.train_curve,
            ar.validation_curve,
            title="Backbone: next-token loss",
            subtitle="objective ar; validation on held-out files",
            unit="nats per token",
            theme=theme,
        ),
        "twotower_loss": plots.loss_curve(
            towers.train_curve,
            towers.validation_curve,
            title="Denoiser: masked loss",
            subtitle="objective two_tower, context tower frozen; validation on held-out files",
            unit="nats per masked token",
            theme=theme,
        ),
        "noise_levels": plots.noise_levels(
            towers.validation[0]["loss_by_noise"], towers.validation[-1]["loss_by_noise"], theme=theme
        ),
        "threshold_sweep": plots.threshold_sweep(
            findings.sweep, ar_nats_per_token=evaluation["ar_generation"].get("nats_per_token"), theme=theme
        ),
    }
    if compared := denoisers.evaluations(findings):
        pictures["denoisers"] = plots.denoisers(compared, theme=theme)
    if findings.conditioning:
        pictures["conditioning"] = plots.comparison(
            {name: each.validation_curve for name, each in findings.conditioning.items()},
            title="Starts of the time conditioning",
            subtitle="the same recipe, seed and data; held-out files",
            unit="nats per masked token",
            theme=theme,
        )
    return pictures


def render(findings: Findings, pictures: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Args:
        pictures: PNG bytes by file name, as `write_report` writes them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    images = {name: "data:image/png;base64," + base64.b64encode(image).decode() for name, image in pictures.items()}
    return environment.get_template("page.html.j2").render(
        findings=findings,
        evaluation=findings.evaluation,
        images=images,
        cards=list(_cards(findings)),
        noise=_noise_table(findings),
        conditioning=_conditioning_table(findings),
        sweep=_sweep_table(findings),
        denoisers=PageTable(denoisers.HEADINGS, list(denoisers.rows(findings))),
        denoisers_title=denoisers.TITLE,
        summary=PageTable(HEADINGS, list(summary_rows(findings))),
        replay=_replay(findings),
    )


def _cards(findings: Findings) -> Iterator[Card]:
    evaluation, towers = findings.evaluation, findings.twotower.validation
    per_byte = number(evaluation["ar_loss_per_byte"], 3)
    yield Card("AR loss", number(evaluation["ar_loss"]), f"nats per token; {per_byte} per byte")
    start = f"{number(towers[0]['loss'])} at step {towers[0]['step']}"
    yield Card("Masked loss", number(towers[-1]["loss"]), f"nats per masked token; {start}")
    bound = with_error(evaluation["diffusion_bound"], evaluation["diffusion_bound_stderr"])
    same = f"AR {number(evaluation['ar_loss_on_bound_tokens'])} on the same tokens"
    yield Card("Likelihood bound of the denoiser", bound, f"nats per token; {same}")
    for row in findings.sweep:
        if row["confidence_threshold"] == CARD_THRESHOLD:
            note = f"at confidence threshold {CARD_THRESHOLD}; {number(row['speedup'])} x the speed of AR"
            yield Card("Tokens per denoiser pass", number(row["tokens_per_pass"]), note)


def _noise_table(findings: Findings) -> PageTable:
    rows = [
        (f"{row['t']:g}", number(row["loss"], 3), number(row["count"], 0))
        for row in findings.evaluation["masked_loss_by_noise"]
    ]
    return PageTable(("noise level t", "nats per masked token", "masked tokens"), rows)


def _conditioning_table(findings: Findings) -> PageTable:
    rows = []
    for name, run in findings.conditioning.items():
        first, last = run.validation[0], run.validation[-1]
        rows.append((name, number(first["loss"], 3), number(last["loss"], 3), f"{last['step']:,}"))
    return PageTable(("start", "loss at the first validation", "at the last", "steps"), rows)


def _sweep_table(findings: Findings) -> PageTable:
    """A row for each confidence threshold, and one for cached AR."""
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
            number(row["tokens_per_pass"]),
            number(row["passes"], 0),
            number(row["tokens_per_second"], 1),
            f"{number(row['speedup'])} x",
            number(row["nats_per_token"]),
        )
        for row in findings.sweep
    ]
    ar = findings.evaluation["ar_generation"]
    speed, nats = number(ar.get("tokens_per_second"), 1), number(ar.get("nats_per_token"))
    return PageTable(headings, [*rows, ("AR, cached", "1.00", "-", speed, "1.00 x", nats)])


def _replay(findings: Findings) -> dict[str, Any] | None:
    """The recording of one generation, and the style and script that play it."""
    if findings.recording is None:
        return None
    return {
        "settings": findings.recording["settings"],
        "style": Markup(replay.STYLE),
        "fragment": Markup(replay.fragment(findings.recording)),
        "script": Markup(replay.SCRIPT),
    }
