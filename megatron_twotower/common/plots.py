"""All pictures, as PNG bytes in a light or a dark theme. The only module that imports matplotlib.

Curves are lists of (x, y) points. A y of `None`, logged for a value that was not finite, leaves a
gap.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

Point = tuple[float, float | None]
Curve = Sequence[Point]
PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    """The colours of one theme.

    Attributes:
        series: The colours of the curves, in their order. They differ in brightness too.
    """

    name: str
    background: str
    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("light", "#ffffff", "#1d2129", "#6b7280", "#e6e8ec", ("#2563c9", "#d9730d", "#0f8a6c", "#8e44ad"))
DARK = Theme("dark", "#16181d", "#e8eaed", "#9aa1ac", "#2c3038", ("#7aa8f5", "#f0a35e", "#4fc3a1", "#c792e0"))
DASHED = (0, (4, 3))


def _new_figure(
    theme: Theme, title: str, subtitle: str, *, panels: int = 1, width: float = 5.8
) -> tuple[Figure, list[Axes]]:
    """A figure with its title and its empty panels, side by side; `width` is in inches."""
    figure = Figure(figsize=(width, 3.6), dpi=PIXELS_PER_INCH, facecolor=theme.background)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    inch = 1 / width
    top = 0.81 if panels == 1 else 0.74  # panels have titles of their own
    figure.subplots_adjust(left=0.72 * inch, right=1 - 0.25 * inch, top=top, bottom=0.15, wspace=0.28)
    figure.text(0.2 * inch, 0.945, title, color=theme.text, fontsize=12, fontweight="bold", va="center")
    figure.text(0.2 * inch, 0.88, subtitle, color=theme.muted, fontsize=9, va="center")
    for panel in axes:
        panel.set_facecolor(theme.background)
        panel.grid(axis="y", color=theme.grid, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=theme.muted, labelsize=8.5, length=0, pad=5)
        for side, spine in panel.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.grid)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _label_axes(axes: Axes, theme: Theme, *, x: str, y: str) -> None:
    axes.set_xlabel(x, color=theme.muted, fontsize=9)
    axes.set_ylabel(y, color=theme.muted, fontsize=9)


def _legend(axes: Axes, theme: Theme) -> None:
    """A legend in one line, to the right of the title."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        labelcolor=theme.text,
        loc="center right",
        bbox_to_anchor=(0.99, 0.945),
        ncols=4,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _start_y_at_zero(axes: Axes, values: Sequence[float | None]) -> None:
    """Start the y axis at zero, and leave space for a label above the highest value."""
    axes.set_ylim(0, 1.15 * max((value for value in values if value is not None), default=1.0))


