"""The folder OUTPUT.partial, in which an output is made and from which an interrupted run resumes.

For an output at a URL it is in a folder that the user names. Its files are complete or absent, so
finished work survives a kill:

    plan.json   the request: what the run was asked for
    lock        locked by the run that works in the folder
    parts/      units of the input, tokenised
    selection/  what was decided about the documents
    shards/     what the index needs to know of each written shard
    data/       what becomes OUTPUT, in one step; what is copied to a URL, file by file
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import partial_path, write_file
from megatron_twotower.data import remote

REQUEST_FILE = "plan.json"
_CLEARED = "shards/cleared"  # of an output at a URL: nothing of an earlier one is there any more


def check_output(output: Path, *, mark: str, overwrite: bool) -> None:
    """Refuse an `output` that exists. With `overwrite`, refuse only one without the file `mark`.

    Raises:
        UserError: `output` is refused.
    """
    if not output.name:
        raise UserError(f"{output}: found no name, expected the path of a folder to create")
    partial = partial_path(output)
    if (output / mark).is_file() and partial.is_dir() and not (partial / "data").exists():
        # A run was killed after its output had been moved into its place.
        shutil.rmtree(partial)
        shutil.rmtree(_old(output), ignore_errors=True)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already, expected a folder that does not (or overwrite)")
    if not (output / mark).is_file():
        raise UserError(f"{output}: found no {mark} in it, expected an earlier prepared folder to overwrite")


def check_url(url: str, partial: Path, *, mark: str, overwrite: bool) -> None:
    """Refuse an output at a URL that has files, as `check_output` does, if it is not resumed.

    Args:
        partial: The folder of the interrupted run, if there is one.

    Raises:
        UserError: `url` is refused, or cannot be read.
    """
    if (partial / REQUEST_FILE).is_file():
        return
    found = remote.sizes(url)
    if not found:
        return
    if not overwrite:
        raise UserError(f"{url}: found {len(found)} files, expected none (or an earlier prepared folder and overwrite)")
    if mark not in found:
        raise UserError(f"{url}: found no {mark} in it, expected an earlier prepared folder to overwrite")


def clear_url(url: str, partial: Path) -> None:
    """Remove an earlier output at a URL, once: not what this run has written since."""
    if not (partial / _CLEARED).exists():
        remote.remove(url)
        write_file(partial / _CLEARED, b"")


@contextlib.contextmanager
def resuming(partial: Path, *, request: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yields OUTPUT.partial, locked: with the finished work of an interrupted run, or empty.

    Args:
        partial: The folder. After a `UserError` before the first finished part it is removed.
        request: What decides the result, as JSON. An interrupted run is resumed only if its request
            was the same.
        overwrite: Discard the work of an interrupted run with another request.

    Raises:
        UserError: The interrupted run had another request, or another run works in the folder. Also
            in place of an `OSError` in the body that names no file (a full disk); the message names
            the folder.
    """
    partial.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(request))
    with open(partial / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{partial}: in use, expected no other run of this command") from error
        found = _read_request(partial / REQUEST_FILE)
        if found != wanted:
            if found is not None and not overwrite:
                name = next((name for name in wanted if found.get(name) != wanted[name]), "another version")
                raise UserError(
                    f"{partial}: found an interrupted run with {name} {found.get(name)}, expected {wanted.get(name)}; "
                    "repeat that run as it was, or overwrite"
                )
            # The request goes first: after a kill during the removal, nothing is resumed.
            (partial / REQUEST_FILE).unlink(missing_ok=True)
            for name in ("parts", "selection", "shards", "data"):
                shutil.rmtree(partial / name, ignore_errors=True)
                (partial / name).mkdir()
            write_file(partial / REQUEST_FILE, json.dumps(wanted, indent=1) + "\n")
        for unfinished in partial.rglob("*.partial"):
            unfinished.unlink()
        try:
            yield partial
        except UserError:
            if not any(partial.glob("parts/*.json")):  # a mistake of the user, found before any work
                discard(partial)
            raise
        except OSError as error:
            if error.filename is not None:
                raise
            raise UserError(f"{partial}: cannot be written ({error.strerror or error})") from error


def discard(partial: Path) -> None:
    """Remove OUTPUT.partial, if nothing can be resumed from it."""
    shutil.rmtree(partial, ignore_errors=True)


def move_into_place(output: Path) -> None:
    """Give the finished data the name `output`.

    After a kill in between, the next run completes the move.
    """
    partial, old = partial_path(output), _old(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
    (partial / "data").replace(output)
    # NFS keeps the lock, which is open, under another name; the next run removes it.
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def copy_to_url(url: str, partial: Path, *, last: str, written: Mapping[str, int]) -> None:
    """Copy the finished data to a URL, where the shards are, and remove OUTPUT.partial.

    Args:
        last: The file that makes a folder a prepared one.
        written: The sizes in bytes of the files that workers have written, by name.

    Raises:
        UserError: A file cannot be written, or what workers have written is not there.
    """
    found = remote.sizes(url)
    for name, size in written.items():
        if found.get(name) != size:
            what = "no such file" if name not in found else f"{found[name]} bytes"
            raise UserError(f"{url}/{name}: found {what}, expected {size} bytes, which a worker has written there")
    data = partial / "data"
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == last):
        remote.put(data / name, f"{url}/{name}")
    shutil.rmtree(partial, ignore_errors=True)


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".old")


def _read_request(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
