"""Do the trainings of a study that are not done yet, and show what all of them reached."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from megatron_twotower.common import plots
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.files import write_file
from megatron_twotower.common.progress import BarReport, stage_bars
from megatron_twotower.common.run_folder import CONFIG_FILE
from megatron_twotower.common.tables import number, plain_table, wide_console, with_error
from megatron_twotower.config.recipes import load_recipe, to_yaml
from megatron_twotower.study import writing
from megatron_twotower.study.design import Study, Training, read_study, trainings
from megatron_twotower.study.figures import Mean, Row, mean, outcome, outcomes, rows, shares_to_reach_reference

RESULT_FILE, PICTURE_FILE, LOG_FILE = "study.json", "study.png", "training.log"


def _settings(recipe: str) -> list[str]:
    """The lines of a resolved recipe, without that of its folder, which may have been moved."""
    return [line for line in recipe.splitlines() if not line.startswith("output:")]


def _check_folder(training: Training) -> None:
    """Refuse a folder whose training had other settings: its figures are not of this study.

    Keys that an older version did not have count as their defaults.
    """
    file, wanted = training.folder / CONFIG_FILE, _settings(to_yaml(training.config))
    same = not file.is_file() or _settings(file.read_text()) == wanted
    require(
        same or _settings(to_yaml(load_recipe(str(file)))) == wanted,
        f"{training.folder}: found a training with other settings than the study has, expected the same or no folder",
    )


def _train(study: Study, training: Training, running: dict[Path, subprocess.Popen[bytes]]) -> None:
    """Train in a process of its own, which resumes what an earlier one left."""
    training.folder.mkdir(parents=True, exist_ok=True)
    words = [f"recipe={study.recipe}", *training.overrides]
    with open(training.folder / LOG_FILE, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_twotower", "train", *words], stdout=log, stderr=subprocess.STDOUT
        )
        running[training.folder] = process
        status = process.wait()
        del running[training.folder]
    lines = (training.folder / LOG_FILE).read_text(errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "nothing")
    require(status == 0, f"{training.folder}: a training ended with status {status}, it said: {said}")


def _train_all(study: Study, left: list[Training], *, done: int, workers: int, bars: BarReport) -> None:
    """Train, several at a time. The first failure stops the others, which save their state."""
    total, running = done + len(left), dict[Path, subprocess.Popen[bytes]]()
    stop = threading.Event()

    def one(training: Training) -> None:
        if not stop.is_set():
            _train(study, training, running)

    bars("training", done, total, left[0].folder.as_posix() if left else "")
    with ThreadPoolExecutor(workers) as pool:
        waiting: set[Future[None]] = {pool.submit(one, training) for training in left}
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                now = ", ".join("/".join(folder.parts[-3:]) for folder in list(running))
                bars("training", total - len(waiting), total, now)
        except BaseException:
            stop.set()
            for process in list(running.values()):
                process.terminate()
            raise


def _text(found: Mean | None, digits: int = 3) -> str:
    return "-" if found is None else with_error(found.value, found.error, digits)


def results_table(size: str, table: list[Row]) -> Table:
    """The arms of one size."""
    levels = list(table[0].by_noise) if table else []
    return plain_table(
        size,
        ("arm", "share", "FLOPs", "seeds", "masked loss", "from the reference", "bound", *levels),
        [
            (
                row.arm,
                f"{row.share:g}",
                number(row.flops),
                f"{row.loss.count}",
                _text(row.loss),
                _text(row.difference),
                _text(row.bound),
                *(number(row.by_noise[level].value) for level in levels),
            )
            for row in table
            if row.size == size
        ],
        left=1,
    )


def shares_table(reference: str, found: Mapping[str, Mapping[int, float | None]]) -> Table:
    """The share of the tokens that each arm (SIZE/ARM) needs for the loss of the reference."""
    lines = []
    for name, shares in found.items():
        reached = [share for share in shares.values() if share is not None]
        value = _text(mean(reached), 2) if len(reached) == len(shares) else "-"
        lines.append((*name.split("/"), f"{len(reached)} of {len(shares)}", value))
    return plain_table(
        f"Share of the tokens for the final loss of {reference}",
        ("size", "arm", "seeds that reach it", "share"),
        lines,
        left=2,
    )


def _speed_text(found: writing.Speed | None) -> str:
    return "-" if found is None else f"{'≥ ' * found.at_least}{_text(found.tokens_per_pass, 2)}"


def writing_table(found: Mapping[tuple[str, str, float], writing.Speeds]) -> Table:
    """Tokens per pass of the arms that have written, at equal agreement with AR."""
    return plain_table(
        "Tokens per pass at equal agreement with AR",
        ("size", "arm", "share", "seeds", *(f"{100 * agreement:g} %" for agreement in writing.AGREEMENTS)),
        [
            (size, arm, f"{share:g}", f"{seeds}", *(_speed_text(at[agreement]) for agreement in writing.AGREEMENTS))
            for (size, arm, share), (seeds, at) in found.items()
        ],
        left=2,
    )


def _write_all(trainings: list[Training]) -> None:
    """Let the denoisers that have not written yet write, one at a time."""
    done = [each for each in trainings if outcome(each) is not None and writing.can_write(each)]
    with stage_bars() as bars:
        for number, training in enumerate(done):
            bars("writing", number, len(done), training.folder.as_posix())
            if writing.measured(training) is None:
                writing.measure(training)
        bars("writing", len(done), len(done), "")


def run(
    file: Path,
    *,
    output: Path,
    workers: int = 1,
    sizes: list[str] | None = None,
    train: bool = True,
    generate: bool = False,
) -> None:
    """Do a study: its trainings that are not done, then tables, `study.json` and `study.png`.

    Args:
        file: The study, a YAML file of `recipes/studies`.
        output: The folder of all its trainings and results.
        workers: Trainings at a time.
        sizes: Only these sizes; all if left out.
        train: Whether to train; without it the tables show what is done.
        generate: Whether to let the denoisers write, to compare their tokens per pass.

    Raises:
        UserError: The study is wrong, a training failed, or a folder has a training with other
            settings.
    """
    study = read_study(file)
    for size in sizes or ():
        require(size in study.sizes, f"--sizes: found {size}, expected one of {', '.join(study.sizes)}")
    planned = [each for each in trainings(study, output) if not sizes or each.size in sizes]
    for training in planned:
        _check_folder(training)
    left = [training for training in planned if outcome(training) is None]
    if train:
        with stage_bars() as bars:
            _train_all(study, left, done=len(planned) - len(left), workers=workers, bars=bars)
    if generate:
        _write_all(planned)
    found = outcomes(planned)
    table = rows(study, found)
    if not table:
        raise UserError(f"{output}: no training of {file} is done, expected at least one")
    console = wide_console()
    console.print(f"\n{study.question}\n")
    for size in dict.fromkeys(row.size for row in table):
        console.print(results_table(size, table))
    shares = {
        f"{size}/{arm}": shares_to_reach_reference(study, found, size, arm)
        for size in study.sizes
        for arm in study.arms
        if arm != study.reference
    }
    console.print(shares_table(study.reference, {name: each for name, each in shares.items() if each}))
    if written := writing.means(planned):
        console.print(writing_table(written))
    plain = [asdict(row) for row in table]
    result = {
        "question": study.question,
        "reference": study.reference,
        "rows": plain,
        "share_to_reach_reference": shares,
        "tokens_per_pass": [
            {
                "size": size,
                "arm": arm,
                "share": share,
                "seeds": speeds.seeds,
                "at_agreement": {
                    agreement: found and {**asdict(found.tokens_per_pass), "at_least": found.at_least}
                    for agreement, found in speeds.at.items()
                },
            }
            for (size, arm, share), speeds in written.items()
        ],
    }
    write_file(output / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    picture = plots.study(plain, reference=study.reference, theme=plots.LIGHT)
    write_file(output / PICTURE_FILE, picture)
    print(f"study: {output / RESULT_FILE}, {output / PICTURE_FILE}")
