"""Python's search for cycles of garbage, where there are none to find."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nothing is searched. Importing torch makes 280,000 objects that all stay, and Python would look through what
    there is so far 400 times: 0.2 s (docs/performance.md)."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def leave_out_what_is_there() -> None:
    """What is there now stays, and later searches pass it over: they would begin with all that was just loaded.

    Once in a process, so that one which runs many commands does not keep the garbage of each."""
    if not gc.get_freeze_count():
        gc.freeze()
