"""A Ray cluster of several nodes (raylets) on this machine, on the loopback interface.

Its functions need `ray`, and set up the environment of this process for it.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps to the loopback interface
    "RAY_agent_register_timeout_ms": "600000",  # a busy machine may need more than the 30 s of Ray
    "RAY_worker_niceness": "0",  # Ray's 15 leaves workers nothing of a busy machine
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
}
# Without what is not needed to run tasks: each is a process that takes seconds to start.
NODE = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True, "object_store_memory": 80 << 20}


@contextlib.contextmanager
def cluster(*, nodes):
    """Yields a `ray.cluster_utils.Cluster` whose head does no work, and its nodes of one core.

    The driver must be another process, with this process's environment.
    """
    os.environ.update(ENVIRONMENT)
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    wait_longer_for_nodes()
    # Ray writes the address of a cluster there, and has not made that folder where it never ran.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    # Not tmp_path: the path of a socket is short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    made = Cluster(True, head_node_args={"num_cpus": 0, "temp_dir": folder, **NODE})
    try:
        yield made, [add_node(made) for _ in range(nodes)]
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(made):
    """A node of one core joins."""
    return made.add_node(wait=False, num_cpus=1, **NODE)


def set_up_own_ray(monkeypatch):
    """A Ray that this process starts finds its tests, and starts on a busy machine too."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # Ray reads them at its import, before the engine sets its own
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # workers import modules of tests
    wait_longer_for_nodes()


_AGENT_PORTS = ("metrics_agent_port", "runtime_env_agent_port", "metrics_export_port")


def wait_longer_for_nodes(seconds=180):
    """Give nodes of this process the time that a busy machine takes to start them (Ray 2.60).

    ray/_private/node.py waits 30 s for a node. A node aborts if its agent has not named its ports
    after 15 s (src/ray/raylet/node_manager.cc); so they are given. One of them Ray tells the agent
    alone, not the node, which has a flag for it.
    """
    from ray._private import parameter, services

    if services.get_node.__module__ != services.__name__:
        return
    real, parameters, start = services.get_node, parameter.RayParams.__init__, services.start_ray_process

    def patient(*arguments, **keywords):
        deadline = time.monotonic() + seconds
        while True:
            try:
                return real(*arguments, **keywords)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def with_ports(self, *arguments, **keywords):
        ports = dict(zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True))
        given = {name: value for name, value in keywords.items() if value or name not in ports}
        parameters(self, *arguments, **ports | given)

    def start_with_port(command, process_type, *arguments, **keywords):
        if process_type == "raylet":
            (port,) = free_ports(1)
            command = [re.sub(r"--listen-port=\w*", f"--listen-port={port}", word) for word in command]
            command.append(f"--dashboard_agent_listen_port={port}")
        return start(command, process_type, *arguments, **keywords)

    services.get_node, services.start_ray_process = patient, start_with_port
    parameter.RayParams.__init__ = with_ports


def free_ports(count):
    """Ports of the loopback interface that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def kill_node(made, node):
    """SIGKILL to all processes of a node but its workers, which end when they notice."""
    made.remove_node(node, allow_graceful=False)


def worker_processes():
    """The process numbers of workers of a Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker"):
                found.append(process.pid)
    return found


class Trouble:
    """Kills workers, nodes and the driver of a command at random moments, until it is done.

    Attributes:
        kills: How many there were of each kind.
    """

    def __init__(self, made, nodes, *, seed):
        self.made, self.nodes, self.draw = made, nodes, random.Random(seed)
        self.kills = {"worker": 0, "node": 0, "driver": 0}

    def finish(self, start, output, *, begun, kinds, most, longest=1.0, seconds=900):
        """Run the command to its end, with at most `most` kills of `kinds`.

        Args:
            start: Starts the driver and returns its `subprocess.Popen`. It gets a file for its
                standard error: with a pipe it would wait for a reader.
            output: What the command writes. If it is complete when the driver is killed, the next
                driver must say so.
            begun: Whether there is something to kill.
        """
        with tempfile.TemporaryFile("w+") as said:
            process, complete = start(said), False
            kills, deadline = 0, time.monotonic() + seconds
            while True:
                while process.poll() is None and not begun() and time.monotonic() < deadline:
                    time.sleep(0.05)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.draw.uniform(0, longest) if kills < most else max(deadline - time.monotonic(), 1))
                if process.poll() is not None:
                    said.seek(0)
                    lines = said.read()
                    assert process.returncode == 0 or (complete and f"{output}: exists" in lines), lines
                    return
                assert time.monotonic() < deadline, "too slow"
                kind = self.draw.choice(kinds)
                kills, self.kills[kind] = kills + 1, self.kills[kind] + 1
                if kind == "worker":
                    found = worker_processes()
                    if found:
                        kill_worker(self.draw.choice(found))
                elif kind == "node":
                    kill_node(self.made, self.nodes.pop(self.draw.randrange(len(self.nodes))))
                    self.nodes.append(add_node(self.made))
                else:
                    process.kill()
                    process.wait()
                    complete = output.exists()
                    said.seek(0)
                    said.truncate()
                    process = start(said)


def kill_worker(pid):
    """SIGKILL to a worker."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
