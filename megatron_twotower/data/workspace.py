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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import partial_path, write_file
from megatron_twotower.data import remote

REQUEST_FILE = "plan.json"
_CLEARED = "shards/cleared"  # of an output at a URL: nothing of an earlier one is there any more


@dataclass(frozen=True)
class Place:
    """Where an output is in the end: in a folder, or at a URL (without a slash at its end).

    Attributes:
        made: What OUTPUT.partial is named after.
    """

    folder: Path | None
    url: str | None
    made: Path

    @property
    def partial(self) -> Path:
        """The folder in which the output is made."""
        return partial_path(self.made)

    @property
    def request(self) -> dict[str, Any]:
        """What an interrupted run must have in common: shards at a URL are not written again."""
        return {} if self.url is None else {"output": self.url}

    def check(self, *, mark: str, overwrite: bool) -> None:
        """Refuse an output that exists, see `check_output` and `check_url`."""
        if self.folder is not None:
            check_output(self.folder, mark=mark, overwrite=overwrite)
        if self.url is not None:
            check_url(self.url, self.partial, mark=mark, overwrite=overwrite)

    def finish(self, *, mark: str, written: Mapping[str, int]) -> None:
        """Give the finished data its place, see `move_into_place` and `copy_to_url`."""
        if self.folder is not None:
            move_into_place(self.folder)
        if self.url is not None:
            copy_to_url(self.url, self.partial, last=mark, written=written)


def place_of(output: str | Path, workspace: Path | None) -> Place:
    """The place of an output.

    Args:
        workspace: The folder of OUTPUT.partial if the output is at a URL.

    Raises:
        UserError: There is no workspace for a URL, or one for a path.
    """
    if not remote.is_url(output):
        if workspace is not None:
            raise UserError(f"workspace: found {workspace} with an output that is a path, expected it with a URL")
        return Place(Path(output), None, Path(output))
    url = str(output).rstrip("/")
    if workspace is None:
        raise UserError(f"{url}: found no workspace, expected a folder (that all nodes share) for unfinished work")
    return Place(None, url, Path(workspace) / url.rpartition("/")[2])


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
        partial: The folder of the interrupted run, if there is one. What it was to write to `url`
            was checked then.

    Raises:
        UserError: `url` is refused, or cannot be read.
    """
    if (_read_request(partial / REQUEST_FILE) or {}).get("output") == url:
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
    discard(partial)


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".old")


def _read_request(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
