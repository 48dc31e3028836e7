"""A Slurm cluster of two nodes on one machine, for a test: munged, slurmctld, two slurmd.

Debian's packages `slurm-wlm` and `munge` are all it takes, and root. Everything lives in one
folder.
"""

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")


def missing() -> str | None:
    """Why a cluster cannot start here, in a few words."""
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, to run slurmd"


# low is preempted by high: its jobs get SIGTERM, and are queued again after the grace time. A job
# that was queued again waits until its old credentials have expired.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=300
InactiveLimit=0
KillWait=120
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: Its logs and state.
        environment: The environment of Slurm's commands.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """The output of one of Slurm's commands."""
        result = subprocess.run(
            command, capture_output=True, text=True, env=self.environment | variables, cwd=cwd, timeout=60
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}\n{self.logs()}"
        return result.stdout

    def state(self, job: str) -> str:
        """The state of a job: COMPLETED, PENDING, RUNNING, ..."""
        fields = dict(item.split("=", 1) for item in self.run("scontrol", "show", "job", job).split() if "=" in item)
        return fields["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 400) -> str:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (found := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job}: {found} after {seconds} s\n{self.logs()}"
            time.sleep(0.5)
        return found

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in sorted(self.folder.glob("*.log"))
        )


def _free_ports(count: int) -> list[int]:
    """Free ports below those that the system assigns, so that no other process gets them."""
    found: list[int] = []
    for port in random.sample(range(6000, 19000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found[:count]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in an empty folder, and stop it with its jobs."""
    host, ports = socket.gethostname().split(".")[0], _free_ports(3)
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    environment = os.environ | {"SLURM_CONF": str(configuration), "PATH": path}
    places = {
        "key-file": key,
        "socket": folder / "munge.socket",
        "pid-file": folder / "munged.pid",
        "log-file": folder / "munged.log",
        "seed-file": folder / "seed",
    }
    munged = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items())]
    commands = [munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            output = stack.enter_context(open(folder / f"{number}-{command[0]}.log", "w"))
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            stack.callback(_end, process)
            if number == 0:
                _wait_for((folder / "munge.socket").exists)
        found = Cluster(folder, environment)
        _wait_for(lambda: _idle(found) == 2, found.logs)
        # Jobs that are queued or running must end before the daemons.
        stack.callback(_cancel_all, found)
        yield found


def _idle(found: Cluster) -> int:
    result = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
        capture_output=True,
        text=True,
        env=found.environment,
        timeout=30,
    )
    return result.stdout.split().count("idle")


def _cancel_all(found: Cluster) -> None:
    found.run("scancel", "--full", "--signal=KILL", "--user=root")
    found.run("scancel", "--user=root")
    _wait_for(lambda: not found.run("squeue", "--noheader").strip(), found.logs)


def _wait_for(holds, why=lambda: "", *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
