"""Comparison of runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from crossvit.results.evaluation import Comparison, Evaluation
from crossvit.results.run_record import RunRecord
from crossvit.results.training import Epoch


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One of the compared runs.

    Attributes:
        name: Short name, unique among them.
        run: Its folder.
        model: Name of the preset.
        parameters: Number of parameters.
        macs: Multiply-accumulates of one image as the model computes them; None with a part that is
            not built in.
        seconds: Duration of training.
        evaluation: On the common images.
        record: Its run.json, left out of JSON.
        epochs: Its log, left out of JSON.
    """

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
    """Runs on the same `n` images.

    Attributes:
        data: The data, as they were given.
        split: Part of the data.
        n: Number of images.
        runs: The runs.
        tests: Each run but the first, against the first.
        differing: Fields of the recipe that differ, with their values in the order of `runs` (None
            where a run has no such field).
    """

    data: str
    split: str
    n: int
    runs: tuple[ComparedRun, ...]
    tests: tuple[Comparison, ...]
    differing: dict[str, tuple[Any, ...]]
