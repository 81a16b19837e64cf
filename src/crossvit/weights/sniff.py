"""What a file is by its first bytes and its length, before anything in it is read. Suffixes are not trusted."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from crossvit.errors import WeightsError

LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def kind_of(path: Path, *, name: str = "") -> str:
    """`safetensors` or `torch` for a whole file of either. WeightsError, with what it is instead, for any other. `name` is what
    the message calls it, the path if empty."""
    name = name or str(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) == 9 and start[8:] == b"{" and length <= LONGEST_HEADER:
            return _whole_safetensors(name, b"{" + file.read(length - 1), size)
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise WeightsError(
                f"{name} cannot be read as weights (cut off): fetch or save it again"
            )
        return "torch"
    if start[:1] == b"\x80":  # a pickle: torch's format before 1.6
        return "torch"
    seen = (
        "an empty file"
        if not size
        else "a web page"
        if start.lstrip().startswith(b"<")
        else "not a file of tensors"
    )
    raise WeightsError(f"{name} cannot be read as weights ({seen}): fetch or save it again")


def _whole_safetensors(name: str, header: bytes, size: int) -> str:
    try:
        entries = json.loads(header)
        end = max(
            (entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"),
            default=0,
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise WeightsError(
            f"{name} cannot be read as weights (its header is damaged): fetch or save it again"
        ) from None
    if size != 8 + len(header) + end:
        raise WeightsError(f"{name} cannot be read as weights (cut off): fetch or save it again")
    return "safetensors"
