"""The page of runs side by side."""

from __future__ import annotations

import dataclasses

from markupsafe import Markup

from crossvit.report import plots
from crossvit.report.templates import environment
from crossvit.results import ClassScore, Comparison, Interval, RunsCompared
from crossvit.text import measured_duration

MARGIN = 0.12  # share of an axis that is empty at either end
CHANCE = 0.05  # p-value below which a difference counts as more than chance


def comparison_page(found: RunsCompared, *, command: str) -> str:
    """HTML of a comparison: accuracy, paired tests, curves, classes, branches, cost, recipes."""
    intervals = [run.evaluation.intervals.get("top1") for run in found.runs]
    classes = _classes(found)
    curves = (
        plots.overlaid([(run.name, run.epochs) for run in found.runs])
        if all(run.epochs for run in found.runs)
        else []
    )
    return (
        environment()
        .get_template("comparison.html")
        .render(
            found=found,
            colours=[
                f"var(--s{index % len(plots.SERIES) + 1})" for index in range(len(found.runs))
            ],
            accuracies=Axis.around(
                [
                    *intervals,
                    *(Interval(run.evaluation.top1, run.evaluation.top1) for run in found.runs),
                ]
            ),
            differences=Axis.around([*(test.interval for test in found.tests), Interval(0, 0)]),
            conclusions=[
                _conclusion(found.runs[0].name, run.name, test)
                for run, test in zip(found.runs[1:], found.tests, strict=True)
            ],
            branches=_branches(found),
            classes=classes,
            largest=max(0.001, *(abs(row.difference) for row in classes)),
            curves=[Markup(svg) for svg in curves],  # noqa: S704  # our own SVGs
            spoken_seconds=measured_duration,
            command=command,
        )
    )


@dataclasses.dataclass(frozen=True)
class Axis:
    """The range of values that the width of a table cell stands for."""

    low: float
    high: float

    @classmethod
    def around(cls, intervals: list[Interval | None]) -> Axis:
        known = [interval for interval in intervals if interval is not None]
        low, high = min(item.low for item in known), max(item.high for item in known)
        margin = max(high - low, 0.01) * MARGIN
        return cls(low - margin, high + margin)

    def at(self, figure: float) -> str:
        """Where on the line `figure` is, for a style."""
        return f"{100 * (figure - self.low) / (self.high - self.low):.1f}%"

    def across(self, interval: Interval) -> str:
        """How much of the line `interval` takes."""
        return f"{100 * (interval.high - interval.low) / (self.high - self.low):.1f}%"


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """One class: F1 in every run (None where a run has no such class) and how far they are apart.

    The difference is the second minus the first, or of more runs the highest minus the lowest.
    """

    label: str
    n: int
    scores: tuple[float | None, ...]
    difference: float


def _conclusion(first: str, name: str, test: Comparison) -> str:
    """The result of a paired test in a sentence."""
    if test.only_first == test.only_second:
        return f"{name} gets as many right as {first}."
    better, worse = (name, first) if test.difference > 0 else (first, name)
    if test.p < CHANCE:
        return (
            f"{better} is better than {worse}: "
            "were they equally good, a difference like this would be rare."
        )
    return f"{better} gets more right than {worse}, and that may be chance."


def _branches(found: RunsCompared) -> list[tuple[str, list[float | None]]]:
    """(branch, its accuracy alone in every run), under the name of the first run that has it."""
    names = dict.fromkeys(branch.name for run in found.runs for branch in run.evaluation.branches)
    scores = [
        {branch.name: branch.top1 for branch in run.evaluation.branches} for run in found.runs
    ]
    return [(name, [run_scores.get(name) for run_scores in scores]) for name in names]


def _classes(found: RunsCompared) -> list[ClassRow]:
    """Every class that has images, those that differ most first."""
    scores: list[dict[str, ClassScore]] = [
        {score.label: score for score in run.evaluation.classes} for run in found.runs
    ]
    rows = []
    for label in dict.fromkeys(label for by_label in scores for label in by_label):
        n = max(by_label[label].n for by_label in scores if label in by_label)
        f1 = tuple(by_label[label].f1 if label in by_label else None for by_label in scores)
        if n:
            known = [value or 0.0 for value in f1]
            rows.append(
                ClassRow(
                    label,
                    n,
                    f1,
                    known[1] - known[0] if len(known) == 2 else max(known) - min(known),
                )
            )
    return sorted(rows, key=lambda row: (-abs(row.difference), row.label))
