"""What several rooms print alike: shares, durations, the line of `--json`. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

THIN = "\u202f"  # a thin space that does not break, for pages


def percent(share: float, *, decimals: int = 1, space: str = " ") -> str:
    """A share as people read it: 0.5234 -> `52.3 %`.

    Args:
        share: 0 to 1.
        decimals: After the point.
        space: Between the number and the sign; `THIN` on pages.
    """
    return f"{100 * share:.{decimals}f}{space}%"


def duration(seconds: float) -> str:
    """About how long, for what is estimated: `45 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def measured_duration(seconds: float) -> str:
    """How long it took: `4.2 s`, `130 s`, `35 min`, `3.4 h`."""
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def json_line(record: Mapping[str, Any] | list[Any]) -> str:
    """One line of JSON: letters of every language as they are, numbers finite.

    Raises:
        ValueError: For a number that is not finite, which JSON cannot hold.
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False)
