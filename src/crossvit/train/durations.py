"""Lengths of training with a unit: `500 steps`, `30 epochs`, `10 %` of the run, `15 min`. Standard library only."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

from crossvit.errors import ConfigError

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
STEP_UNITS = ("steps", "epochs", "%")
UNITS = (*STEP_UNITS, *SECONDS)
_SPELLINGS = {
    "step": "steps",
    "epoch": "epochs",
    "percent": "%",
    "sec": "s",
    "seconds": "s",
    "minutes": "min",
    "hours": "h",
}


class Duration(NamedTuple):
    """amount of a unit of UNITS."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{Decimal(repr(self.amount)).normalize():f} {self.unit}"  # never 1e+06, which `parse_duration` does not read

    def steps(self, *, per_epoch: int, total: int) -> int:
        """Whole steps, where an epoch has `per_epoch` and the run `total`. Only for a unit of STEP_UNITS."""
        return round(self.amount * {"steps": 1.0, "epochs": per_epoch, "%": total / 100}[self.unit])

    @property
    def seconds(self) -> float | None:
        """None for a unit of STEP_UNITS."""
        return self.amount * SECONDS[self.unit] if self.unit in SECONDS else None


def parse_duration(text: str, *, name: str, units: tuple[str, ...] = UNITS) -> Duration:
    """`30 epochs`, `30epochs`, `1 epoch`. ConfigError with the field's name for anything else, as for more than 100 %; `0` needs
    no unit."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([a-z%]*)\s*", text)
    unit = _SPELLINGS.get(match[2], match[2]) if match else ""
    if match and not unit and float(match[1]) == 0:
        return Duration(0.0, units[0])
    if not match or unit not in units:
        raise ConfigError(
            f"{name} = {text!r}: should be a number with a unit ({', '.join(units)}), such as '{_EXAMPLES[units[0]]}'"
        )
    if unit == "%" and float(match[1]) > 100:
        raise ConfigError(f"{name} = {text!r}: should be at most 100 % of the run")
    return Duration(float(match[1]), unit)


_EXAMPLES = {
    "steps": "500 steps",
    "epochs": "10 epochs",
    "%": "10 %",
    "s": "30 s",
    "min": "15 min",
    "h": "1 h",
}
