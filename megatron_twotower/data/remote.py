"""Files at URLs: any that WebDataset opens (`http://`, `pipe:COMMAND`, ...), fetched whole into a bounded cache."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from webdataset.gopen import Pipe, gopen

from megatron_twotower.common.errors import UserError

ATTEMPTS = 3
FILE_PLACE = "{file}"

_FIRST_PAUSE_SECONDS = 0.5
_TIMEOUT_SECONDS = 60
_BYTES_A_READ = 1 << 20
_STALE_SECONDS = 24 * 3600  # after which a copy that was begun is taken for one of a killed process
_PARTIAL, _LOCK = ".partial", ".lock"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")  # two letters at least: C: is a drive


def is_url(location: str | Path) -> bool:
    return isinstance(location, str) and _SCHEME.match(location) is not None


def join(folder: str, file: str) -> str:
    """The URL of a file in a folder: `{file}` filled in where the folder has it (`pipe:cat /data/{file}`), else below.

    A file that is itself a URL stays as it is.
    """
    if is_url(file):
        return file
    return folder.replace(FILE_PLACE, file) if FILE_PLACE in folder else f"{folder.rstrip('/')}/{file}"


def cache_folder() -> Path:
    """`TWOTOWER_CACHE`, or megatron_twotower in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TWOTOWER_CACHE") or Path(base).expanduser() / "megatron_twotower")


def read(url: str) -> bytes:
    """All of a URL. Errors: `UserError` naming the URL, after `ATTEMPTS` attempts."""

    def attempt() -> bytes:
        with _open(url) as stream:
            return b"".join(iter(lambda: stream.read(_BYTES_A_READ), b""))

    return _again(url, attempt)


def fetch(url: str, *, sha256: str, folder: Path) -> Path:
    """A local copy of a URL, in `folder`, named by its checksum: fetched unless it is there already.

    Threads, processes and machines may share `folder`: a copy appears there whole or not at all,
    and those who want the same one at the same time wait for one of them to fetch it.
    Errors: `UserError` naming the URL, what was found and what was expected, after `ATTEMPTS`
    attempts.
    """
    target = folder / sha256
    if _asked_for(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def attempt() -> Path:
        with _open(url) as stream, tempfile.NamedTemporaryFile(dir=folder, suffix=_PARTIAL, delete=False) as copy:
            try:
                _copy(stream, copy, sha256=sha256)
                return Path(copy.name).replace(target)
            finally:
                Path(copy.name).unlink(missing_ok=True)

    with open(folder / f"{sha256[:2]}{_LOCK}", "a") as lock:  # 256 of them at most
        fcntl.flock(lock, fcntl.LOCK_EX)
        return target if _asked_for(target) else _again(url, attempt)


def _asked_for(copy: Path) -> bool:
    """Whether a copy is there; notes that it was asked for, which `trim` goes by."""
    try:
        os.utime(copy)  # `touch` would make an empty file of one that another process has just removed
    except FileNotFoundError:
        return False
    return True


def _copy(stream: IO[bytes], copy: IO[bytes], *, sha256: str) -> None:
    digest = hashlib.sha256()
    while chunk := stream.read(_BYTES_A_READ):
        digest.update(chunk)
        copy.write(chunk)
    copy.flush()
    if digest.hexdigest() != sha256:
        raise OSError(f"found sha256 {digest.hexdigest()}, expected {sha256}")


def trim(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` copies in `folder` that were asked for last, and what killed processes left half done.
    Memory maps of removed copies stay good."""
    copies = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process trims too
            seconds = path.stat().st_mtime
            if not path.suffix:
                copies.append((seconds, path))
            elif path.suffix == _PARTIAL and seconds < time.time() - _STALE_SECONDS:
                path.unlink()
    for _, path in sorted(copies)[: max(len(copies) - keep, 0)]:
        path.unlink(missing_ok=True)


def _again(url: str, attempt: Any) -> Any:
    pause = _FIRST_PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if number == ATTEMPTS:
                reason = " ".join(str(error).split())
                raise UserError(f"{url}: cannot be read in {ATTEMPTS} attempts ({reason})") from error
            time.sleep(pause)
            pause *= 2
    raise AssertionError


@contextlib.contextmanager
def _open(url: str) -> Iterator[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        # webdataset would call curl, which may be missing and gives no reasons.
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            yield response
            if getattr(response, "length", 0):
                raise OSError(f"found {response.length} bytes less than announced")
    else:
        with gopen(url, "rb") as stream:
            yield stream
            if isinstance(stream, Pipe) and (status := stream.proc.wait()) != 0:
                raise OSError(f"exit status {status}")
