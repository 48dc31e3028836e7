"""Where the figures of a run go: the console, `metrics.jsonl` and Weights & Biases.

A record is a mapping with `kind` and `step`. The first rank writes it to every sink; the other
ranks write nothing.

Kind `train`, of the steps since the last record:

    step, seconds      at the record: optimizer steps done, and the time since the process started
    loss               nats per scored token; null if no step was finite, left out if nothing was
                       scored
    loss_by_noise      {"0.0-0.2": nats, ...}; empty for the objective `ar`
    learning_rate, grad_norm    of the last step
    tokens             consumed since the start of the run
    tokens_per_second, scored_tokens
    expert_load        {"max_over_mean": ratio}; empty without experts
    memory_gib         largest memory so far, of the first rank
    phase              its name; in a run with phases
    tokens_by_corpus   {name: tokens since the start of the run}; with a blend
    skipped_sequences  in damaged shards; with data.damaged_shards=skip
    nonfinite_steps    skipped steps; if there were any
    unscored_steps     steps without a masked token, which were skipped; if there were any

Kind `validation`:

    step
    loss               nats per scored token; left out if nothing was scored
    loss_by_noise      see above
    tokens             scored tokens
    expert_load_by_noise    {"0.0-0.2": ratio, ...}, the tokens of the busiest expert over the mean
                            of its layer, in the layer where it is largest; without experts left out
    rank_load_by_noise      the same of expert-parallel ranks; with parallel.expert above 1

Kind `checkpoint`:

    step               at which the checkpoint was finished
    saved_step         the step of the state in the checkpoint
    gib                its size
    stall_seconds      how long training waited for it
    write_seconds      how long the slowest rank wrote, during training
"""

import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import METRICS_FILE, read_metrics
from megatron_twotower.config.schema import LoggingConfig
from megatron_twotower.config.setting import accepts

WANDB_ID_FILE = "wandb_run_id"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class WandbSettings:
    """Settings of Weights & Biases.

    Attributes:
        mode: `offline`, `online` or `disabled`.
        project: The project of the run.
        name: Name of the run in the interface; None: W&B chooses one.
    """

    mode: str = "offline"
    project: str = "megatron-twotower"
    name: str | None = None


def wandb_settings(logging: LoggingConfig, environment: Mapping[str, str]) -> WandbSettings:
    """Return the settings of W&B: those of its own variables that are set, else those of the run.

    Raises:
        UserError: WANDB_MODE is not one of those of `logging.wandb`.
    """
    mode = environment.get("WANDB_MODE") or logging.wandb
    accepts(LoggingConfig, "wandb").check("WANDB_MODE", mode)
    return WandbSettings(
        mode, environment.get("WANDB_PROJECT") or logging.project, environment.get("WANDB_NAME") or logging.name
    )


class Sink(Protocol):
    """One place where records go."""

    def log(self, record: Record) -> None:
        """Write one record."""

    def step_done(self, step: int) -> None:
        """Show that `step` is done."""


