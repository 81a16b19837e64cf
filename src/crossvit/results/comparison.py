"""Runs side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

from crossvit.results.evaluation import Comparison, Evaluation
from crossvit.results.run_record import RunRecord
from crossvit.results.training import Epoch


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One of several runs: a short name that no other has, what it costs (parameters, and multiply-accumulates of one image as it
    computes them, None where a part that is not built in has its own), the seconds it was trained for, and how it did. record (`run.json`) and epochs are left out of JSON."""

    name: str
    run: str
    model: str
    parameters: int
    macs: int | None
    seconds: float
    evaluation: Evaluation
    record: RunRecord = dataclasses.field(repr=False, metadata={"json": False})
    epochs: tuple[Epoch, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True)
class RunsCompared:
    """Runs on the same n images. tests: of each run but the first against the first. differing: of each field of the recipe that
    is not the same in all, its values in the order of `runs` (None where a run has no such field)."""

    data: str
    split: str
    n: int
    runs: tuple[ComparedRun, ...]
    tests: tuple[Comparison, ...]
    differing: dict[str, tuple[Any, ...]]
