"""Python's search for cycles of garbage, where a command has none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nothing is searched. Importing torch makes 280,000 objects that all stay, and Python would look through what
    there is so far 400 times: 0.2 s (docs/performance.md)."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def end_uncollected() -> None:
    """Take what is there out of the searches that Python makes as it ends: the process gives its memory back all the same,
    and what has to be done at the end (`atexit`) is done."""
    gc.freeze()