class Metrics:
    """Passes every record to each sink. A context manager; `open_metrics` makes it."""

    def __init__(self, sinks: Sequence[Sink], resources: ExitStack) -> None:
        self._sinks = tuple(sinks)
        self._resources = resources

    def log(self, record: Record) -> None:
        """Write one record to every sink."""
        for sink in self._sinks:
            sink.log(record)

    def step_done(self, step: int) -> None:
        """Move the progress bar to `step`, without a record."""
        for sink in self._sinks:
            sink.step_done(step)

    def close(self) -> None:
        """Close all sinks."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, traceback)


def open_metrics(
    output: Path, *, total_steps: int, resume_step: int, console: bool, wandb: WandbSettings, config: dict[str, Any]
) -> Metrics:
    """Open the sinks of a run; on ranks other than the first, none.

    Args:
        output: The run folder.
        total_steps: The number of steps of the run.
        resume_step: The step that the run resumes from, 0 for a fresh run. Later records in
            `metrics.jsonl` are of a run that was cut off. They are removed, so that no step has two
            records.
        console: Whether to print a table.
        wandb: Settings of Weights & Biases.
        config: The resolved configuration, for W&B.

    Raises:
        UserError: `metrics.jsonl` cannot be read, or W&B is not installed or does not start.
    """
    with ExitStack() as resources:
        if not _first_rank():
            return Metrics((), resources.pop_all())
        output.mkdir(parents=True, exist_ok=True)
        sinks: list[Sink] = [_open_jsonl(output / METRICS_FILE, resume_step=resume_step, resources=resources)]
        if wandb.mode != "disabled":
            sinks.append(
                _open_wandb(output, settings=wandb, config=config, resume_step=resume_step, resources=resources)
            )
        if console:
            sinks.append(
                _open_console(output.name, total_steps=total_steps, resume_step=resume_step, resources=resources)
            )
        return Metrics(sinks, resources.pop_all())


def _first_rank() -> bool:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def peak_memory_gib() -> float:
    """Return the peak memory in GiB: of torch on the CUDA device, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: a process inherits ru_maxrss from its parent.
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _finite(value: Any) -> Any:
    """Return a value in plain JSON types, with null for figures that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


# --- metrics.jsonl ---


@dataclass(frozen=True)
class _JsonlSink:
    """Writes a line for every record.

    A figure that is not finite becomes null, so that every line is plain JSON.
    """

    write: Callable[[str], Any]

    def log(self, record: Record) -> None:
        self.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def step_done(self, step: int) -> None:
        pass


def _open_jsonl(path: Path, *, resume_step: int, resources: ExitStack) -> _JsonlSink:
    kept = [] if resume_step == 0 or not path.exists() else read_metrics(path)
    kept = [record for record in kept if record["step"] <= resume_step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)
    # Line buffering: each record is in the file once it is logged.
    return _JsonlSink(resources.enter_context(path.open("a", buffering=1)).write)


# --- Weights & Biases ---


def _flatten(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}/{key}")
        else:
            yield f"{prefix}/{key}", value


@dataclass(frozen=True)
class _WandbSink:
    """Passes every record to W&B, with keys such as `train/loss_by_noise/0.0-0.2`."""

    write: Callable[..., Any]

    def log(self, record: Record) -> None:
        figures = {key: value for key, value in record.items() if key not in ("kind", "step")}
        self.write(dict(_flatten(figures, record["kind"])), step=record["step"])

    def step_done(self, step: int) -> None:
        pass


def _open_wandb(
    output: Path, *, settings: WandbSettings, config: dict[str, Any], resume_step: int, resources: ExitStack
) -> _WandbSink:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"logging.wandb or WANDB_MODE: found {settings.mode!r}, but wandb is not installed; "
            "expected `pip install wandb` or logging.wandb=disabled"
        ) from error
    # A resumed run keeps its id, so that W&B joins the parts.
    id_file = output / WANDB_ID_FILE
    identity = id_file.read_text().strip() if resume_step and id_file.is_file() else secrets.token_hex(4)
    try:
        run = wandb.init(
            dir=output,
            id=identity,
            mode=cast(Any, settings.mode),
            project=settings.project,
            name=settings.name,
            config=config,
            resume="allow" if settings.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise UserError(
            f"logging.wandb or WANDB_MODE: found {settings.mode!r}, but W&B did not start: {error}"
        ) from error
    id_file.write_text(identity + "\n")

    def finish(kind: type[BaseException] | None, *_: Any) -> None:
        run.finish(exit_code=0 if kind is None else 1)

    resources.push(finish)
    return _WandbSink(run.log)


# --- Console ---


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# Heading, path within a train record, width, and how a value is written. A row has less than 80
# columns with the time left.
_COLUMNS: tuple[tuple[str, tuple[str, ...], int, Callable[[Any], str]], ...] = (
    ("step", ("step",), 7, str),
    ("loss", ("loss",), 9, "{:.4f}".format),
    ("lr", ("learning_rate",), 10, "{:.2e}".format),
    ("grad", ("grad_norm",), 8, "{:.2f}".format),
    ("tokens/s", ("tokens_per_second",), 10, "{:,.0f}".format),
    ("load", ("expert_load", "max_over_mean"), 6, "{:.2f}".format),
    ("GiB", ("memory_gib",), 6, "{:.2f}".format),
    ("elapsed", ("seconds",), 9, _seconds),
)
_HEADER = "".join(f"{heading:>{width}}" for heading, _, width, _ in _COLUMNS)


def _cell(record: Record, path: tuple[str, ...], write: Callable[[Any], str]) -> str:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return "-"
    return write(value) if math.isfinite(value) else "nan"


def train_row(record: Record) -> str:
    """Return the row of a train record in the table."""
    return "".join(f"{_cell(record, path, write):>{width}}" for _, path, width, write in _COLUMNS)


def validation_row(record: Record) -> str:
    """Return the row of a validation: the loss, and that of each noise bucket by its upper end."""
    by_noise = record.get("loss_by_noise") or {}
    buckets = [f"t≤{name.split('-')[-1]} {_cell(by_noise, (name,), '{:.2f}'.format)}" for name in by_noise]
    loss = _cell(record, ("loss",), "{:.4f}".format)
    return "  ".join([f"{record['step']:>7}{loss:>9}", "validation", *buckets])


class _ConsoleSink:
    """Prints a table row for every record, and the time left.

    The time left is in a live bar, or in the row without a terminal.
    """

    def __init__(self, console: Console, progress: Progress | None, *, total_steps: int, resume_step: int) -> None:
        self._console, self._progress = console, progress
        self._total, self._first = total_steps, resume_step
        self._start: float | None = None
        self._loss = self._speed = "-"
        self._task = None
        if progress is not None:
            self._task = progress.add_task("", total=total_steps, completed=resume_step, loss="-", speed="-", left="-")
        header = _HEADER if progress is not None else f"{_HEADER}{'left':>9}"
        console.print(header, style="bold", highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        """Estimate the time left from the steps after the first one, which is slower."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._first = now, step
        done = step - self._first
        return _seconds((now - self._start) / done * (self._total - step)) if done > 0 else "-"

    def step_done(self, step: int) -> None:
        left = self._left(step)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, loss=self._loss, speed=self._speed, left=left)

    def log(self, record: Record) -> None:
        if record["kind"] == "validation":
            self._console.print(validation_row(record), style="green", highlight=False, soft_wrap=True)
        if record["kind"] != "train":
            return
        self._loss = _cell(record, ("loss",), "{:.4f}".format)
        self._speed = _cell(record, ("tokens_per_second",), "{:,.0f}".format)
        left = "" if self._progress is not None else f"{self._left(record['step']):>9}"
        self._console.print(train_row(record) + left, highlight=False, soft_wrap=True)
        self.step_done(record["step"])


def _open_console(title: str, *, total_steps: int, resume_step: int, resources: ExitStack) -> _ConsoleSink:
    console = Console()
    progress = None
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn(f"[bold]{title}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[left]} left"),
        )
        progress = resources.enter_context(Progress(*columns, console=console, expand=True))
    return _ConsoleSink(console, progress, total_steps=total_steps, resume_step=resume_step)
