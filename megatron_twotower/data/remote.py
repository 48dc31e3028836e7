"""Files at URLs: read, copied into a bounded cache, and written.

| URL | opened by |
|---|---|
| `http://`, `https://` | urllib |
| `pipe:COMMAND` | the shell: the content is the standard output of the command |
| any other (`s3://`, `gs://`, `hf://`, `file:`, ...) | fsspec, with the package of the protocol |

For HTTP, fsspec needs aiohttp. urllib needs no package, and its errors name the HTTP status. Files
are written by fsspec alone.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
import fsspec.core

from megatron_twotower.common.errors import UserError

T = TypeVar("T")

ATTEMPTS = 3
FILE_PLACE = "{file}"

_FIRST_PAUSE_SECONDS = 0.5
_TIMEOUT_SECONDS = 60
_BYTES_A_READ = 1 << 20
_STALE_SECONDS = 24 * 3600  # an unfinished copy older than this is from a killed process
_PARTIAL, _LOCK = ".partial", ".lock"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")  # at least two letters: C: is a drive
_PIPE = "pipe:"


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL and not a path."""
    return isinstance(location, str) and _SCHEME.match(location) is not None


def join(folder: str, file: str) -> str:
    """The URL of a file in a folder at a URL.

    The name of the file replaces `{file}` if the folder contains it (`pipe:cat /data/{file}`), and
    else follows after a slash. A `file` that is itself a URL is returned unchanged.
    """
    if is_url(file):
        return file
    return folder.replace(FILE_PLACE, file) if FILE_PLACE in folder else f"{folder.rstrip('/')}/{file}"


def input_path(given: str) -> Path:
    """The path of an input. That of a URL has the methods of a path, by fsspec.

    Raises:
        UserError: The package of the protocol is missing.
    """
    if not is_url(given):
        return Path(given)
    try:
        from upath import UPath

        found = UPath(given)
        found.fs  # noqa: B018  # imports the package of the protocol
    except (ImportError, ValueError) as error:
        raise UserError(f"{given}: needs a package that is not installed ({_one_line(error)})") from error
    return cast(Path, found)


@contextlib.contextmanager
def store_faults(path: Any) -> Iterator[None]:
    """Raise an error of the package of a store as a `UserError`.

    Args:
        path: What is read, see `input_path`. Errors about local files are left alone.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the packages of the protocols have exceptions of their own
        if isinstance(path, Path):
            raise
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error


def sizes(folder: str) -> dict[str, int]:
    """The files at a URL at any depth: sizes in bytes by path below it.

    Raises:
        UserError: The store cannot be read.
    """

    def attempt() -> dict[str, int]:
        store, root = _store(folder)
        store.invalidate_cache()  # what other processes have written
        try:
            found = store.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(root).lstrip("/"): int(about["size"]) for name, about in found.items()}

    return _retried(folder, attempt)


def put(path: Path, url: str) -> None:
    """Copy a local file to a URL.

    Raises:
        UserError: It cannot be written in `ATTEMPTS` attempts.
    """

    def attempt() -> None:
        store, target = _store(url)
        store.makedirs(target.rpartition("/")[0], exist_ok=True)  # nothing, where there are no folders
        store.put_file(str(path), target)

    _retried(url, attempt, verb="written")


def remove(folder: str) -> None:
    """Remove what is at a URL.

    Raises:
        UserError: It cannot be removed in `ATTEMPTS` attempts.
    """

    def attempt() -> None:
        store, root = _store(folder)
        if store.exists(root):
            store.rm(root, recursive=True)

    _retried(folder, attempt, verb="removed")


def _store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there."""
    protocol = url.partition(":")[0]
    if protocol in ("http", "https", "pipe"):
        raise UserError(f"{url}: found {protocol}, expected a store that can be written to, such as s3 or gs")
    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: needs a package that is not installed ({_one_line(error)})") from error
    return store, path.rstrip("/")


