"""The tables that `twotower bench gpu` prints."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_twotower.bench.kernel_classes import CLASSES
from megatron_twotower.bench.training_steps import TWO_TOWER
from megatron_twotower.common.tables import plain_table
from megatron_twotower.plan.layout import GIB

ON_A_CPU = "measured on a CPU: shows that the command works, says nothing about a GPU"
FORMULA = (
    "TFLOP/s: 2 for each multiplication and addition of a matrix product, by the formulas of plan/flops.py (frozen "
    "forward 1, trained 3, attention causal), forward + backward; executed includes recompute"
)


def gpu_tables(results: dict[str, Any]) -> list[Table]:
    """All tables of `gpu.json`; the scan and the ladder only if they were measured."""
    tables = [steps_table(results), classes_table(results)]
    if results["scan"] is not None:
        tables.append(scan_table(results))
    if results["ladder"]:
        tables.append(ladder_table(results))
    return tables


def _number(value: float | None, format_spec: str, *, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, format_spec)


def _title(results: dict[str, Any], what: str) -> str:
    where = "" if results["on_a_gpu"] else f" ({ON_A_CPU})"
    shape = f"{results['pattern']}, {results['experts']} experts, L {results['length']}, S {results['block']}"
    return f"{what}: {shape}, {results['precision']}{where}"


def steps_table(results: dict[str, Any]) -> Table:
    """One line per objective."""
    rates = ("tokens/s", "with update", "TFLOP/s", "executed", "of bf16 peak")
    memory, ratios = ("peak GiB", "planned"), ("of AR", "by formula")
    rows = []
    for row in results["steps"]:
        two_tower = row["case"] == TWO_TOWER
        rows.append(
            (
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
                _number(results["two_tower_over_ar"], ".3f") if two_tower else "",
                _number(results["two_tower_over_ar_by_formula"], ".3f") if two_tower else "",
            )
        )
    headings = ("case", "seconds", "update", *rates, *memory, "busiest expert", *ratios)
    table = plain_table(_title(results, "one step"), headings, rows, left=1)
    table.caption = FORMULA
    return table


def classes_table(results: dict[str, Any]) -> Table:
    """One line per class of kernels, then their sum and the elapsed time."""
    rows = []
    for name in (*CLASSES, "in all", "by the clock"):
        cells = [name]
        for row in results["steps"]:
            seconds = row["classes"]["seconds"]
            total = sum(seconds.values())
            value = {"in all": total, "by the clock": row["classes"]["elapsed"]}.get(name, seconds.get(name))
            cells += [f"{value * 1e3:,.2f}", f"{value / total:.1%}" if total else ""]
        rows.append(cells)
    what = "kernel" if results["on_a_gpu"] else "operator, by its own time"
    columns = [f"{row['case']}{part}" for row in results["steps"] for part in ("", ", share")]
    return plain_table(f"milliseconds by class of {what}, update included", ("class", *columns), rows, left=1)


def scan_table(results: dict[str, Any]) -> Table:
    """The two-stream scan and its lower bound."""
    row = results["scan"]
    cells = (
        f"{row['length']}",
        f"{row['block']}",
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['kernel_seconds'] * 1e3:.3f}",
        f"{row['traffic_bytes'] / 1e6:,.1f}",
        f"{row['copy_bytes_per_second'] / 1e9:,.0f}",
        f"{row['bound_seconds'] * 1e3:.3f}",
        "no kernel seen" if row["times_bound"] is None else f"{row['times_bound']:.2f} x",
    )
    return plain_table(
        "two-stream scan, forward + backward, against its minimal memory traffic",
        ("L", "S", "ms", "ms in kernels", "MB", "copy, GB/s", "bound, ms", "kernels over bound"),
        [cells],
    )


def ladder_table(results: dict[str, Any]) -> Table:
    """One line per rung, a change of one setting or kernel.

    The ratio is the time per token of the rung over that of the configuration without the change.
    """
    configured = {row["case"]: row for row in results["steps"]}
    columns = [f"{case}{part}" for case in configured for part in (", ms", ", of configured", ", GiB")]
    rows: list[list[RenderableType]] = [["as configured"]]
    for row in configured.values():
        rows[0] += [f"{row['seconds'] * 1e3:,.2f}", "1.000 x", f"{row['peak_bytes'] / GIB:,.2f}"]
    rows += [_rung_cells(rung, configured) for rung in results["ladder"]]
    table = plain_table(_title(results, "one change at a time"), ("change", *columns), rows, left=1)
    table.caption = "of configured: time per token over that as configured"
    return table


def _rung_cells(rung: dict[str, Any], configured: dict[str, dict[str, Any]]) -> list[RenderableType]:
    if rung["skipped"]:
        return [rung["rung"], Text(f"not run: {rung['skipped']}", "dim")]
    if rung["failed"]:
        return [rung["rung"], Text(f"failed: {rung['failed']}", "red")]
    cells = [rung["rung"]]
    for case, base in configured.items():
        row = rung["cases"][case]
        if row is None:
            cells += ["out of memory", "", ""]
            continue
        ratio = row["seconds"] / row["tokens"] * base["tokens"] / base["seconds"]
        cells += [f"{row['seconds'] * 1e3:,.2f}", f"{ratio:.3f} x", f"{row['peak_bytes'] / GIB:,.2f}"]
    return cells
