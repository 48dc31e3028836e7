"""A small training that is killed again and again, and an account of it: nothing lost, nothing read twice.

A run of the tiny recipe is started on a random number of ranks, and ended at a random step in a
random way, some of them in the middle of a save, until the time is over. The books of what every
step consumed (`ledger.py`) are compared with what was due, and the losses with those of a run that
nothing interrupted.
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

from megatron_twotower.bench import measure, ranks
from megatron_twotower.checkpoint import files
from megatron_twotower.common import machine
from megatron_twotower.common.errors import STOPPED_EARLY, UserError
from megatron_twotower.common.run_folder import CHECKPOINTS_FOLDER, LEDGER_FOLDER, METRICS_FILE
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import hf_folder, initial_weights, model_card
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.sources import open_training
from megatron_twotower.data.tokenizer import train_tokenizer
from megatron_twotower.model import parameter_map
from megatron_twotower.train import ledger

# A constant rate: the schedule must not know when the run will end. A low one, and an epsilon that
# is not: rounding, which differs between layouts, is not to grow.
OVERRIDES = (
    "schedule.kind=constant",
    "optimizer.learning_rate=1e-4",
    "optimizer.epsilon=1e-5",
    "train.validate_every_steps=0",
    "train.ledger=true",
)
PATIENCE_SECONDS = 600.0


def _kill_one(job: ranks.Job, draw: random.Random) -> None:
    job.signal(signal.SIGKILL, rank=draw.randrange(len(job.processes)))
    # The others find out when they next wait for it; a launcher would not let them wait long.
    job.wait(draw.uniform(0, 2))
    job.kill()


def _kill_all(job: ranks.Job, _: random.Random) -> None:
    job.kill()


def _ask(number: int) -> Callable[[ranks.Job, random.Random], None]:
    def ask(job: ranks.Job, draw: random.Random) -> None:
        job.signal(number, rank=draw.randrange(len(job.processes)))

    return ask


@dataclass(frozen=True)
class Ending:
    """One way to end a job. saving: in the middle of a save. asked: the job saves its state and ends by itself."""

    apply: Callable[[ranks.Job, random.Random], None]
    saving: bool = False
    asked: bool = False


ENDINGS = {
    "SIGKILL, one rank": Ending(_kill_one),
    "SIGKILL, all ranks": Ending(_kill_all),
    "SIGKILL, one rank, while saving": Ending(_kill_one, saving=True),
    "SIGKILL, all ranks, while saving": Ending(_kill_all, saving=True),
    "SIGTERM": Ending(_ask(signal.SIGTERM), asked=True),
    "SIGUSR1": Ending(_ask(signal.SIGUSR1), asked=True),
}


@dataclass(frozen=True)
class Account:
    """What came of a soak.

    kills: by ending. resumes: starts that went on from a checkpoint. unexpected: jobs that ended in
    another way than they were made to, with what they printed. largest_difference: of a loss from
    the uninterrupted run's, relative.
    stall_seconds, write_seconds: medians over checkpoints, as `metrics.py` records them.
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
        """Whether all is as it should be: on one number of ranks to the last bit, else as near as rounding allows."""
        wrong = self.samples_repeated or self.samples_skipped or self.unexpected
        return not wrong and self.largest_difference <= (1e-4 if len(set(self.ranks)) > 1 else 0)


def material(folder: Path) -> tuple[Path, Path]:
    """A corpus of generated text and a random backbone of the tiny shape: (data folder, backbone folder)."""
    draw, words = random.Random(0), ("alpha", "beta", "gamma", "delta", "count", "value", "index", "result")
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        lines = (f"{a} = {b} + {draw.randrange(100)}" for a, b in (draw.choices(words, k=2) for _ in range(80)))
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


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a run that may be writing one."""
    file = run / METRICS_FILE
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _has_come_to(book: Path, written: int, step: int) -> bool:
    """Whether a start has taken a step: by the first rank's ledger, of which it did not write the first bytes."""
    if not book.is_file():
        return False
    with book.open("rb") as stream:
        stream.seek(written)
        lines = stream.read().split(b"\n")[:-1]
    return any(json.loads(line)["step"] >= step for line in lines if line)


