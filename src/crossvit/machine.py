"""What this machine is and has: its processor, its cores, the versions of packages, a folder for what is kept. Standard library
only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor()
    return next((lines[key].strip() for key in lines if key.strip() == "model name"), platform.processor())


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads counted once: two threads on one core share its multipliers."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Where is kept what was fetched or made for this machine: weights, exported models, compiled kernels."""
    named = os.environ.get("CROSSVIT_CACHE")
    return Path(named).expanduser() if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crossvit"
