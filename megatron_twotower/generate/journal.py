"""The journal of a run of many batches: its request, and each finished batch.

The request is everything that decides the text. It is the first line, as JSON; each finished batch
is one further line. A batch is on disk before the next one starts, so that a run that was killed
resumes after its last finished batch.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_twotower.common.errors import UserError


@contextlib.contextmanager
def open_journal(path: Path, request: dict[str, Any]) -> Iterator[tuple[IO[bytes], int]]:
    """Open the journal of a request, or start it, and lock it.

    Yields:
        The file, positioned at its end, and the number of finished batches.

    Raises:
        UserError: The journal is of another request, or another process uses it.
    """
    with open(path, "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: in use, expected no other run of this command") from error
        stream.seek(0)
        complete_bytes = lines = 0
        for line in stream:
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote this line
            if lines == 0:
                _check_request(path, json.loads(line), request)
            complete_bytes, lines = complete_bytes + len(line), lines + 1
        stream.truncate(complete_bytes)
        stream.seek(complete_bytes)
        if lines == 0:
            append(stream, request)
        size_at_start = stream.tell()
        try:
            yield stream, max(0, lines - 1)
        except UserError:
            if lines <= 1 and os.fstat(stream.fileno()).st_size == size_at_start:
                path.unlink()  # a mistake of the user, found before the first batch was finished
            raise


def _check_request(path: Path, found: dict[str, Any], request: dict[str, Any]) -> None:
    for name in request:
        if found.get(name) != request[name]:
            raise UserError(
                f"{path}: found an interrupted run with {name} {found.get(name)}, expected {request[name]}; "
                "repeat that run with the same settings, or remove the file"
            )


def json_line(value: Any) -> bytes:
    """A value as a line of JSON: as UTF-8, or escaped where it has half of a surrogate pair."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


def append(stream: IO[bytes], entry: dict[str, Any]) -> None:
    """Write an entry as a line, and wait until it is on disk."""
    stream.write(json_line(entry))
    stream.flush()
    os.fsync(stream.fileno())


def entries(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the entries of all finished batches, in order. The file is then at its end."""
    stream.seek(0)
    next(stream)  # the request
    for line in stream:
        yield json.loads(line)


def rows_in_order(stream: IO[bytes], window_batches: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of all batches in the order of their prompts.

    Args:
        stream: The file of a journal whose batches are all finished.
        window_batches: Batches in a window; prompts of different windows never share a batch, so
            that one window at a time is in memory.
    """
    found = entries(stream)
    while window := list(islice(found, window_batches)):
        rows = [pair for entry in window for pair in entry["rows"]]
        yield from (row for _, row in sorted(rows, key=lambda pair: pair[0]))
