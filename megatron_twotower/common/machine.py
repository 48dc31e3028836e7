"""The machine and the source of measured numbers. Every quoted number names both."""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def commit(*, short: bool = False) -> str | None:
    """The commit of the source tree, with a `+` if files differ; `None` outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", *(["--short"] if short else []), "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """The facts about this machine that measured numbers depend on, ready for JSON."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "commit": commit(short=True),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The facts of `machine` as one line, to print under a table."""
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    return f"{where}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}"
