"""The command `bench soak`: interrupt a small training repeatedly and account for every sample.

A run of the tiny recipe starts on a random number of ranks and is ended after a random step in a
random way, sometimes in the middle of a save, until the time is over. Its ledger
(`train/ledger.py`) is then compared with the samples that were due, and its losses with those of a
run without interruptions.
"""

import functools
import json
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_twotower.bench import ranks
from megatron_twotower.bench.results import report
from megatron_twotower.checkpoint import files
from megatron_twotower.common.errors import STOPPED_EARLY, UserError
from megatron_twotower.common.machine import machine
from megatron_twotower.common.run_folder import CHECKPOINTS_FOLDER, LEDGER_FOLDER, METRICS_FILE
from megatron_twotower.common.tables import plain_table
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import hf_folder, initial_weights, model_card
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.sources import open_training
from megatron_twotower.data.tokenizer import train_tokenizer
from megatron_twotower.model import parameter_map
from megatron_twotower.train import ledger

# The rate is constant, because the schedule must not depend on the end of the run. The rate is low
# and the epsilon large, so that the rounding differences between layouts do not grow.
OVERRIDES = (
    "schedule.kind=constant",
    "optimizer.learning_rate=1e-4",
    "optimizer.epsilon=1e-5",
    "train.validate_every_steps=0",
    "train.ledger=true",
)
PATIENCE_SECONDS = 600.0


# --- interruptions ---


def _kill_one(job: ranks.Job, rng: random.Random) -> None:
    job.signal(signal.SIGKILL, rank=rng.randrange(len(job.processes)))
    # The other ranks notice at their next communication. A launcher ends them soon after.
    job.wait(rng.uniform(0, 2))
    job.kill()


def _kill_all(job: ranks.Job, _: random.Random) -> None:
    job.kill()


def _ask_to_stop(number: int) -> Callable[[ranks.Job, random.Random], None]:
    def ask(job: ranks.Job, rng: random.Random) -> None:
        job.signal(number, rank=rng.randrange(len(job.processes)))

    return ask


@dataclass(frozen=True)
class Interruption:
    """One way to end a job.

    Attributes:
        apply: Ends the job.
        saving: Apply it in the middle of a save.
        asked: The job saves its state and ends by itself.
    """

    apply: Callable[[ranks.Job, random.Random], None]
    saving: bool = False
    asked: bool = False


INTERRUPTIONS = {
    "SIGKILL, one rank": Interruption(_kill_one),
    "SIGKILL, all ranks": Interruption(_kill_all),
    "SIGKILL, one rank, while saving": Interruption(_kill_one, saving=True),
    "SIGKILL, all ranks, while saving": Interruption(_kill_all, saving=True),
    "SIGTERM": Interruption(_ask_to_stop(signal.SIGTERM), asked=True),
    "SIGUSR1": Interruption(_ask_to_stop(signal.SIGUSR1), asked=True),
}


