"""Checkpoints on disk: a Megatron distributed checkpoint of the training state, and a `state.json`.

The checkpoint of step 100 is the folder `checkpoints/step-00000100/` of the run. It is written
under another name and renamed when every rank has finished. Its `state.json` has the checksum of
each file. So a folder with the final name is complete, and this can be verified.

Tensors are stored with their shapes over all ranks (`sharding.py`), so any layout can read a
checkpoint. There is no state of random generators: noise and data order are functions of the seed
and the cursor. The frozen context tower is not stored, only its origin and its fingerprint, which
a resumed run verifies.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint import CheckpointException

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE
from megatron_twotower.mcore import parallel
from megatron_twotower.types import LogWindow

# Returns this rank's part of the state that a checkpoint stores: shards of tensors, as views of the
# training state, and objects.
ShardedState = Callable[[], Iterable[ShardedTensor | ShardedObject]]

_START_ANEW = "expected one to resume from; to start again from step 0, name another output folder or remove this one"

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


@dataclass(frozen=True)
class FileSum:
    """The size of a file in bytes, and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointState:
    """The content of `state.json`.

    Attributes:
        step: The number of steps that the run has done.
        cursor: The number of sequences that the run has read.
        updates: The number of steps that were not skipped.
        objective: As in the recipe.
        backbone: The folder of the backbone that both towers start from, or `None`.
        fingerprint: The fingerprint of that backbone, or `None`.
        model: The architecture, as in the recipe.
        window: Sums over all ranks since the last logged record, so that the next record is the
            same as in an uninterrupted run.
        configuration: The resolved configuration of the run.
        data: What the run has read, as `data.sources.data_summary` describes it; empty before a
            first step, and in checkpoints of older versions.
        files: The sums of the other files of the checkpoint, by name.
    """

    step: int
    cursor: int
    updates: int
    objective: str
    backbone: str | None
    fingerprint: str | None
    model: dict[str, Any]
    window: LogWindow
    configuration: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileSum] = field(default_factory=dict)


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS_FOLDER).glob("step-????????")
    return sorted(path for path in found if (path / "state.json").is_file())


def checksum(file: Path, *, note: Callable[[int], None] = lambda count: None) -> FileSum:
    """Read a file and compute its size and SHA-256.

    Args:
        file: The file.
        note: Called with the number of bytes of each part that was read.
    """
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            note(count)
    return FileSum(size, digest.hexdigest())


