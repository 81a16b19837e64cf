"""The memory that something takes: the process's highest use above what it was before, or torch's count on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


def memory_before(device: torch.device) -> float:
    """Megabytes in use, with the peak set to them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, AttributeError):  # without them the peak is the process's own
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what others have freed goes back, so that it is not used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_since(before: float, device: torch.device) -> float:
    """Megabytes of the peak above `before`."""
    peak = (
        torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else _status("VmHWM")
    )
    return max(0.0, peak - before)


def _status(field: str) -> float:
    """A line of /proc/self/status in megabytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1e3
    return 0.0
