"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError

# The errors that a user can correct: no space, no permission, a broken disk.
_USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)


# How long a file that another machine has just written may stay unseen here.
_UNSEEN_SECONDS = 10.0


def is_seen(path: Path, *, size: int | None = None) -> bool:
    """Whether a file that another machine has just written is there, on a shared file system.

    Args:
        size: Its size in bytes; None for any.
    """
    end = time.monotonic() + _UNSEEN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if size in (None, path.stat().st_size):
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # NFS asks the server again


def contents_sha256(paths: Iterable[Path]) -> str:
    """SHA-256, in hex, of the names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def partial_path(path: Path) -> Path:
    """Where an output is written before it is complete: NAME.partial, in the same folder."""
    return path.with_name(f"{path.name}.partial")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. On success that file replaces `path`; on an error it is removed.

    Raises:
        UserError: The file cannot be written.
    """
    # A name of its own also on a file system that machines share, where process numbers repeat.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")
    try:
        yield partial
        with open(partial, "rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a complete file through `atomic_file`, and create its folder if needed.

    Raises:
        UserError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(path: Path, *, size: int = 0, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder. On success it is renamed to `path`; on an error it is removed.

    Args:
        size: The approximate number of bytes that will be written to it.
        replace: Replace an existing folder. The old one is kept until the new one is complete.

    Raises:
        UserError: `path` exists and `replace` is false, another process writes it, the disk is too
            full, or the folder cannot be written.
    """
    if path.exists() and not replace:
        raise UserError(f"{path}: exists, expected a folder that is not there yet")
    partial, old = partial_path(path), path.with_name(f"{path.name}.old")
    with contextlib.suppress(FileNotFoundError), _in_use_here(partial):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    with _in_use_here(partial, create=True), _complete_or_absent(path, partial):
        free = shutil.disk_usage(partial).free
        if free < size:
            raise UserError(f"{path}: found {free / 2**30:.1f} GiB free, expected room for {size / 2**30:.1f}")
        yield partial
        if replace:
            _move_aside(path, old)
        os.replace(partial, path)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _complete_or_absent(path: Path, partial: Path) -> Iterator[None]:
    """Remove what is left of a folder, and raise what a user can correct as a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}), nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _in_use_here(partial: Path, *, create: bool = False) -> Iterator[None]:
    """Lock a folder that is being written, where the file system can lock folders.

    Raises:
        UserError: Another process has locked it, or the folder cannot be created.
        FileNotFoundError: It is not there, and is not to be created.
    """
    in_use = f"{partial}: in use, expected no other process that writes it"
    if create:
        try:
            partial.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(in_use) from error
        except OSError as error:
            path = partial.with_suffix("")
            raise UserError(f"{path}: cannot be written ({error.strerror}), nothing is left of it") from error
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(in_use) from error
    except OSError:
        pass  # NFS does not lock folders
    try:
        yield
    finally:
        os.close(descriptor)


def _move_aside(path: Path, old: Path) -> None:
    """Rename an existing folder. A process killed after this leaves `old`, complete."""
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)


def read_json_object(path: Path, *, expected: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        expected: What it is, for the error.

    Raises:
        UserError: The file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected {expected}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}), expected {expected}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, expected {expected}")
    return found
