"""The summary of a run: tables on the console, which the page repeats."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_twotower.common.tables import number, plain_table, with_error
from megatron_twotower.report import denoisers
from megatron_twotower.report.findings import Findings

HEADINGS = ("figure", "value", "against")


def summary_rows(findings: Findings) -> Iterator[tuple[str, str, str]]:
    """Yields what was measured, its value, and the value to compare it with."""
    evaluation, ar, towers = findings.evaluation, findings.ar.validation, findings.twotower.validation
    first, last = towers[0], towers[-1]
    yield "AR from random weights", number(ar[-1]["loss"]), f"{number(ar[0]['loss'])} at step {ar[0]['step']}"
    yield "AR, context tower, nats/token", number(evaluation["ar_loss"]), ""
    yield "AR, context tower, nats/byte", number(evaluation["ar_loss_per_byte"], 3), ""
    bound = with_error(evaluation["diffusion_bound"], evaluation["diffusion_bound_stderr"])
    yield "diffusion bound, nats/token", bound, f"AR {number(evaluation['ar_loss_on_bound_tokens'])}, same tokens"
    yield "masked loss, nats/token", number(last["loss"]), f"{number(first['loss'])} at step {first['step']}"
    for bucket, loss in last["loss_by_noise"].items():
        start = first["loss_by_noise"].get(bucket)
        yield f"masked loss, noise {bucket}", number(loss), f"{number(start)} at step {first['step']}"
    for row in findings.sweep:
        label = f"tokens/pass, threshold {row['confidence_threshold']:g}"
        yield label, number(row["tokens_per_pass"]), f"{number(row['speedup'])} x AR speed"


def print_summary(findings: Findings, console: Console | None = None) -> None:
    """Print the summary as one table, and a second one beside a longer trained pair."""
    table = Table(title=f"{findings.name}: held-out text", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right", overflow="fold")
    for row in summary_rows(findings):
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    if compared := list(denoisers.rows(findings)):
        console.print(plain_table(denoisers.TITLE, denoisers.HEADINGS, compared, left=1))
