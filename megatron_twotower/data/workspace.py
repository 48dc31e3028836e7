"""The folder OUTPUT.partial in which an output is made: whole work survives a kill, nothing half-written is seen.

plan.json   what the run was asked for
parts/      units of the input, tokenised            shards/   what the index will hold of each written shard
data/       what becomes OUTPUT, in one step         lock      held by the run at work
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file, partial_path

PLAN_FILE = "plan.json"


def check_output(output: Path, *, mark: str, overwrite: bool) -> None:
    """Refuse an `output` that exists; with `overwrite`, only one that does not hold the file `mark`."""
    if not output.name:
        raise UserError(f"{output}: found no name, expected a folder to make beside others")
    partial = partial_path(output)
    if (output / mark).is_file() and partial.is_dir() and not (partial / "data").exists():
        shutil.rmtree(partial)  # of a run that was killed when all was done
        shutil.rmtree(_old(output), ignore_errors=True)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already, expected a folder that does not (or overwrite)")
    if not (output / mark).is_file():
        raise UserError(f"{output}: holds no {mark}, expected an earlier prepared folder to overwrite")


@contextlib.contextmanager
def resuming(output: Path, *, plan: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """OUTPUT.partial with the finished work of an interrupted run of the same `plan`, or empty; locked.

    Errors: `UserError` where the interrupted run had another plan (with `overwrite` its work is
    dropped), or one is at work; and for an `OSError` within that names no file (a full disk),
    naming the folder.
    """
    partial = partial_path(output)
    partial.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(plan))
    with open(partial / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{partial}: in use, expected no other run of this command") from error
        found = _read_plan(partial / PLAN_FILE)
        if found != wanted:
            if found is not None and not overwrite:
                name = next((name for name in wanted if found.get(name) != wanted[name]), "another version")
                raise UserError(
                    f"{partial}: found an interrupted run with {name} {found.get(name)}, expected {wanted.get(name)}; "
                    "repeat that run as it was, or overwrite"
                )
            (partial / PLAN_FILE).unlink(missing_ok=True)  # first: a kill in between leaves nothing to go on with
            for name in ("parts", "shards", "data"):
                shutil.rmtree(partial / name, ignore_errors=True)
                (partial / name).mkdir()
            with atomic_file(partial / PLAN_FILE) as path:
                path.write_text(json.dumps(wanted, indent=1) + "\n")
        for left in partial.rglob("*.partial"):  # what was being written
            left.unlink()
        try:
            yield partial
        except OSError as error:
            if error.filename is not None:
                raise
            raise UserError(f"{partial}: cannot be written ({error.strerror or error})") from error


def drop(partial: Path) -> None:
    """Remove work from which nothing can go on."""
    shutil.rmtree(partial)


def replace(output: Path) -> None:
    """Put the finished data in the place of `output`. A kill in between is mended by the next run."""
    partial, old = partial_path(output), _old(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
    (partial / "data").replace(output)
    shutil.rmtree(partial)
    shutil.rmtree(old, ignore_errors=True)


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".old")


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
