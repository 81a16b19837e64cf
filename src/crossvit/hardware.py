"""What this machine is and has: its processor, its cores, the versions of packages. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path


def processor() -> str:
    """The processor's name as the system gives it."""
    return _described().get("model name") or platform.processor()


def instruction_sets() -> str:
    """What the processor can do beyond its name (a virtual machine may hide some of it), as Linux lists it."""
    described = _described()
    return described.get("flags") or described.get("Features") or platform.machine()


def _described() -> dict[str, str]:
    """/proc/cpuinfo on the last processor; empty on other systems."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            pairs = (line.split(":", 1) for line in file if ":" in line)
            return {key.strip(): value.strip() for key, value in pairs}
    except OSError:
        return {}


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads counted once: two threads on one core share its multipliers."""
    allowed = (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(
                Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
            )
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def peak_memory() -> int:
    """The most bytes of memory that this process has taken; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_installed(package: str) -> bool:
    """Whether a package, called as its distribution is, can be imported. Nothing is, and no list of distributions is read."""
    found = importlib.util.find_spec(package)
    return (
        found is not None and found.origin is not None
    )  # a folder of that name beside a script has no origin


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed; nothing is imported."""
    from importlib.metadata import (  # with the parser of e-mail behind it
        PackageNotFoundError,
        version,
    )

    try:
        return version(package)
    except PackageNotFoundError:
        return None