@dataclass(frozen=True)
class SoakResult:
    """The result of a soak.

    Attributes:
        minutes: How long the run was interrupted.
        ranks: Numbers of ranks that a start may use.
        kills: The number of interruptions, by name.
        resumes: Starts that resumed from a checkpoint.
        steps: Steps, each counted once.
        steps_lost: Steps that were taken again after an interruption.
        samples_repeated: Samples that were consumed more than once in an epoch.
        samples_skipped: Samples that were due and not consumed.
        checkpoints: Finished checkpoints.
        stall_seconds: Median over checkpoints of the time that training waits.
        write_seconds: Median over checkpoints of the time to write.
        largest_difference: The largest relative difference of a loss from the uninterrupted run's.
        unexpected: Jobs that did not end as intended, with what they printed.
    """

    minutes: float
    ranks: Sequence[int]
    kills: dict[str, int]
    resumes: int
    steps: int
    steps_lost: int
    samples_repeated: int
    samples_skipped: int
    checkpoints: int
    stall_seconds: float
    write_seconds: float
    largest_difference: float
    unexpected: Sequence[str]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong.

        On one number of ranks all losses must be equal bit for bit, else up to rounding.
        """
        wrong = self.samples_repeated or self.samples_skipped or self.unexpected
        return not wrong and self.largest_difference <= (1e-4 if len(set(self.ranks)) > 1 else 0)


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a corpus of generated text and a random backbone of the tiny shape.

    Returns:
        The data folder and the backbone folder.
    """
    rng, words = random.Random(0), ("alpha", "beta", "gamma", "delta", "count", "value", "index", "result")
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        lines = (f"{a} = {b} + {rng.randrange(100)}" for a, b in (rng.choices(words, k=2) for _ in range(80)))
        (texts / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    model = load_recipe("tiny_ar").model
    if not (folder / "tokenizer").exists():
        contents = [path.read_text() for path in sorted(texts.iterdir())]
        train_tokenizer(contents, vocab_size=model.vocab_size, output=folder / "tokenizer")
        prepare([str(texts)], tokenizer=folder / "tokenizer", output=folder / "data", holdout_fraction=0.1)
        source, entries = initial_weights.random_backbone(model, seed=1), parameter_map.backbone_entries(model)
        hf_folder.write_folder(
            folder / "backbone",
            hf_folder.lazy_tensors(source, entries, model, dtype=torch.float32),
            config=model_card.backbone_config_json(model, dtype=torch.float32),
            files={},
            copies=[],
        )
    return folder / "data", folder / "backbone"


# --- the interrupted run ---


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The complete records of one kind of a run, which may be writing another one."""
    file = run / METRICS_FILE
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _has_reached(ledger_file: Path, written: int, step: int) -> bool:
    """Whether the newest start has taken a step, by its ledger.

    Args:
        ledger_file: The ledger of the first rank.
        written: Bytes that earlier starts wrote.
    """
    if not ledger_file.is_file():
        return False
    with ledger_file.open("rb") as stream:
        stream.seek(written)
        lines = stream.read().split(b"\n")[:-1]
    return any(json.loads(line)["step"] >= step for line in lines if line)


def _wait_for(condition: Callable[[], bool], job: ranks.Job) -> bool:
    """Wait for a condition while the job runs. Returns whether it became true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.running() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def interrupt_repeatedly(
    run: Path,
    arguments: Sequence[str],
    *,
    counts: Sequence[int],
    seed: int,
    finished: Callable[[int], bool],
    log: Callable[[str], Any] = lambda _: None,
) -> tuple[Counter[str], int, list[str]]:
    """Start a run and interrupt it, again and again.

    Args:
        run: The run folder.
        arguments: Of the command line.
        counts: Numbers of ranks. Each start takes one of them at random.
        seed: Of the random choices.
        finished: Called with the number of interruptions before each start; ends the loop.
        log: Called with a line of text at each start.

    Returns:
        Interruptions by name, the number of starts that resumed from a checkpoint, and what went
        wrong. The loop ends early after four faults.
    """
    rng, kills, resumes, unexpected = random.Random(seed), Counter[str](), 0, []
    while not finished(kills.total()):
        checkpoints = files.find_checkpoints(run)
        first = _step_of(checkpoints[-1]) if checkpoints else 0
        resumes += bool(checkpoints)
        name = rng.choice(list(INTERRUPTIONS))
        interruption, goal = INTERRUPTIONS[name], first + rng.randint(1, 12)
        ledger_file = run / LEDGER_FOLDER / "rank-00000.jsonl"
        written = ledger_file.stat().st_size if ledger_file.is_file() else 0
        job = ranks.start(rng.choice(counts), arguments, logs=run.parent / "logs")
        log(f"start {kills.total() + 1}, from step {first}, {len(job.processes)} ranks: {name} after step {goal}")
        try:
            # The interruption comes at any point of the step that is then running.
            reached = _wait_for(functools.partial(_has_reached, ledger_file, written, goal), job)
            if reached and interruption.saving:
                reached = _wait_for(lambda: any((run / CHECKPOINTS_FOLDER).glob("*.partial")), job)
            if not reached:
                unexpected.append(f"ended before the interruption, with {job.wait(0)}: {job.output()[-500:]}")
                continue
            time.sleep(rng.uniform(0, 0.03))
            interruption.apply(job, rng)
            status = job.wait(PATIENCE_SECONDS)
            if interruption.asked and set(status) != {STOPPED_EARLY}:
                unexpected.append(f"{name}: ended with {status}: {job.output()[-500:]}")
            kills[name] += 1
        finally:
            job.kill()
        if len(unexpected) > 3:
            break
    return kills, resumes, unexpected


def audit(
    run: Path,
    reference: Path,
    arguments: Sequence[str],
    *,
    kills: Counter[str],
    resumes: int,
    unexpected: Sequence[str],
    minutes: float,
    counts: Sequence[int],
) -> SoakResult:
    """Compare the ledger of a run with the samples that were due, and its losses.

    Args:
        reference: The folder of the uninterrupted run, whose losses are expected.
        arguments: Those of the run.
    """
    state = files.read_state(files.find_checkpoints(run)[-1])
    config = load_recipe("tiny", [item for item in arguments if "=" in item and not item.startswith("recipe=")])
    due = open_training(config).batch(np.arange(state.cursor, dtype=np.int64))
    pairs = zip(due.epochs.tolist(), due.samples.tolist(), strict=True)
    consumed = ledger.audit(run, pairs, last_step=state.step)
    losses, expected = ({r["step"]: r["loss"] for r in _records(each, "train")} for each in (run, reference))
    missing = [step for step in range(1, state.step + 1) if step not in losses or step not in expected]
    differences = [abs(losses[step] / expected[step] - 1) for step in expected if step in losses]
    saves = _records(run, "checkpoint")
    return SoakResult(
        minutes=minutes,
        ranks=counts,
        kills=dict(kills),
        resumes=resumes,
        steps=consumed.steps,
        steps_lost=consumed.lost_steps,
        samples_repeated=consumed.repeated,
        samples_skipped=consumed.skipped,
        checkpoints=len(saves),
        stall_seconds=statistics.median(each["stall_seconds"] for each in saves) if saves else 0.0,
        write_seconds=statistics.median(each["write_seconds"] for each in saves) if saves else 0.0,
        largest_difference=max(differences, default=0.0),
        unexpected=[*unexpected, *(f"steps without a loss: {missing[:5]}" for _ in missing[:1])],
    )


# --- the command ---


def soak(
    output: Path,
    *,
    data: Path,
    backbone: Path,
    counts: Sequence[int],
    seed: int,
    finished: Callable[[int], bool],
    log: Callable[[str], Any] = lambda _: None,
) -> SoakResult:
    """Interrupt a run, and compare it with an uninterrupted run of as many steps.

    Args:
        output: The folder of both runs.
        data: A prepared data folder.
        backbone: A folder of a backbone.
        counts: See `interrupt_repeatedly`.
        seed: See `interrupt_repeatedly`.
        finished: See `interrupt_repeatedly`.
        log: See `interrupt_repeatedly`.

    Raises:
        UserError: No checkpoint was ever finished.
    """
    started, run, reference = time.monotonic(), output / "run", output / "reference"
    base = ["train", "recipe=tiny", f"data.folder={data}", f"init.backbone={backbone}", *OVERRIDES]
    arguments = [*base, f"output={run}", "train.steps=1000000", "train.checkpoint_every_steps=4"]
    kills, resumes, unexpected = interrupt_repeatedly(
        run, arguments, counts=counts, seed=seed, finished=finished, log=log
    )
    minutes = (time.monotonic() - started) / 60
    checkpoints = files.find_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run}: no checkpoint found, expected a longer soak ({'; '.join(unexpected) or 'no faults'})")
    # The last start takes the steps after the newest checkpoint again, and stops there.
    last = max([_step_of(checkpoints[-1]) + 1, *(record["step"] for record in _records(run, "train"))])
    log(f"to step {last}, and the same without interruption")
    for folder in (run, reference):
        job = ranks.start(counts[0], [*base, f"output={folder}", f"train.steps={last}"], logs=output / "logs")
        try:
            status = job.wait(PATIENCE_SECONDS * 6)
            if set(status) != {0}:
                unexpected.append(f"{folder.name}: ended with {status}: {job.output()[-500:]}")
        finally:
            job.kill()
    return audit(
        run,
        reference,
        arguments,
        kills=kills,
        resumes=resumes + 1,
        unexpected=unexpected,
        minutes=minutes,
        counts=counts,
    )


