"""What all ranks of a run check together before anything is built or written.

Ranks that were started with different settings, program or weights would train together without a
word; ranks whose run folders are different folders would write checkpoints that lack files. Both
are refused at the start, with one gather of digests and one of flags.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import megatron_twotower
from megatron_twotower.common import versions
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.files import contents_sha256, is_seen
from megatron_twotower.common.folder_lock import FolderLock
from megatron_twotower.common.run_folder import LOCK_FILE
from megatron_twotower.config.schema import RunConfig, flatten
from megatron_twotower.data.sources import describing_files
from megatron_twotower.mcore import parallel

# Distributions whose releases decide what a step computes.
_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")
_PROBE = ".probe-"
_SHOWN = 3  # differences that an error names


# --- the same on all ranks ---


def check_ranks_agree(config: RunConfig) -> None:
    """Compare settings, releases, and the files of program, weights and data over all ranks.

    Files are compared by what `stat` says. Only ranks with other files than the first rank's, such
    as copies on the disks of nodes, read them: one rank for each copy.

    Raises:
        UserError: Ranks differ. One line with the key or file, and both values.
    """
    if parallel.world_size() == 1:
        return
    facts, files = _facts(config), compared_files(config)
    mine = {"": _digest(facts)} | {name: _identity(paths) for name, paths in files.items()}
    if len(set(parallel.gather_objects(_digest(mine)))) == 1:
        return
    everyone: list[dict[str, str]] = parallel.gather_objects(mine)
    if any(each[""] != everyone[0][""] for each in everyone):
        _refuse(_differences(facts))
    _compare_contents(files, everyone)


def _facts(config: RunConfig) -> dict[str, str]:
    """The settings and releases of this rank, by what an error calls them."""
    facts = {key: str(value) for key, value in flatten(config)}
    facts["the version of python"] = platform.python_version()
    facts |= {f"the version of {package}": str(versions.installed(package)) for package in _PACKAGES}
    return facts


def compared_files(config: RunConfig) -> dict[str, list[Path]]:
    """The files that must be the same on all ranks, by what an error calls them."""
    package = Path(megatron_twotower.__file__).parent
    files = {"the program": sorted(package.rglob("*.py"))}
    for key, folder in (("init.backbone", config.init.backbone), ("init.denoiser", config.init.denoiser)):
        if folder:
            files[f"{key} {folder}"] = [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]
    with contextlib.suppress(UserError):  # reported when the data is opened
        files |= describing_files(config)
    return files


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _identity(paths: Sequence[Path]) -> str:
    """A digest of names, sizes, inodes and times: equal if ranks see the same files."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((path.name, status.st_size, status.st_ino, status.st_mtime_ns))
    return _digest(found)


def _contents(paths: Sequence[Path]) -> str:
    """The SHA-256 of names and contents; or why a file cannot be read."""
    try:
        return f"sha256 {contents_sha256(paths)[:12]}"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror or error}"


def _differences(facts: Mapping[str, str]) -> list[str]:
    """What of this rank differs from the first rank, one line each."""
    first: Mapping[str, str] = parallel.broadcast_from_main(facts)
    return [
        f"{key}: found {facts.get(key)} on {_this_rank()}, expected {first.get(key)}, as on rank 0"
        for key in [*first, *(facts.keys() - first.keys())]
        if facts.get(key) != first.get(key)
    ]


def _this_rank() -> str:
    return f"rank {parallel.rank()} ({socket.gethostname()})"


def _refuse(lines: Sequence[str]) -> None:
    """Refuse a start for the differences of all ranks. All ranks call this.

    Raises:
        UserError: Any rank has a line.
    """
    by_rank = [each for each in parallel.gather_objects(list(lines)) if each]
    if by_rank:
        more = f"; {len(by_rank)} ranks differ from rank 0" if len(by_rank) > 1 else ""
        raise UserError("; ".join(by_rank[0][:_SHOWN]) + more)


