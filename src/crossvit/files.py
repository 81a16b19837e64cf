"""Files that are written whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from crossvit.errors import RunError


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Let `path` hold `content`, whole and on disk, or be as it was.

    The content is written beside `path`, synced, then renamed.

    Args:
        path: The file.
        content: Its parts, one after the other.

    Raises:
        RunError: In one line, for a full disk or no permission. The old file stays, and nothing
            half-written.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}; what was there before is kept") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Let a renamed file's name survive a power cut, where a folder can be opened: not on Windows."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system refuses (a full disk, no permission) is a RunError naming `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
