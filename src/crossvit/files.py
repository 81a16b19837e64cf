"""Files that are written whole or not at all, and locks. Standard library only, and filelock."""

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
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def lock(path: Path, *, busy: str, leaves: bool = False) -> Iterator[None]:
    """Hold the file `path`, which stands beside what it guards, for this process.

    The system lets go of it with the process, so a kill leaves at most an empty file that holds
    nobody up.

    Args:
        path: The lock file, made where it is not there.
        busy: What the error says where another process holds it.
        leaves: Whether the file stays afterwards; taken away, it leaves no trace.

    Raises:
        RunError: Where another process, or this one already, holds it; or it cannot be made.
    """
    # imported here: it loads asyncio, which a verb that only reads does without
    from filelock import FileLock, Timeout

    held = FileLock(path, timeout=0)
    try:
        held.acquire()
    except (Timeout, RuntimeError):  # RuntimeError: this thread holds it itself
        raise RunError(busy) from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        held.release()
        if not leaves:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system refuses (a full disk, no permission) is a RunError naming `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