def cache_folder() -> Path:
    """`TWOTOWER_CACHE`, or megatron_twotower in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TWOTOWER_CACHE") or Path(base).expanduser() / "megatron_twotower")


def read(url: str) -> bytes:
    """The content of a URL.

    Raises:
        UserError: It cannot be read in `ATTEMPTS` attempts, or the package of its protocol is
            missing.
    """

    def attempt() -> bytes:
        with _open(url) as stream:
            return b"".join(_chunks(stream))

    return _retried(url, attempt)


def fetch(url: str, *, sha256: str, folder: Path) -> Path:
    """A local copy of a URL in `folder`, named by its checksum; downloaded unless it exists.

    Threads, processes and machines may share `folder`. A copy there is always complete. If several
    want the same copy at the same time, one downloads it and the others wait.

    Raises:
        UserError: It cannot be read with that checksum in `ATTEMPTS` attempts, or the package of
            its protocol is missing.
    """
    target = folder / sha256
    if _mark_used(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def attempt() -> Path:
        # Not `files.atomic_file`, whose names tell processes apart, but not those of two machines.
        with _open(url) as stream, tempfile.NamedTemporaryFile(dir=folder, suffix=_PARTIAL, delete=False) as copy:
            try:
                _copy(stream, copy, sha256=sha256)
                return Path(copy.name).replace(target)
            finally:
                Path(copy.name).unlink(missing_ok=True)

    with open(folder / f"{sha256[:2]}{_LOCK}", "a") as lock:  # at most 256 lock files
        fcntl.flock(lock, fcntl.LOCK_EX)
        return target if _mark_used(target) else _retried(url, attempt)


def _mark_used(copy: Path) -> bool:
    """Whether a copy exists; sets its time of last use, by which `trim` decides."""
    try:
        os.utime(copy)  # `touch` would create an empty file if another process has just removed the copy
    except FileNotFoundError:
        return False
    return True


def _copy(stream: IO[bytes], copy: IO[bytes], *, sha256: str) -> None:
    digest = hashlib.sha256()
    for chunk in _chunks(stream):
        digest.update(chunk)
        copy.write(chunk)
    copy.flush()
    if digest.hexdigest() != sha256:
        raise OSError(f"found sha256 {digest.hexdigest()}, expected {sha256}")


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: stream.read(_BYTES_A_READ), b"")


def trim(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` last used copies in `folder`, and old unfinished copies.

    Memory maps of removed copies stay valid.
    """
    copies = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may trim at the same time
            seconds = path.stat().st_mtime
            if not path.suffix:
                copies.append((seconds, path))
            elif path.suffix == _PARTIAL and seconds < time.time() - _STALE_SECONDS:
                path.unlink()
    for _, path in sorted(copies)[: max(len(copies) - keep, 0)]:
        with contextlib.suppress(OSError):  # one that cannot be removed takes space, and nothing else
            path.unlink()


def _retried(url: str, attempt: Callable[[], T], *, verb: str = "read") -> T:
    pause = _FIRST_PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # the packages of the protocols have exceptions of their own
            if number == ATTEMPTS:
                raise UserError(f"{url}: cannot be {verb} in {ATTEMPTS} attempts ({_one_line(error)})") from error
            time.sleep(pause)
            pause *= 2
    raise AssertionError


# --- opening ---


def _open(url: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        return _open_http(url)
    if url.startswith(_PIPE):
        return _open_pipe(url.removeprefix(_PIPE))
    return _open_fsspec(url)


@contextlib.contextmanager
def _open_http(url: str) -> Iterator[IO[bytes]]:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        yield response
        if getattr(response, "length", 0):
            raise OSError(f"found {response.length} bytes less than announced")


@contextlib.contextmanager
def _open_pipe(command: str) -> Iterator[IO[bytes]]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
        if (status := process.wait()) != 0:
            raise OSError(f"exit status {status}")


@contextlib.contextmanager
def _open_fsspec(url: str) -> Iterator[IO[bytes]]:
    try:
        file = fsspec.open(url, "rb")
    except ImportError as error:  # its message says what to install
        protocol = url.partition(":")[0]
        raise UserError(f"{url}: {protocol} needs a package that is not installed ({_one_line(error)})") from error
    with file as stream:
        yield stream


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
