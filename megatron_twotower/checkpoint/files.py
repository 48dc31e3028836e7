"""Training state on disk: Megatron distributed checkpoints of what trains, and a readable `state.json`.

A run folder holds `checkpoints/step-00000100/`. A checkpoint is written beside its place and
renamed when every rank has finished, with the checksum of each file in its `state.json`: a folder
with that name is whole, and shows it. Its tensors have the shapes of one rank (`pieces.py`), so any
layout reads it. No generator has a state to keep: noise and order are functions of the seed and the
cursor. The frozen context tower is not stored, only where it came from and its fingerprint, which
is verified on resume.
"""

import contextlib
import dataclasses
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
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import CHECKPOINTS_FOLDER
from megatron_twotower.mcore import parallel
from megatron_twotower.types import LogWindow

# Makes all pieces of tensors that a checkpoint holds, as views of the training state, and what is
# no tensor.
ShardedState = Callable[[], Iterable[ShardedTensor | ShardedObject]]

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


@dataclass(frozen=True)
class FileSum:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself, in `state.json`.

    updates: steps that were not skipped. fingerprint: of the backbone both towers start from.
    window: sums since the last logged record, over all ranks, so that the next record is the one an
    uninterrupted run writes. configuration: of the run, resolved. files: of the checkpoint, by
    name.
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
    files: dict[str, FileSum] = field(default_factory=dict)


def find_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS_FOLDER).glob("step-????????")
    return sorted(path for path in found if (path / "state.json").is_file())


def checksum(file: Path) -> FileSum:
    with file.open("rb") as stream:
        return FileSum(file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def write_state(folder: Path, state: CheckpointState) -> None:
    """The last file of a checkpoint, on disk when this returns. It holds the checksum of its own content too."""
    content = dataclasses.asdict(state)
    with (folder / "state.json").open("w") as stream:
        json.dump(content | {"sha256": _content_sum(content)}, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _content_sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> CheckpointState:
    """
    Raises:
        UserError: not a checkpoint of this program, or not what was written.
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
    """What is wrong with the files of a checkpoint, in one line; None if they are as they were written.

    Every rank reads a share of the files, and all get the same answer.
    """
    files, problem = parallel.broadcast_from_main(_listed(folder) if parallel.is_main() else None)
    if problem is not None:
        return problem
    mine = files[parallel.rank() :: parallel.world_size()]
    wrong = [text for name, expected in mine if (text := _difference(folder / name, expected))]
    return next((text for texts in parallel.gather_objects(wrong) for text in texts), None)


def _listed(folder: Path) -> tuple[list[tuple[str, FileSum]], str | None]:
    """The files that a checkpoint should have, or what is wrong with its list of them."""
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
    """The checkpoint to go on from, agreed on by all ranks; None where there is none.

    Args: verify: compare every file with its checksum. on_damaged: `stop`, or `previous` to pass
        over a damaged one. It gets another name and stays for inspection.

    Raises:
        UserError: the newest one is damaged, and the previous one is not to be taken.
    """
    found = [Path(name) for name in parallel.broadcast_from_main([str(path) for path in find_checkpoints(run)])]
    for folder in reversed(found):
        problem = damaged(folder) if verify else None
        if problem is None:
            return folder
        if on_damaged == "stop":
            raise UserError(f"{problem}; train.on_damaged_checkpoint=previous goes on from the one before it")
        if parallel.is_main():
            logging.getLogger(__name__).warning("%s; going on from the checkpoint before it", problem)
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
    return None


def publish(partial: Path, folder: Path) -> None:
    """Give a finished checkpoint its name. One of that name, of a run that went another way, makes room."""
    if folder.exists():
        remove(folder)
    os.replace(partial, folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove(folder: Path) -> None:
    """Take a checkpoint away. Its name goes first: half of one is never found under it."""
    aside = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def retire(run: Path, *, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints, and those whose step is a multiple of `keep_every` (0: none)."""
    for folder in find_checkpoints(run)[:-keep]:
        if not keep_every or int(folder.name.removeprefix("step-")) % keep_every:
            remove(folder)


def clear_leftovers(run: Path) -> None:
    """Remove what a run that was cut off had begun to write or to remove."""
    for folder in (run / CHECKPOINTS_FOLDER).glob("step-????????.*"):
        if re.search(r"\.(partial|removed)$", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def state_dict(pieces: Iterable[ShardedTensor | ShardedObject]) -> dict[str, Any]:
    """Pieces under names of their own, as Megatron wants them; the key within each is what is stored."""
    return {f"{piece.key}@{','.join(map(str, piece.global_offset))}": piece for piece in pieces}


@torch.no_grad()
def load(folder: Path, pieces: ShardedState) -> dict[str, Any]:
    """Read a checkpoint of any layout into the tensors that `pieces` are views of.

    Returns:
        what else it holds: `schedule`, and objects among the pieces, by their keys in `state_dict`.

    Raises:
        UserError: it cannot be read, or is of another shape.
    """
    with _readable(folder):
        return dist_checkpointing.load(state_dict(pieces()), str(folder))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()
        detail = reason[0] if reason else type(error).__name__
        raise UserError(f"{folder}: cannot be loaded ({detail}), expected a whole checkpoint of this model") from error