def _write_values(axes: Axes, points: Curve, *, color: str, below: bool = False) -> None:
    """Write the value of each point above it, or below it."""
    for x, y in points:
        if y is not None:
            axes.annotate(
                f"{y:.2f}",
                (x, y),
                xytext=(0, -14 if below else 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=color,
            )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No software version in the file: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [math.nan if y is None else y for _, y in curve]


def _format_steps(axes: Axes) -> None:
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _curve(axes: Axes, theme: Theme, points: Curve, *, color: str, label: str | None = None) -> None:
    axes.plot(
        *_columns(points),
        color=color,
        label=label,
        linewidth=1.8,
        marker="o",
        markersize=5.5,
        markeredgecolor=theme.background,
        markeredgewidth=1,
    )


def loss_curve(train: Curve, validation: Curve, *, title: str, subtitle: str, unit: str, theme: Theme) -> bytes:
    """Loss against optimizer steps: training as a line, validation as marked points."""
    figure, (axes,) = _new_figure(theme, title, subtitle)
    axes.plot(*_columns(train), color=theme.series[0], linewidth=1.3, alpha=0.9, label="training")
    if validation:
        _curve(axes, theme, validation, color=theme.series[1], label="validation")
        _write_values(axes, validation[-1:], color=theme.series[1])
    _label_axes(axes, theme, x="optimizer steps", y=unit)
    _format_steps(axes)
    _legend(axes, theme)
    return _png(figure)


def noise_levels(start: Mapping[str, float | None], end: Mapping[str, float | None], *, theme: Theme) -> bytes:
    """Masked loss by noise level, at the start and at the end.

    Args:
        start: Loss by range of the noise level, written as "0.0-0.2".
        end: The same at the last validation.
    """
    figure, (axes,) = _new_figure(
        theme, "Masked loss by noise level", "held-out text, at the first and at the last validation"
    )
    for values, color, label in ((start, theme.muted, "start"), (end, theme.series[0], "end")):
        # Labels on the outer sides, so that those of two close curves do not overlap.
        points = [(_middle_of_range(name), loss) for name, loss in values.items()]
        _curve(axes, theme, points, color=color, label=label)
        _write_values(axes, points, color=color, below=label == "end")
    axes.set_xlim(0, 1)
    _start_y_at_zero(axes, [*start.values(), *end.values()])
    _label_axes(axes, theme, x="noise level t (share of tokens masked)", y="nats per masked token")
    _legend(axes, theme)
    return _png(figure)


def _middle_of_range(bucket: str) -> float:
    low, _, high = bucket.partition("-")
    return (float(low) + float(high)) / 2


# The key in a row of the sweep, the title of its panel, and its unit.
_SWEEP_PANELS = (
    ("tokens_per_pass", "Tokens per denoiser pass", "tokens"),
    ("speedup", "Wall-clock speed against AR", "times AR"),
    ("nats_per_token", "Text scored by the AR model", "nats per token"),
)


def threshold_sweep(
    rows: Sequence[Mapping[str, Any]], *, ar_nats_per_token: float | None = None, theme: Theme
) -> bytes:
    """Speed and quality against the confidence threshold, one panel for each measure.

    AR is the dashed line: one token per pass, and speed 1.

    Args:
        rows: Rows of a sweep with `confidence_threshold` and the keys of the panels.
        ar_nats_per_token: The score of text that AR wrote, if it was measured.
    """
    figure, panels = _new_figure(
        theme, "Confidence threshold", "a lower threshold commits more tokens in each pass", panels=3, width=11.0
    )
    references = (1.0, 1.0, ar_nats_per_token)
    for axes, (key, title, unit), color, ar in zip(panels, _SWEEP_PANELS, theme.series, references, strict=False):
        points = sorted((row["confidence_threshold"], row[key]) for row in rows if row[key] is not None)
        _curve(axes, theme, points, color=color)
        _write_values(axes, points, color=theme.text)
        if ar is not None:
            axes.axhline(ar, color=theme.muted, linewidth=1, linestyle=DASHED, zorder=1)
            axes.annotate(
                "AR",
                (1, ar),
                xycoords=("axes fraction", "data"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=8,
                color=theme.muted,
                va="center",
            )
        _start_y_at_zero(axes, [ar, *(y for _, y in points)])
        axes.margins(x=0.1)
        axes.set_title(title, color=theme.text, fontsize=9.5, loc="left", pad=6)
        axes.set_xticks([x for x, _ in points])
        _label_axes(axes, theme, x="confidence threshold", y=unit)
    return _png(figure)


# Of `denoisers`: the rows of an evaluation, their keys for x and y, title, units of x and y.
_DENOISER_PANELS = (
    ("masked_loss_by_noise", "t", "loss", "Masked loss", "noise level t", "nats per masked token"),
    ("sweep", "confidence_threshold", "tokens_per_pass", "Tokens per pass", "confidence threshold", "tokens"),
    ("sweep", "confidence_threshold", "speedup", "Speed", "confidence threshold", "times cached AR"),
)


def denoisers(evaluations: Mapping[str, Mapping[str, Any]], *, theme: Theme) -> bytes:
    """Denoisers of one context tower, by noise level and by confidence threshold.

    AR is the dashed line: one token per pass, and speed 1.

    Args:
        evaluations: Figures of `twotower evaluate`, by the name of the denoiser.
    """
    figure, panels = _new_figure(
        theme, "Denoisers of one context tower", "held-out text, the same windows and prompts", panels=3, width=11.0
    )
    for axes, (rows, x, y, title, x_unit, y_unit) in zip(panels, _DENOISER_PANELS, strict=True):
        for color, (name, found) in zip(theme.series, evaluations.items(), strict=False):
            _curve(axes, theme, sorted((row[x], row[y]) for row in found[rows]), color=color, label=name)
        if rows == "sweep":
            axes.axhline(1, color=theme.muted, linewidth=1, linestyle=DASHED, zorder=1)
        _start_y_at_zero(axes, [row[y] for found in evaluations.values() for row in found[rows]])
        axes.set_title(title, color=theme.text, fontsize=9.5, loc="left", pad=6)
        _label_axes(axes, theme, x=x_unit, y=y_unit)
    _legend(panels[0], theme)
    return _png(figure)


def comparison(curves: Mapping[str, Curve], *, title: str, subtitle: str, unit: str, theme: Theme) -> bytes:
    """Loss against optimizer steps, with a named curve for each run."""
    figure, (axes,) = _new_figure(theme, title, subtitle)
    for index, (name, curve) in enumerate(curves.items()):
        _curve(axes, theme, curve, color=theme.series[index % len(theme.series)], label=name)
    _label_axes(axes, theme, x="optimizer steps", y=unit)
    _format_steps(axes)
    _legend(axes, theme)
    return _png(figure)


def length_histogram(
    histograms: Mapping[str, Sequence[int]], *, edges: Sequence[int], title: str, subtitle: str, theme: Theme
) -> bytes:
    """Share of documents by length, for each corpus.

    Args:
        histograms: (bins,) numbers of documents, by corpus.
        edges: (bins + 1,) lengths in tokens.
    """
    figure, (axes,) = _new_figure(theme, title, subtitle)
    for index, (name, counts) in enumerate(histograms.items()):
        color = theme.series[index % len(theme.series)]
        shares = [100 * count / max(sum(counts), 1) for count in counts]
        axes.stairs(shares, edges, color=color, linewidth=1.6, label=name)
        axes.stairs(shares, edges, color=color, fill=True, alpha=0.18 if len(histograms) > 1 else 0.35)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    _label_axes(axes, theme, x="tokens in a document", y="% of documents")
    if len(histograms) > 1:
        _legend(axes, theme)
    return _png(figure)


def bulk_speed(rows: Sequence[Mapping[str, Any]], *, subtitle: str, theme: Theme) -> bytes:
    """Tokens per second against batch size, with a curve for each case of `bench.generate`."""
    figure, (axes,) = _new_figure(theme, "Bulk text", subtitle, width=7.2)
    sizes = sorted({row["batch_size"] for row in rows})
    for index, name in enumerate(dict.fromkeys(row["case"] for row in rows)):
        points = [
            (float(sizes.index(row["batch_size"])), row["tokens_per_second"]) for row in rows if row["case"] == name
        ]
        _curve(axes, theme, points, color=theme.series[index % len(theme.series)], label=name)
    axes.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
    _start_y_at_zero(axes, [row["tokens_per_second"] for row in rows])
    _label_axes(axes, theme, x="prompts in a batch", y="new tokens per second")
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.text, loc="upper left")
    return _png(figure)


def _bars(
    axes: Axes, theme: Theme, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, write: str
) -> None:
    """Groups of horizontal bars, the first group on top.

    Args:
        labels: The name of each group.
        series: One value per group; `None` leaves a gap.
        write: The format of the value at the end of a bar.
    """
    height = 0.8 / max(len(series), 1)
    for index, (name, values) in enumerate(series.items()):
        places = [row + (index - (len(series) - 1) / 2) * height for row in range(len(labels))]
        color = theme.series[index % len(theme.series)]
        axes.barh(places, [value or 0.0 for value in values], height=0.9 * height, color=color, label=name)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                axes.annotate(
                    write.format(value),
                    (value, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=theme.text,
                )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.margins(x=0.14)


def operations(rows: Sequence[Mapping[str, Any]], *, theme: Theme) -> bytes:
    """Time and extra peak memory of each operation's baselines, in multiples of ours.

    Args:
        rows: Rows of `bench.ops`. Ours have no `time_ratio` and no `memory_ratio`.
    """
    compared = [row for row in rows if "time_ratio" in row]
    labels = [
        f"{row['operation']} L {row['length']}" + (f" S {row['block']}" if row["block"] else "") + f"\n{row['case']}"
        for row in compared
    ]
    figure, panels = _new_figure(
        theme, "Two-stream operations", "baselines, in multiples of ours", panels=2, width=11.0
    )
    figure.set_size_inches(11.0, 1.6 + 0.36 * max(len(labels), 2))
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(left=0.2, right=0.97, top=1 - 1.0 * inch, bottom=0.5 * inch, wspace=0.08)
    for text, down in zip(figure.texts, (0.25, 0.5), strict=True):
        text.set_y(1 - down * inch)
    for axes, (key, title) in zip(
        panels, (("time_ratio", "Time, forward + backward"), ("memory_ratio", "Extra peak memory")), strict=True
    ):
        _bars(axes, theme, labels, {title: [row[key] for row in compared]}, write="{:.2f} ×")
        axes.axvline(1, color=theme.muted, linewidth=1, linestyle=DASHED)
        axes.set_title(title, color=theme.text, fontsize=9.5, loc="left", pad=6)
    panels[1].set_yticklabels([])
    return _png(figure)


def steps(figures: Mapping[str, Any], *, theme: Theme) -> bytes:
    """Step times in multiples of the AR step, by length, and cost and benefit of noise draws.

    Args:
        figures: `steps` and `draws` of `bench.step`.
    """
    figure, (left, right) = _new_figure(
        theme,
        "Training step",
        "forward + backward, in steps of the `ar` objective on the same backbone and tokens",
        panels=2,
        width=11.0,
    )
    lengths = sorted({row["length"] for row in figures["steps"]})
    curves = sorted({(row["pattern"], row["case"]) for row in figures["steps"] if row["case"] != "ar"})
    for index, (pattern, case) in enumerate(curves):
        rows = [row for row in figures["steps"] if (row["pattern"], row["case"]) == (pattern, case)]
        points = [(float(lengths.index(row["length"])), row["ratio"]) for row in rows]
        _curve(left, theme, points, color=theme.series[index % len(theme.series)], label=f"{case}, {pattern}")
        _write_values(left, points, color=theme.text, below=index % 2 == 1)  # two towers of two patterns are close
    left.axhline(4 / 3, color=theme.muted, linewidth=1, linestyle=DASHED)
    left.set_xticks(range(len(lengths)), [f"{length}" for length in lengths])
    left.margins(x=0.1)
    _start_y_at_zero(left, [4 / 3, *(row["ratio"] for row in figures["steps"])])
    _label_axes(left, theme, x="sequence length in tokens (dashed: the limit, 4/3)", y="times the AR step")
    left.legend(frameon=False, fontsize=8, labelcolor=theme.text, loc="lower left")
    keys = (
        ("relative_cost_per_copy", "cost per noisy copy"),
        ("cost_x_noise", "cost x variance of noise"),
        ("cost_x_total", "cost x variance of noise and data"),
    )
    for color, (key, name) in zip(theme.series, keys, strict=False):
        points = [(float(row["draws"]), row[key]) for row in figures["draws"]]
        _curve(right, theme, points, color=color, label=name)
    right.set_xticks([row["draws"] for row in figures["draws"]])
    _start_y_at_zero(right, [row[key] for row in figures["draws"] for key, _ in keys])
    _label_axes(right, theme, x="noise draws of one context pass", y="relative to one draw")
    right.legend(frameon=False, fontsize=8, labelcolor=theme.text, loc="lower left")
    return _png(figure)


def positions(
    losses: Mapping[str, Sequence[tuple[float | None, float | None]]],
    references: Mapping[str, Sequence[tuple[float | None, float | None]]],
    *,
    theme: Theme,
) -> bytes:
    """Nats per token by position in the block, with a band of one standard error.

    Args:
        losses: Mean and standard error for each position, by noise level, from light to dark.
        references: The same for what the denoiser is compared with (dashed).
    """
    figure, (axes,) = _new_figure(
        theme, "Loss by position in the block", "held-out text; bands: one standard error", width=6.6
    )
    figure.subplots_adjust(right=0.74)
    for index, (name, values) in enumerate(losses.items()):
        strength = 0.3 + 0.7 * (index + 1) / len(losses)
        _band(axes, values, color=theme.series[0], alpha=strength, label=name)
    for color, (name, values) in zip(theme.series[1:], references.items(), strict=False):
        _band(axes, values, color=color, alpha=1.0, label=name, dashed=True)
    _start_y_at_zero(axes, [mean for values in (*losses.values(), *references.values()) for mean, _ in values])
    size = max((len(values) for values in losses.values()), default=1)
    axes.set_xticks([1, *range(max(2, size // 4), size + 1, max(1, size // 4))])
    _label_axes(axes, theme, x="position in the block", y="nats per token")
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=theme.text,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        handlelength=1.6,
    )
    return _png(figure)


def _band(
    axes: Axes,
    values: Sequence[tuple[float | None, float | None]],
    *,
    color: str,
    alpha: float,
    label: str,
    dashed: bool = False,
) -> None:
    x = range(1, len(values) + 1)
    mean, error = ([math.nan if value is None else value for value in column] for column in zip(*values, strict=True))
    axes.plot(x, mean, color=color, alpha=alpha, label=label, linewidth=1.8, linestyle=(0, (4, 2)) if dashed else "-")
    low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15 * alpha, linewidth=0)


def _error_bars(
    axes: Axes, theme: Theme, points: Sequence[tuple[float, float, float]], *, number: int, label: str
) -> None:
    """Draw curve `number` through points (x, y, error of y), where curves may outnumber colours."""
    x, y, error = zip(*points, strict=True)
    axes.errorbar(
        x,
        y,
        yerr=error,
        color=theme.series[number % len(theme.series)],
        linestyle="-" if number < len(theme.series) else DASHED,
        marker="os^Dv<>P*X"[number % 10],
        markersize=4.5,
        linewidth=1.2,
        elinewidth=0.6,
        alpha=0.9,
        label=label,
    )


def _legend_beside(panels: Sequence[Axes], theme: Theme) -> None:
    """A legend in one column with the curves of all panels, to the right of the last one."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    curves = {label: handle for panel in found for handle, label in panel}
    panels[-1].legend(
        curves.values(),
        curves.keys(),
        frameon=False,
        fontsize=8,
        labelcolor=theme.text,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )


def samplers(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]], base: tuple[float, float], *, theme: Theme
) -> bytes:
    """Agreement with AR against tokens per pass, a curve for each sampler.

    Args:
        curves: Of each setting of a sampler: tokens per pass, agreement and its standard error.
        base: The same of the setting that they are compared with, without error.
    """
    subtitle = "held-out prompts, with standard errors; ringed: the released rule at its threshold"
    figure, (axes,) = _new_figure(theme, "Agreement with AR under parallelism", subtitle, width=8.5)
    for number, (name, points) in enumerate(curves.items()):
        in_percent = [(x, 100 * y, 100 * (error or 0.0)) for x, y, error in points]
        _error_bars(axes, theme, in_percent, number=number, label=name)
    axes.plot([base[0]], [100 * base[1]], "o", markersize=12, markerfacecolor="none", markeredgecolor=theme.text)
    _label_axes(axes, theme, x="tokens per pass", y="% of tokens that AR would have chosen")
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, 0.78 * box.width, box.height))
    _legend_beside([axes], theme)
    return _png(figure)


@dataclass(frozen=True)
class Family:
    """Points of a sweep that differ in one setting.

    Attributes:
        points: The label and the row of each point.
        joined: A line joins the points, because they have an order.
    """

    name: str
    points: Sequence[tuple[str, Mapping[str, Any]]]
    joined: bool = True


# The key in a row of the sweep, a factor, the title of its panel, its unit, whether less is better.
_PARETO_PANELS = (
    ("agreement", 100.0, "Tokens that AR would have chosen", "% of tokens", False),
    ("nats_per_token", 1.0, "Text scored by the AR model", "nats per token, better upwards", True),
    ("repeated_4", 100.0, "Repetition", "% of runs of four tokens, better upwards", True),
)


def _label_points(axes: Axes, labels: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Write labels next to points, except those that would cover an earlier one.

    Args:
        labels: Text, point and colour. The limits of the axes must be set already.
    """
    placed: list[tuple[float, float]] = []
    for text, point, color in labels:
        x, y = axes.transData.transform(point)
        if all(
            abs(x - other) > 0.3 * PIXELS_PER_INCH or abs(y - high) > 0.12 * PIXELS_PER_INCH for other, high in placed
        ):
            placed.append((x, y))
            axes.annotate(text, point, xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=color)


def pareto(
    families: Sequence[Family], ar: Mapping[str, Any], front: Sequence[Mapping[str, Any]], *, theme: Theme
) -> bytes:
    """Quality against speed, one panel for each measure of quality. Up and to the right is better.

    Args:
        ar: The row of cached AR, which has speed 1.
        front: The rows of the Pareto front of speed and the first panel's measure. All panels ring
            them.
    """
    figure, panels = _new_figure(
        theme,
        "Speed and quality of mask diffusion",
        "against cached AR in the same run; ringed: none is faster and closer to AR at once",
        panels=3,
        width=12.5,
    )
    markers, axes = ("o", "s", "^"), panels[0]
    for axes, (key, factor, title, unit, less) in zip(panels, _PARETO_PANELS, strict=True):
        labels: list[tuple[str, tuple[float, float], str]] = []
        for family, color, marker in zip(families, theme.series, markers, strict=False):
            xy = [(row["speedup"], factor * row[key]) for _, row in family.points]
            axes.plot(
                *_columns(xy),
                color=color,
                marker=marker,
                markersize=5.5,
                linewidth=1.3 if family.joined else 0,
                markeredgecolor=theme.background,
                markeredgewidth=0.8,
                label=family.name,
            )
            labels += [(label, point, color) for (label, _), point in zip(family.points, xy, strict=True)]
        axes.plot(
            [row["speedup"] for row in front],
            [factor * row[key] for row in front],
            linewidth=0,
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=theme.muted,
            markeredgewidth=0.9,
        )
        axes.plot([1], [factor * ar[key]], marker="*", markersize=11, color=theme.text, linewidth=0, label="AR, cached")
        axes.axvline(1, color=theme.muted, linewidth=0.8, linestyle=DASHED, zorder=1)
        axes.margins(x=0.12, y=0.12)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        if less:
            axes.invert_yaxis()
        axes.set_title(title, color=theme.text, fontsize=9.5, loc="left", pad=6)
        _label_axes(axes, theme, x="speed, times AR", y=unit)
        _label_points(axes, labels)
    _legend(axes, theme)
    return _png(figure)


def study(rows: Sequence[Mapping[str, Any]], *, reference: str, theme: Theme) -> bytes:
    """Final loss, above that of the reference, against the share of the tokens.

    There is a panel for each size and a curve for each arm. The differences are those of the same
    seeds: losses differ more from seed to seed than from arm to arm.

    Args:
        rows: Rows of `study.figures`, as dictionaries.
        reference: The arm whose loss with most tokens the others are compared with.
    """
    sizes, arms = list(dict.fromkeys(row["size"] for row in rows)), list(dict.fromkeys(row["arm"] for row in rows))
    figure, panels = _new_figure(
        theme,
        "Loss and tokens",
        "final loss above that of the reference with all tokens, seed by seed; bars: one standard error",
        panels=len(sizes),
        width=5.2 * len(sizes) + 1.8,
    )
    for axes, size in zip(panels, sizes, strict=True):
        for number, arm in enumerate(arms):
            of_arm = [row for row in rows if (row["size"], row["arm"]) == (size, arm)]
            compared = [(row["share"], row["difference"]) for row in of_arm if row["difference"]]
            points = [(share, found["value"], found["error"] or 0.0) for share, found in compared]
            if arm == reference and of_arm:
                points.append((max(row["share"] for row in of_arm), 0.0, 0.0))
            if points:  # else it is not trained at this size yet
                _error_bars(axes, theme, points, number=number, label=arm)
        axes.axhline(0, color=theme.muted, linewidth=1, linestyle=DASHED)
        axes.set_xscale("log")
        shares = sorted({row["share"] for row in rows if row["size"] == size})
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(size, color=theme.text, fontsize=9.5, loc="left", pad=6)
        _label_axes(axes, theme, x="share of the tokens", y="nats per masked token above it")
        axes.margins(0.1)
    figure.subplots_adjust(top=0.74, right=1 - 1.8 / figure.get_figwidth())
    _legend_beside(panels, theme)
    return _png(figure)