def write_state(folder: Path, state: CheckpointState) -> None:
    """Write `state.json`, the last file of a checkpoint, and wait until it is on disk.

    It includes the checksum of its own content.
    """
    content = dataclasses.asdict(state)
    with (folder / "state.json").open("w") as stream:
        json.dump(content | {"sha256": _content_sum(content)}, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _content_sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> CheckpointState:
    """Read and verify the `state.json` of a checkpoint.

    Raises:
        UserError: The folder is not a checkpoint of this program, or the file has changed.
    """
    file = folder / "state.json"
    try:
        content = json.loads(file.read_text())
        found, expected = content.pop("sha256"), _content_sum(content)
        files = {name: FileSum(**each) for name, each in content["files"].items()}
        state = CheckpointState(**content | {"window": LogWindow(**content["window"]), "files": files})
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: not a checkpoint ({error}), expected one of this program") from error
    if found != expected:
        raise UserError(f"{file}: damaged, found the checksum {expected[:12]}, expected {found[:12]}")
    return state


def damaged(folder: Path) -> str | None:
    """Compare the files of a checkpoint with their checksums.

    Each rank reads a share of the files. All ranks return the same.

    Returns:
        The first difference, in one line; `None` if there is none.
    """
    files, problem = parallel.from_main(lambda: _expected_files(folder))
    if problem is not None:
        return problem
    mine = files[parallel.rank() :: parallel.world_size()]
    wrong = [text for name, expected in mine if (text := _difference(folder / name, expected))]
    return next((text for texts in parallel.gather_objects(wrong) for text in texts), None)


def _expected_files(folder: Path) -> tuple[list[tuple[str, FileSum]], str | None]:
    """The files that a checkpoint should have, or why its list of files cannot be read."""
    try:
        return sorted(read_state(folder).files.items()), None
    except UserError as error:
        return [], str(error)


def _difference(file: Path, expected: FileSum) -> str | None:
    if not file.is_file():
        return f"{file}: missing, expected {expected.size} bytes"
    found = file.stat().st_size
    if found != expected.size:
        return f"{file}: damaged, found {found} bytes, expected {expected.size}"
    sha256 = checksum(file).sha256
    if sha256 != expected.sha256:
        return f"{file}: damaged, found the checksum {sha256[:12]}, expected {expected.sha256[:12]}"
    return None


def newest_complete(run: Path, *, verify: bool, on_damaged: str) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; `None` if there is none.

    Args:
        run: The run folder.
        verify: Whether to compare every file with its checksum.
        on_damaged: What to do if the newest checkpoint is damaged: `stop`, or `previous` to take
            the previous one, and to rename the damaged one, so that it can be inspected.

    Raises:
        UserError: The newest checkpoint is damaged, and `on_damaged` is `stop`; or all are damaged.
    """
    found = parallel.from_main(lambda: find_checkpoints(run))
    problems: list[tuple[Path, str]] = []
    for folder in reversed(found):
        problem = damaged(folder) if verify else None
        if problem is None:
            if parallel.is_main():
                _set_aside(problems)
            return folder
        if on_damaged == "stop":
            raise UserError(f"{problem}; train.on_damaged_checkpoint=previous resumes from the previous one")
        problems.append((folder, problem))
    if problems:
        raise UserError(f"{problems[0][1]}; found {len(problems)} checkpoints, all damaged, {_START_ANEW}")
    return None


def _set_aside(problems: Iterable[tuple[Path, str]]) -> None:
    """Rename damaged checkpoints."""
    for folder, problem in problems:
        logging.getLogger(__name__).warning("%s; resuming from the previous checkpoint", problem)
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        with _warning(folder):
            os.replace(folder, aside)


def left_of_earlier_run(run: Path, *, records: bool) -> str | None:
    """What shows that a run has trained in this folder before; `None` if nothing does.

    Args:
        run: A run folder.
        records: Whether records of steps count too, of a run that ended before its first
            checkpoint.
    """
    folders = sorted((run / CHECKPOINTS_FOLDER).glob("step-????????*"))
    if kept := [folder.name for folder in folders if not folder.name.endswith(".partial")]:
        return f"{CHECKPOINTS_FOLDER}/{kept[-1]}"
    with contextlib.suppress(FileNotFoundError), (run / METRICS_FILE).open() as lines:
        if any(records or '"kind": "checkpoint"' in line for line in lines):
            return f"{METRICS_FILE} with {'records' if records else 'records of checkpoints'}"
    return None


def check_fresh(run: Path, *, resume: bool) -> None:
    """Refuse to start at step 0 over an earlier run. All ranks call this.

    Args:
        run: A run folder without a checkpoint to resume from, or any with `resume` false.
        resume: As in the recipe.

    Raises:
        UserError: A run has saved a checkpoint here; or, with `resume` false, has taken a step.
    """
    left = parallel.from_main(lambda: left_of_earlier_run(run, records=not resume))
    if left and not resume:
        raise UserError(f"{run}: found {left}, expected resume=true or another output folder")
    if left:
        raise UserError(f"{run}: found {left} and no complete checkpoint, {_START_ANEW}")


def publish(partial: Path, folder: Path) -> None:
    """Rename a finished checkpoint to its final name.

    A checkpoint with that name, from an earlier run that was continued differently, is removed.
    """
    aside = _move_aside(folder) if os.path.lexists(folder) else None
    os.replace(partial, folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _move_aside(folder: Path) -> Path | None:
    """Rename a checkpoint that shall be removed: no folder with its name is ever incomplete.

    A link to a folder elsewhere is removed; its target stays, and the result is `None`.
    """
    if folder.is_symlink():
        logging.getLogger(__name__).warning("%s: a link, removed; %s stays", folder, folder.resolve())
        folder.unlink()
        return None
    aside = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


@contextlib.contextmanager
def _warning(folder: Path) -> Iterator[None]:
    """Warn, once for each folder, if a checkpoint cannot be renamed or removed."""
    try:
        yield
    except OSError as error:
        _warn_once(f"{folder}: cannot be removed ({error.strerror or error}); it stays")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def retire(run: Path, *, keep: int, keep_every: int) -> None:
    """Remove old checkpoints. One that cannot be removed stays, with a warning.

    The newest checkpoint stays in any case. It does not count if it was written while steps were
    skipped because they were not finite: perhaps no step can be taken from it.

    Args:
        run: The run folder.
        keep: The number of newest checkpoints that count and stay.
        keep_every: Checkpoints whose step is a multiple of this number stay too; 0 for none.
    """
    counted = 0
    for number, folder in enumerate(reversed(find_checkpoints(run))):
        stays = number == 0
        if counted < keep:
            try:
                counts = read_state(folder).window.in_a_row == 0
            except UserError:
                continue  # it stays, and does not count
            stays, counted = stays or counts, counted + counts
        if not stays and (not keep_every or int(folder.name.removeprefix("step-")) % keep_every):
            with _warning(folder):
                if (aside := _move_aside(folder)) is not None:
                    shutil.rmtree(aside)


def clear_leftovers(run: Path) -> None:
    """Remove folders that an interrupted run had begun to write or to remove."""
    for folder in (run / CHECKPOINTS_FOLDER).glob("step-????????.*"):
        if re.search(r"\.(partial|removed)$", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def state_dict(shards: Iterable[ShardedTensor | ShardedObject]) -> dict[str, Any]:
    """Put shards into a dict with unique names, as Megatron expects.

    In the checkpoint a shard has its own key, not this name.
    """
    return {f"{shard.key}@{','.join(map(str, shard.global_offset))}": shard for shard in shards}


@torch.no_grad()
def load(folder: Path, sharded_state: ShardedState) -> dict[str, Any]:
    """Read a checkpoint of any layout into the tensors that the shards are views of.

    Args:
        folder: The folder of the checkpoint.
        sharded_state: Returns the shards to read.

    Returns:
        The rest of the checkpoint: `schedule`, and the objects, by their names in `state_dict`.

    Raises:
        UserError: The checkpoint cannot be read, or its shapes differ.
    """
    with _readable(folder):
        return dist_checkpointing.load(state_dict(sharded_state()), str(folder))


def stored_names(folder: Path) -> frozenset[str]:
    """The names of the tensors in a checkpoint.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    with _readable(folder):
        return frozenset(dist_checkpointing.load_tensors_metadata(str(folder)))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()
        # torch puts the errors of all ranks below each other, with their tracebacks.
        detail = reason[-1 if isinstance(error, CheckpointException) else 0] if reason else type(error).__name__
        raise UserError(
            f"{folder}: cannot be loaded ({detail}), expected a complete checkpoint of this model"
        ) from error