def _compare_contents(files: Mapping[str, Sequence[Path]], everyone: Sequence[Mapping[str, str]]) -> None:
    """Compare the contents of files that ranks do not share: the first rank of each copy reads it.

    Raises:
        UserError: Two copies differ.
    """
    unequal = [name for name in everyone[0] if any(each.get(name) != everyone[0][name] for each in everyone)]
    mine = everyone[parallel.rank()]
    first_of_copy = {
        name: next(rank for rank, each in enumerate(everyone) if each.get(name) == mine.get(name)) for name in unequal
    }
    read = {name: _contents(files.get(name, ())) for name in unequal if first_of_copy[name] == parallel.rank()}
    found: list[dict[str, str]] = parallel.gather_objects(read)
    _refuse(
        [
            f"{name}: found {read[name]} on {_this_rank()}, expected {found[0][name]}, as on rank 0"
            for name in read
            if read[name] != found[0][name]
        ]
    )


# --- one folder, one run ---


@contextlib.contextmanager
def own_run_folder(run: Path) -> Iterator[Callable[[], None]]:
    """Create the run folder, lock it, and check that all ranks see and can write the same folder.

    All ranks enter. The first one has the lock. A folder in which nothing was written is removed.

    Yields:
        A function for the first rank, which raises a `UserError` if another run has taken the
        folder since.

    Raises:
        UserError: Another run is in the folder, or the folder is not the same one on all ranks.
    """
    lock = FolderLock(run / LOCK_FILE, say=functools.partial(print, flush=True))
    probe = run / f"{_PROBE}{secrets.token_hex(8)}-{parallel.rank()}"
    try:
        first = parallel.from_main(lambda: _lock(run, lock, probe))
        if parallel.world_size() > 1:
            _check_one_folder(probe, run / first)
        yield lock.check
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
        lock.release()
        if parallel.is_main():
            with contextlib.suppress(OSError):
                run.rmdir()  # an error if it has files


def _lock(run: Path, lock: FolderLock, probe: Path) -> str:
    """Create the folder, lock it, and write the first probe. Returns the name of the probe."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for old in run.glob(f"{_PROBE}*"):  # of a start that was killed
            old.unlink(missing_ok=True)
        if parallel.world_size() > 1:
            probe.write_text(_this_rank())
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror or error})") from error
    return probe.name


def _check_one_folder(probe: Path, first: Path) -> None:
    """Write a probe on each node; all ranks must see that of the first rank, and it all others.

    Args:
        probe: The probe of this rank.
        first: That of the first rank, which is written.

    Raises:
        UserError: A rank sees another folder, or cannot write to it.
    """
    run, problem, written = probe.parent, None, parallel.is_main()
    if not is_seen(first):
        problem = _another_folder(run, f"{_this_rank()} does not see what rank 0 has written")
    elif not written and _first_of_node():
        try:
            probe.write_text(_this_rank())
            written = True
        except OSError as error:
            problem = f"{run}: cannot be written on {_this_rank()} ({error.strerror or error})"
    found: list[tuple[str | None, str]] = parallel.gather_objects((problem, probe.name if written else ""))
    parallel.from_main(lambda: _check_probes(run, found))


def _check_probes(run: Path, found: Sequence[tuple[str | None, str]]) -> None:
    """Raise the first problem of a rank, or that the first rank does not see the probe of another.

    Args:
        run: The run folder.
        found: Of each rank the problem, and the name of its probe, or nothing.
    """
    for problem, _ in found:
        require(problem is None, problem or "")
    for rank, (_, name) in enumerate(found):
        require(
            not name or is_seen(run / name), _another_folder(run, f"rank 0 does not see what rank {rank} has written")
        )


def _first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _another_folder(run: Path, what: str) -> str:
    return f"{run}: {what}; expected one folder on a file system that all nodes share (output)"
