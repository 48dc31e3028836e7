"""The denoiser of a run beside one that was trained for longer, on the same text.

Both were measured by `twotower evaluate` with the same settings, so the same windows, masks and
prompts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_twotower.common.tables import number, with_error
from megatron_twotower.report.findings import Findings

TITLE = "the same context tower, the same text: this denoiser, and one that was trained for longer"
OWN, LONGER, AR = "this run", "longer trained", "AR"
HEADINGS = ("figure", AR, OWN, LONGER)
# Thresholds that have rows, of those that both were measured at.
THRESHOLDS = (0.9, 0.8, 0.6, 0.5)


def evaluations(findings: Findings) -> dict[str, Mapping[str, Any]]:
    """The evaluations that are compared, by name; empty without that of a longer trained pair."""
    return {OWN: findings.evaluation, LONGER: findings.longer} if findings.longer else {}


def rows(findings: Findings) -> Iterator[tuple[str, str, str, str]]:
    """Yields what was measured, and its value for AR and for each denoiser.

    AR is that of this run's context tower. Tokens that AR would choose are in percent.
    """
    compared = list(evaluations(findings).values())
    if not compared:
        return
    own = compared[0]
    bounds = [with_error(each["diffusion_bound"], each["diffusion_bound_stderr"]) for each in compared]
    yield ("nats/token, same tokens; the bound", number(own["ar_loss_on_bound_tokens"]), bounds[0], bounds[1])
    for level in own["masked_loss_by_noise"][::3]:
        losses = [_at(each["masked_loss_by_noise"], "t", level["t"]) for each in compared]
        if all(losses):
            yield (f"masked loss at t = {level['t']:g}", "", *_cells(losses, "loss"))
    for threshold in THRESHOLDS:
        found = [_at(each["sweep"], "confidence_threshold", threshold) for each in compared]
        if all(found):
            yield (f"tokens/pass, threshold {threshold:g}", "1", *_cells(found, "tokens_per_pass"))
            yield ("… speed, x AR", "1", *_cells(found, "speedup"))
            yield ("… as AR would choose, %", "100", *_cells(found, "agreement", factor=100, digits=1))


def _at(items: list[dict[str, Any]], key: str, value: float) -> dict[str, Any]:
    """The item whose `key` has a value; empty if there is none."""
    return next((item for item in items if item[key] == value), {})


def _cells(items: list[dict[str, Any]], key: str, *, factor: float = 1, digits: int = 2) -> tuple[str, str]:
    values = (item.get(key) for item in items)
    first, second = (number(None if value is None else factor * value, digits) for value in values)
    return first, second
