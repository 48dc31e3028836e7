"""What `twotower bench gpu` prints."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_twotower.bench import step
from megatron_twotower.bench.kernel_classes import CLASSES
from megatron_twotower.plan.layout import GIB

ON_A_CPU = "a CPU's figures: they show that the command works and say nothing of a GPU"
FORMULA = (
    "TFLOP/s: 2 for each multiplication and addition of a matrix product, by the formulas of plan/flops.py (frozen "
    "forward 1, trained 3, attention causal), forward + backward; executed counts what is recomputed"
)


def _number(value: float | None, spelled: str, *, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, spelled)


def _title(figures: dict[str, Any], what: str) -> str:
    where = "" if figures["on_a_gpu"] else f" ({ON_A_CPU})"
    shape = f"{figures['pattern']}, {figures['experts']} experts, L {figures['length']}, S {figures['block']}"
    return f"{what}: {shape}, {figures['precision']}{where}"


def steps_table(figures: dict[str, Any]) -> Table:
    made = step.table(
        _title(figures, "one step"),
        "case",
        "seconds",
        "update",
        "tokens/s",
        "with update",
        "TFLOP/s",
        "executed",
        "of bf16 peak",
        "peak GiB",
        "planned",
        "busiest expert",
        "of AR",
        "by formula",
    )
    for row in figures["steps"]:
        two = row["case"] == step.TWO_TOWER
        made.add_row(
            row["case"],
            f"{row['seconds']:.4f}",
            f"{row['update_seconds']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_with_update']:,.0f}",
            f"{row['model_tflops']:,.3g}",
            f"{row['executed_tflops']:,.3g}",
            _number(row["utilisation"], ".1%"),
            _number(row["peak_bytes"], ",.2f", scale=1 / GIB),
            _number(row["planned_bytes"], ",.2f", scale=1 / GIB),
            _number(row["busiest_expert"], ".2f"),
            _number(figures["two_tower_over_ar"], ".3f") if two else "",
            _number(figures["two_tower_over_ar_by_formula"], ".3f") if two else "",
        )
    made.caption = FORMULA
    return made


def classes_table(figures: dict[str, Any]) -> Table:
    what = "kernel" if figures["on_a_gpu"] else "operator, by its own time"
    made = step.table(
        f"milliseconds by class of {what}, update included",
        "class",
        *(f"{row['case']}{part}" for row in figures["steps"] for part in ("", ", share")),
    )
    for name in (*CLASSES, "in all", "by the clock"):
        cells = []
        for row in figures["steps"]:
            seconds = row["classes"]["seconds"]
            total = sum(seconds.values())
            value = {"in all": total, "by the clock": row["classes"]["elapsed"]}.get(name, seconds.get(name))
            cells += [f"{value * 1e3:,.2f}", f"{value / total:.1%}" if total else ""]
        made.add_row(name, *cells)
    return made


def scan_table(figures: dict[str, Any]) -> Table:
    row = figures["scan"]
    over = "no kernel seen" if row["times_bound"] is None else f"{row['times_bound']:.2f} x"
    made = step.table(
        "two-stream scan, forward + backward, against the memory traffic it cannot do without",
        "L",
        "S",
        "ms",
        "ms in kernels",
        "MB",
        "copy, GB/s",
        "bound, ms",
        "kernels over bound",
    )
    made.add_row(
        f"{row['length']}",
        f"{row['block']}",
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['kernel_seconds'] * 1e3:.3f}",
        f"{row['traffic_bytes'] / 1e6:,.1f}",
        f"{row['copy_bytes_per_second'] / 1e9:,.0f}",
        f"{row['bound_seconds'] * 1e3:.3f}",
        over,
    )
    return made


def ladder_table(figures: dict[str, Any]) -> Table:
    """Seconds a token over those as configured: above 1, what is switched off or changed brings so much."""
    made = step.table(
        _title(figures, "one change at a time"),
        "change",
        *(f"{row['case']}{part}" for row in figures["steps"] for part in (", ms", ", of configured", ", GiB")),
    )
    base = {row["case"]: row for row in figures["steps"]}
    cells = [[f"{row['seconds'] * 1e3:,.2f}", "1.000 x", f"{row['peak_bytes'] / GIB:,.2f}"] for row in base.values()]
    made.add_row("as configured", *(cell for each in cells for cell in each))
    for rung in figures["ladder"]:
        if rung["skipped"]:
            made.add_row(rung["rung"], Text(f"not run: {rung['skipped']}", "dim"))
            continue
        if rung["failed"]:
            made.add_row(rung["rung"], Text(f"failed: {rung['failed']}", "red"))
            continue
        row = [rung["rung"]]
        for name, before in base.items():
            case = rung["cases"][name]
            if case is None:
                row += ["out of memory", "", ""]
                continue
            ratio = case["seconds"] / case["tokens"] * before["tokens"] / before["seconds"]
            row += [f"{case['seconds'] * 1e3:,.2f}", f"{ratio:.3f} x", f"{case['peak_bytes'] / GIB:,.2f}"]
        made.add_row(*row)
    made.caption = "of configured: time for a token, over that as configured"
    return made


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    yield steps_table(figures)
    yield classes_table(figures)
    if figures["scan"] is not None:
        yield scan_table(figures)
    if figures["ladder"]:
        yield ladder_table(figures)
