"""One live owner of a folder, also where several machines share the file system.

The lock is a file in the folder. It names its owner, and two signs show that the owner lives:

1. The owner keeps the file locked (`flock`). The kernel unlocks it when the process ends, in
   whatever way. But some shared file systems keep such locks to one machine, and some have none.
2. The owner counts in the file, every `beat` seconds.

What a new process concludes about the owner in the file:

| flock | owner | conclusion |
|---|---|---|
| refused | of this machine | lives |
| refused | other | lives if it counts, or keeps the lock for `locked` seconds |
| obtained | of this machine | is dead |
| obtained or unsupported | an earlier start of this Slurm job | is dead |
| obtained or unsupported | other | lives if it counts; is dead after `silent` seconds |

Times are measured here, so clocks of machines need not agree. An owner that was taken for dead, for
example because its machine was frozen, notices it in `check`: it must call it before it writes what
others could be writing.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_twotower.common.errors import UserError

_RECORD_BYTES = 1024  # every record has this size, so that one write replaces another
_NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class LockTimes:
    """Durations of a lock, in seconds.

    Attributes:
        beat: Between two beats of an owner.
        silent: Without a beat for this long, an owner whose process cannot be asked about is dead.
        locked: How long to wait for a silent owner of another machine whose `flock` still holds. A
            server of NFS frees the locks of a dead machine after 90 seconds.
        settle: Between writing a record over that of a dead owner, and reading it again.
    """

    beat: float = 5.0
    silent: float = 30.0
    locked: float = 150.0
    settle: float = 1.0


def _machine() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _slurm_job() -> str:
    job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{job} of {cluster}" if job and cluster else job


@dataclass(frozen=True)
class Owner:
    """The process that has a lock.

    Attributes:
        token: Random, of this acquisition.
        machine: The boot of the machine's kernel.
        job: The Slurm job and its cluster; empty without Slurm.
        restarts: How often Slurm has queued the job again.
    """

    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    machine: str = field(default_factory=_machine)
    job: str = field(default_factory=_slurm_job)
    restarts: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT") or 0))

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}, started {self.started}"

    def is_earlier_start_of(self, other: "Owner") -> bool:
        """Whether both are starts of one Slurm job: Slurm has ended this one before the other."""
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts


def _record(owner: Owner, beat: int) -> bytes:
    return json.dumps(asdict(owner) | {"beat": beat}).encode().ljust(_RECORD_BYTES - 1) + b"\n"


def _owner_in(content: bytes) -> Owner | None:
    """The owner of a record; None for an empty or incomplete one."""
    try:
        fields = json.loads(content)
        del fields["beat"]
        return Owner(**fields)
    except (ValueError, TypeError, KeyError):
        return None


def _flock(descriptor: int) -> bool | None:
    """Lock an open file. Returns False if another process has it locked; None if nothing can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    return True


# Files that this process has locked. A forked child must not keep them locked after its parent.
_locked: set[int] = set()


def _forget_locks() -> None:
    for descriptor in _locked:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_forget_locks)