def _wait(job: ranks.Job, condition: Callable[[], bool]) -> bool:
    """Whether the condition came while the job ran."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.running() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def torment(
    run: Path,
    arguments: Sequence[str],
    *,
    counts: Sequence[int],
    seed: int,
    over: Callable[[int], bool],
    tell: Callable[[str], Any] = lambda _: None,
) -> tuple[Counter[str], int, list[str]]:
    """Start, end, and start again, until `over(number of endings)`; the last time it is asked to stop.

    Returns:
        endings by kind, starts that went on from a checkpoint, and what was not as it should be.
    """
    draw, kills, resumes, unexpected = random.Random(seed), Counter[str](), 0, []
    while not over(kills.total()):
        found = files.find_checkpoints(run)
        first = int(found[-1].name.removeprefix("step-")) if found else 0
        resumes += bool(found)
        name = draw.choice(list(ENDINGS))
        ending, goal = ENDINGS[name], first + draw.randint(1, 12)
        book = run / LEDGER_FOLDER / "rank-00000.jsonl"
        written = book.stat().st_size if book.is_file() else 0
        job = ranks.start(draw.choice(counts), arguments, logs=run.parent / "logs")
        tell(f"start {kills.total() + 1}, from step {first}, {len(job.processes)} ranks: {name} after step {goal}")
        try:
            # At whatever point of the step that comes then.
            reached = _wait(job, functools.partial(_has_come_to, book, written, goal))
            if reached and ending.saving:
                reached = _wait(job, lambda: any((run / CHECKPOINTS_FOLDER).glob("*.partial")))
            if not reached:
                unexpected.append(f"ended before it was made to, with {job.wait(0)}: {job.output()[-500:]}")
                continue
            time.sleep(draw.uniform(0, 0.03))
            ending.apply(job, draw)
            status = job.wait(PATIENCE_SECONDS)
            if ending.asked and set(status) != {STOPPED_EARLY}:
                unexpected.append(f"{name}: ended with {status}: {job.output()[-500:]}")
            kills[name] += 1
        finally:
            job.kill()
        if len(unexpected) > 3:
            break
    return kills, resumes, unexpected


def account(
    run: Path,
    reference: Path,
    arguments: Sequence[str],
    *,
    kills: Counter[str],
    resumes: int,
    unexpected: Sequence[str],
    minutes: float,
    counts: Sequence[int],
) -> Account:
    """Compare the books and the losses of a run with what was due and with the uninterrupted run."""
    state = files.read_state(files.find_checkpoints(run)[-1])
    config = load_recipe("tiny", [item for item in arguments if "=" in item and not item.startswith("recipe=")])
    due = open_training(config).batch(np.arange(state.cursor, dtype=np.int64))
    pairs = zip(due.epochs.tolist(), due.samples.tolist(), strict=True)
    books = ledger.audit(run, pairs, last_step=state.step)
    found, expected = ({r["step"]: r["loss"] for r in _records(each, "train")} for each in (run, reference))
    missing = [step for step in range(1, state.step + 1) if step not in found or step not in expected]
    differences = [abs(found[step] / expected[step] - 1) for step in expected if step in found]
    saves = _records(run, "checkpoint")
    return Account(
        minutes=minutes,
        ranks=counts,
        kills=dict(kills),
        resumes=resumes,
        steps=books.steps,
        steps_lost=books.lost_steps,
        samples_repeated=books.repeated,
        samples_skipped=books.skipped,
        checkpoints=len(saves),
        stall_seconds=statistics.median(each["stall_seconds"] for each in saves) if saves else 0.0,
        write_seconds=statistics.median(each["write_seconds"] for each in saves) if saves else 0.0,
        largest_difference=max(differences, default=0.0),
        unexpected=[*unexpected, *(f"steps without a loss: {missing[:5]}" for _ in missing[:1])],
    )


def soak(
    output: Path,
    *,
    data: Path,
    backbone: Path,
    counts: Sequence[int],
    seed: int,
    over: Callable[[int], bool],
    tell: Callable[[str], Any] = lambda _: None,
) -> Account:
    """Torment a run in `output`, let another one go through uninterrupted, and compare.

    Raises:
        UserError: no checkpoint was ever finished.
    """
    started, run, reference = time.monotonic(), output / "run", output / "reference"
    base = ["train", "recipe=tiny", f"data.folder={data}", f"init.backbone={backbone}", *OVERRIDES]
    arguments = [*base, f"output={run}", "train.steps=1000000", "train.checkpoint_every_steps=4"]
    kills, resumes, unexpected = torment(run, arguments, counts=counts, seed=seed, over=over, tell=tell)
    minutes = (time.monotonic() - started) / 60
    found = files.find_checkpoints(run)
    if not found:
        raise UserError(f"{run}: no checkpoint found, expected a longer soak ({'; '.join(unexpected) or 'no faults'})")
    # What was taken after the newest checkpoint is lost: the last start takes it again, and stops
    # there.
    last = max([int(found[-1].name.removeprefix("step-")) + 1, *(r["step"] for r in _records(run, "train"))])
    tell(f"to step {last}, and the same without interruption")
    for folder in (run, reference):
        job = ranks.start(counts[0], [*base, f"output={folder}", f"train.steps={last}"], logs=output / "logs")
        try:
            status = job.wait(PATIENCE_SECONDS * 6)
            if set(status) != {0}:
                unexpected.append(f"{folder.name}: ended with {status}: {job.output()[-500:]}")
        finally:
            job.kill()
    return account(
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
    """Soak for so many minutes, print the account, and write it to `soak.json`. Returns whether all is as it should be.

    Raises:
        UserError: `output` holds a soak.
    """
    console = console or Console()
    if (output / "run").exists() or (output / "reference").exists():
        raise UserError(f"{output}: holds a run, expected a folder for a new one")
    data, backbone = material(output)
    end = time.monotonic() + 60 * minutes
    found = soak(
        output,
        data=data,
        backbone=backbone,
        counts=counts,
        seed=seed,
        over=lambda _: time.monotonic() > end,
        tell=lambda text: console.print(text, highlight=False),
    )
    console.print(table(found))
    for text in found.unexpected:
        console.print(f"not as it should be: {text}", highlight=False, markup=False)
    facts = {"machine": machine.machine(), "clean": found.clean} | found.__dict__
    measure.write_files(output, "soak", facts, None)
    console.print(f"{output / 'soak.json'}", highlight=False)
    return found.clean


def table(found: Account) -> Table:
    made = Table(
        title=f"{found.minutes:.1f} minutes on {' or '.join(map(str, found.ranks))} ranks", title_justify="left"
    )
    made.add_column("")
    made.add_column("", justify="right")
    rows = {
        "kills and stops": sum(found.kills.values()),
        **{f"  {name}": count for name, count in found.kills.items()},
        "resumes": found.resumes,
        "steps": found.steps,
        "steps lost, taken again": found.steps_lost,
        "samples repeated": found.samples_repeated,
        "samples skipped": found.samples_skipped,
        "largest difference of a loss": f"{found.largest_difference:.1e}",
        "checkpoint: training waits": f"{1000 * found.stall_seconds:.0f} ms",
        "checkpoint: writing beside it": f"{1000 * found.write_seconds:.0f} ms",
    }
    for name, value in rows.items():
        made.add_row(name, str(value))
    return made
