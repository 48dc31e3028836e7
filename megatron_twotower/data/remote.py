"""Files at URLs: any that WebDataset opens (`http://`, `pipe:COMMAND`, ...), fetched whole into a bounded cache."""

import contextlib
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from webdataset.gopen import Pipe, gopen

from megatron_twotower.records import UserError

ATTEMPTS = 3
FILE_PLACE = "{file}"

_FIRST_PAUSE_SECONDS = 0.5
_TIMEOUT_SECONDS = 60
_BYTES_A_READ = 1 << 20
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

    Processes may share `folder`: a copy appears there whole or not at all.
    Errors: `UserError` naming the URL, what was found and what was expected, after `ATTEMPTS` attempts.
    """
    target = folder / sha256
    if target.is_file():
        target.touch()  # when it was last asked for, which `trim` goes by
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{sha256}.{os.getpid()}.partial"

    def attempt() -> Path:
        digest = hashlib.sha256()
        with _open(url) as stream, open(partial, "wb") as copy:
            while chunk := stream.read(_BYTES_A_READ):
                digest.update(chunk)
                copy.write(chunk)
        if digest.hexdigest() != sha256:
            raise OSError(f"found sha256 {digest.hexdigest()}, expected {sha256}")
        return partial.replace(target)

    try:
        return _again(url, attempt)
    finally:
        partial.unlink(missing_ok=True)


def trim(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` copies in `folder` that were asked for last. Memory maps of removed ones stay good."""
    copies = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process trims too
            copies.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(copies)[: max(len(copies) - keep, 0)]:
        if path.suffix != ".partial":
            path.unlink(missing_ok=True)


def _again(url: str, attempt: Any) -> Any:
    pause = _FIRST_PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (OSError, ValueError) as error:
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