class FolderLock:
    """The lock of a folder: `acquire`, `check` before writing, `release`.

    Args:
        path: The lock file. Its folder exists.
        times: Durations.
        say: Receives a line if `acquire` has to wait.
    """

    def __init__(self, path: Path, *, times: LockTimes | None = None, say: Callable[[str], None] = print) -> None:
        self._path, self._times, self._say = path, times or LockTimes(), say
        self._owner = Owner()
        self._descriptor = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count, name="folder lock", daemon=True)

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            UserError: Another process is the owner, or the file cannot be written.
        """
        try:
            self._descriptor = self._take()
            self._thread.start()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def check(self) -> None:
        """Look whether this process is still the owner.

        Raises:
            UserError: Another process took this one for dead, or the file cannot be read.
        """
        try:
            found = _owner_in(self._path.read_bytes())
        except FileNotFoundError:
            return  # removed by hand; the next beat writes it again
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if found is not None and found.token != self._owner.token:
            raise UserError(
                f"{self._path.parent}: {found} took this run for dead, because it was silent for "
                f"{self._times.silent:.0f} s; this run ends"
            )

    def release(self) -> None:
        """Stop being the owner, and remove the file. Does nothing if `acquire` failed."""
        if self._descriptor < 0:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_own(self._path.read_bytes()):
                self._path.unlink()
        self._close(self._descriptor)
        self._descriptor = -1

    # --- taking the lock ---

    def _take(self) -> int:
        """Return the locked file with this owner in it, once it is free or its owner is dead."""
        while True:
            descriptor, created = self._open()
            try:
                if self._may_take(descriptor, created=created):
                    return descriptor
            except BaseException:
                self._close(descriptor)
                raise
            self._close(descriptor)

    def _open(self) -> tuple[int, bool]:
        """Open the file. Returns its descriptor, and whether this call created it."""
        created = True
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            created, descriptor = False, os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        _locked.add(descriptor)
        return descriptor, created

    def _may_take(self, descriptor: int, *, created: bool) -> bool:
        """Wait until the open file is free, and write this owner to it.

        Returns:
            False if the file was removed or replaced since it was opened.

        Raises:
            UserError: It has a living owner.
        """
        first: bytes | None = None
        since = time.monotonic()
        while True:
            locked = _flock(descriptor)
            try:
                content = self._path.read_bytes()
                if os.stat(self._path).st_ino != os.fstat(descriptor).st_ino:
                    return False
            except FileNotFoundError:
                return False
            owner, silent = _owner_in(content), time.monotonic() - since
            if first is not None and content != first:  # a beat, or a new owner
                raise self._in_use(owner)
            if self._is_free(owner, locked, created=created, silent=silent):
                break
            if first is None:
                self._say(f"{self._path}: waiting to see whether its owner lives ({owner or 'unknown'})")
            first = content
            time.sleep(self._times.beat / 4)
        os.pwrite(descriptor, _record(self._owner, 0), 0)
        os.fsync(descriptor)
        if not created and not (locked and owner is not None and owner.machine == self._owner.machine):
            # Another process may have found the same owner dead: the later record counts.
            time.sleep(self._times.settle)
            content = self._path.read_bytes()
            if not self._is_own(content):
                raise self._in_use(_owner_in(content))
        return True

    def _is_free(self, owner: Owner | None, locked: bool | None, *, created: bool, silent: float) -> bool:
        """Apply the table of this module to an owner that has not counted for `silent` seconds."""
        here = owner is not None and owner.machine == self._owner.machine
        if locked is False:
            if here or silent >= self._times.locked:
                raise self._in_use(owner)
            return False
        if created or (locked and here) or (owner is not None and owner.is_earlier_start_of(self._owner)):
            return True
        return silent >= self._times.silent

    def _in_use(self, owner: Owner | None) -> UserError:
        return UserError(
            f"{self._path.parent}: in use by {owner or 'another process'}, expected one run for a folder: end that "
            "run, or name another folder"
        )

    def _is_own(self, content: bytes) -> bool:
        owner = _owner_in(content)
        return owner is not None and owner.token == self._owner.token

    def _close(self, descriptor: int) -> None:
        _locked.discard(descriptor)
        os.close(descriptor)

    # --- keeping it ---

    def _count(self) -> None:
        """Write a beat every few seconds, unless another process has become the owner."""
        beat = 0
        while not self._stop.wait(self._times.beat):
            beat += 1
            with contextlib.suppress(OSError):  # the next beat may succeed; `check` notices a loss
                self._write_beat(beat)

    def _write_beat(self, beat: int) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:  # removed by hand
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            _locked.add(descriptor)
            _flock(descriptor)
            self._descriptor, old = descriptor, self._descriptor
            self._close(old)
            content = _record(self._owner, beat)
        if self._is_own(content) or _owner_in(content) is None:
            os.pwrite(self._descriptor, _record(self._owner, beat), 0)
            os.fsync(self._descriptor)
