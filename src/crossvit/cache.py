"""What is kept between one process and the next, in a folder of the user's cache. Standard library only.

Whatever is in it can be removed: it is fetched, exported, compiled or counted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from crossvit.errors import RunError
from crossvit.files import write_atomically

SETTLED = 2.0  # seconds after which a second write shows in a file's times, whatever the file system: FAT counts in twos


def cache_folder() -> Path:
    """Where it is: $CROSSVIT_CACHE, or `crossvit` in the user's cache folder. It may not be there yet."""
    named = os.environ.get("CROSSVIT_CACHE")
    return (
        Path(named).expanduser()
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crossvit"
    )


def digest_of(path: Path) -> str:
    """The sha256 of a file's bytes; OSError if it cannot be read.

    It is remembered with the file's identity, size and times, as make and git do, so that an unchanged file is read once: a file
    written just now, whose times a second write might not change, is not remembered yet.
    """
    record = cache_folder() / "digests.json"
    known = _known(record)
    name = str(path.resolve())
    stat = path.stat()
    shown = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if (entry := known.get(name)) and entry[0] == shown:
        return str(entry[1])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        there = {other: entry for other, entry in known.items() if Path(other).is_file()}
        _keep(record, {**there, name: [shown, digest]})
    return digest


def _known(record: Path) -> dict[str, list[Any]]:
    """Path -> [what `stat` said, digest]; empty where nothing that makes sense is kept."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return {name: [list(shown), str(digest)] for name, (shown, digest) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(record: Path, digests: dict[str, list[Any]]) -> None:
    """A cache that cannot be written means reading the file again next time, nothing more."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(digests, indent=1).encode())
    except (OSError, RunError):
        pass