def run(
    output: Path, *, minutes: float, counts: Sequence[int] = (2,), seed: int = 0, console: Console | None = None
) -> bool:
    """Soak for `minutes`, print the result, and write it to `soak.json` in `output`.

    Args:
        counts: Numbers of ranks. Each start takes one of them at random.
        seed: Of the interruptions.

    Returns:
        Whether nothing is wrong, see `SoakResult.clean`.

    Raises:
        UserError: `output` contains a soak.
    """
    console = console or Console()
    if (output / "run").exists() or (output / "reference").exists():
        raise UserError(f"{output}: contains a run, expected a folder for a new one")
    data, backbone = write_inputs(output)
    end = time.monotonic() + 60 * minutes
    result = soak(
        output,
        data=data,
        backbone=backbone,
        counts=counts,
        seed=seed,
        finished=lambda _: time.monotonic() > end,
        log=lambda text: console.print(text, highlight=False),
    )
    results = {"machine": machine(), "clean": result.clean} | result.__dict__
    notes = [f"not as expected: {text}" for text in result.unexpected]
    report(output, "soak", results, tables=[soak_table(result)], notes=notes, console=console)
    return result.clean


def soak_table(result: SoakResult) -> Table:
    """The result as a table."""
    values = {
        "kills and stops": sum(result.kills.values()),
        **{f"  {name}": count for name, count in result.kills.items()},
        "resumes": result.resumes,
        "steps": result.steps,
        "steps lost, taken again": result.steps_lost,
        "samples repeated": result.samples_repeated,
        "samples skipped": result.samples_skipped,
        "largest difference of a loss": f"{result.largest_difference:.1e}",
        "checkpoint: training waits": f"{1000 * result.stall_seconds:.0f} ms",
        "checkpoint: writing in the background": f"{1000 * result.write_seconds:.0f} ms",
    }
    title = f"{result.minutes:.1f} minutes on {' or '.join(map(str, result.ranks))} ranks"
    return plain_table(title, ("", ""), [(name, str(value)) for name, value in values.items()], left=1)
