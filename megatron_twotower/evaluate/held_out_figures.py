"""Tables and plots of the figures that `held_out.evaluate` returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_twotower.common import plots
from megatron_twotower.common.machine import machine_line
from megatron_twotower.common.tables import number, plain_table, with_error
from megatron_twotower.evaluate.speed_quality import pareto_front, rule_name, threshold_rows


def _position_tables(found: Mapping[str, Any]) -> list[Table]:
    levels = found["masked_loss_by_noise"]
    noise = [(f"{e['t']:g}", with_error(e["loss"], e["stderr"]), f"{e['count']:,}") for e in levels]
    block = len(found["ar_loss_by_position"])
    chosen = levels[:: max(1, len(levels) // 5)]
    rows = [
        [str(j + 1)]
        + [with_error(e["by_position"][j]["loss"], e["by_position"][j]["stderr"]) for e in chosen]
        + [
            with_error(found[key][j]["nats_per_token"], found[key][j]["stderr"])
            for key in ("diffusion_bound_by_position", "ar_loss_by_position")
        ]
        for j in range(block)
    ]
    headings = ["position", *(f"t {e['t']:g}" for e in chosen), "bound", "AR"]
    return [
        plain_table("masked loss by noise level", ("noise level t", "nats per masked token", "tokens"), noise),
        plain_table("nats per token by position in the block", headings, rows),
    ]


def _sweep_table(found: Mapping[str, Any]) -> Table:
    headings = (
        "S",
        "steps",
        "rule",
        "tokens/pass",
        "tokens/s",
        "x AR",
        "nats/token",
        "agree %",
        "as AR %",
        "distinct-2 %",
        "repeated-4 %",
    )
    rows = [
        [
            "AR" if row["block_size"] is None else str(row["block_size"]),
            "-" if row["steps_per_block"] is None else str(row["steps_per_block"]),
            rule_name(row),
            number(row["tokens_per_pass"]),
            number(row["tokens_per_second"], 1),
            number(row["speedup"]),
            with_error(row["nats_per_token"], row["nats_per_token_stderr"]),
            *(number(100 * row[key], 1) for key in ("agreement", "same_as_ar", "distinct_2", "repeated_4")),
        ]
        for row in found["generation"]
    ]
    settings = found["settings"]
    title = f"mask diffusion against cached AR, {settings['prompts']} prompts x {settings['new_tokens']} tokens"
    return plain_table(title, headings, rows)


def _samplers_table(found: Mapping[str, Any]) -> Table:
    curves = found["samplers"]
    base = curves["base"]
    rows = [
        [
            "released rule",
            base["setting"],
            number(base["tokens_per_pass"]),
            "1",
            "1",
            number(100 * base["agreement"], 1),
            "0",
            number(base["nats_per_token"]),
            "0",
            number(100 * base["repeated_4"], 1),
            "-",
        ]
    ]
    for curve in curves["curves"]:
        best = curve["recommended"]
        found_for_it = ["none as good", *["-"] * 8] if best is None else _recommended_cells(best)
        rows.append([curve["name"], *found_for_it, with_error(curve["area"], curve["area_stderr"])])
    title = (
        "samplers: of the settings that are as good as the released rule, the one with most tokens per pass, "
        f"by {curves['tuning_prompts']} prompts; its figures on {curves['prompts']} others"
    )
    headings = (
        "",
        "setting",
        "tokens/pass",
        "x passes",
        "x speed",
        "agree %",
        "more",
        "nats/token",
        "more",
        "repeated-4 %",
        "area",
    )
    return plain_table(title, headings, rows, left=2)


def _recommended_cells(best: Mapping[str, Any]) -> list[str]:
    return [
        best["setting"],
        number(best["tokens_per_pass"]),
        with_error(best["gain"], best["gain_stderr"]),
        number(best["speed_gain"]),
        number(100 * best["agreement"], 1),
        with_error(100 * best["agreement_gain"], 100 * best["agreement_gain_stderr"]),
        number(best["nats_per_token"]),
        with_error(best["nats_gain"], best["nats_gain_stderr"]),
        number(100 * best["repeated_4"], 1),
    ]


def print_figures(found: Mapping[str, Any], console: Console) -> None:
    """Print the tables of the figures that `evaluate` returned."""
    lines = {
        "AR, context tower": "ar_loss",
        "AR, tokens of the bound": "ar_loss_on_bound_tokens",
        "diffusion bound": "diffusion_bound",
    }
    rows = [
        (name, with_error(found[key], found[f"{key}_stderr"]), f"{found[f'{key}_tokens']:,}")
        for name, key in lines.items()
    ]
    for table in (plain_table("held-out text", ("", "nats per token", "tokens"), rows), *_position_tables(found)):
        console.print(table)
    console.print(_sweep_table(found))
    if "samplers" in found:
        console.print(_samplers_table(found))
    console.print(machine_line(found["machine"]), highlight=False)


def positions_plot(found: Mapping[str, Any]) -> bytes:
    """A PNG of the losses by position in the block."""
    levels = found["masked_loss_by_noise"]
    chosen = [levels[i] for i in sorted({0, (len(levels) - 1) // 2, len(levels) - 1})]
    losses = {f"t = {e['t']:g}": [(cell["loss"], cell["stderr"]) for cell in e["by_position"]] for e in chosen}
    references = {
        name: [(cell["nats_per_token"], cell["stderr"]) for cell in found[key]]
        for name, key in (("bound", "diffusion_bound_by_position"), ("AR", "ar_loss_by_position"))
    }
    return plots.positions(losses, references, theme=plots.LIGHT)


def pareto_plot(found: Mapping[str, Any]) -> bytes:
    """A PNG of agreement with AR against speed, with a line for each list of the sweep."""
    block = found["settings"]["block_size_tokens"]
    rows = [row for row in found["generation"][1:] if row["sampler"] is None]
    by_threshold = sorted(threshold_rows(found["generation"], block), key=lambda row: row["confidence_threshold"])
    by_size = sorted((row for row in rows if row["block_size"] != block), key=lambda row: row["block_size"])
    by_steps = [row for row in rows if row["block_size"] == block != row["steps_per_block"]]
    by_steps.sort(key=lambda row: row["steps_per_block"])
    # With all combinations, neighbours in the last two lists differ in more than one setting.
    joined = not found["settings"]["every"]
    families: list[tuple[str, Sequence[dict[str, Any]], Callable[[dict[str, Any]], str], bool]] = [
        (f"threshold, S = {block}", by_threshold, lambda row: f"{row['confidence_threshold']:g}", True),
        ("other block sizes", by_size, lambda row: f"S {row['block_size']}", joined),
        ("fewer steps", by_steps, lambda row: f"{row['steps_per_block']} steps", joined),
    ]
    drawn = [
        plots.Family(name, [(label(row), row) for row in members], is_joined)
        for name, members, label, is_joined in families
        if members
    ]
    return plots.pareto(drawn, found["ar_generation"], pareto_front(rows, "agreement"), theme=plots.LIGHT)


def samplers_plot(found: Mapping[str, Any]) -> bytes | None:
    """A PNG of agreement with AR against tokens per pass, a curve for each sampler, if any."""
    if "samplers" not in found:
        return None
    curves = {
        curve["name"]: [
            (each["tokens_per_pass"], each["agreement"], each["agreement_stderr"]) for each in curve["points"]
        ]
        for curve in found["samplers"]["curves"]
    }
    base = found["samplers"]["base"]
    return plots.samplers(curves, (base["tokens_per_pass"], base["agreement"]), theme=plots.LIGHT)


# Written next to the JSON file as NAME-positions.png and so on, if there is something to draw.
PLOTS: dict[str, Callable[[Mapping[str, Any]], bytes | None]] = {
    "positions": positions_plot,
    "pareto": pareto_plot,
    "samplers": samplers_plot,
}
