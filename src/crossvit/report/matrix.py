"""The confusion matrix as a page shows it: which classes, in which shade, and what is taken for what most often."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from crossvit.results import Evaluation

ALL_SHOWN = 150  # classes up to which the matrix has all of them
MOST_CONFUSED = 60  # classes it has beyond that
NUMBERED = 25  # classes up to which the counts are written into the cells
PAIRS = 10  # of classes that are taken for one another most often


@dataclasses.dataclass(frozen=True)
class Cell:
    """`count` images of the row's class that were answered with the column's. shade: 0 to 1, the square root of the share of
    the row, so that one mistake of a hundred can be seen."""

    count: int
    shade: float
    right: bool
    says: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A true class: its images, how many of them were answered wrongly, its cells, and its answers outside the matrix."""

    name: str
    n: int
    wrong: int
    cells: tuple[Cell, ...]
    others: int


@dataclasses.dataclass(frozen=True)
class Confused:
    """`count` of the `n` images of `label` were taken for `answer`."""

    label: str
    answer: str
    count: int
    n: int


@dataclasses.dataclass(frozen=True)
class Matrix:
    """names: of the classes shown, of `classes` in all. pairs: the most frequent mistakes. taken_for: of every class, what it is
    most often taken for; None where it never is."""

    names: tuple[str, ...]
    classes: int
    rows: tuple[Row, ...]
    pairs: tuple[Confused, ...]
    taken_for: dict[str, Confused | None]

    @property
    def numbered(self) -> bool:
        return len(self.names) <= NUMBERED

    @property
    def cut(self) -> bool:
        """Whether classes were left out."""
        return len(self.names) < self.classes


def matrix_of(evaluation: Evaluation) -> Matrix | None:
    """The matrix of an evaluation, of the classes that are confused most where there are more than ALL_SHOWN; None where it
    has no confusion, as of a multi-label model."""
    counts = evaluation.confusion
    if not counts.size:
        return None
    labels = [score.label for score in evaluation.classes]
    wrong = counts - np.diag(counts.diagonal())
    shown = np.arange(len(labels))
    if len(labels) > ALL_SHOWN:
        involved = wrong.sum(axis=0) + wrong.sum(axis=1)
        shown = np.sort(np.argsort(-involved, kind="stable")[:MOST_CONFUSED])
    rows = []
    for true in shown:
        total = int(counts[true].sum())
        cells = tuple(
            _cell(labels, int(true), int(answer), int(counts[true, answer]), total)
            for answer in shown
        )
        rows.append(
            Row(
                labels[true],
                total,
                int(wrong[true].sum()),
                cells,
                total - sum(cell.count for cell in cells),
            )
        )
    places = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    trues, answers = np.unravel_index(places, wrong.shape)
    return Matrix(
        names=tuple(labels[index] for index in shown),
        classes=len(labels),
        rows=tuple(rows),
        pairs=tuple(
            Confused(
                labels[true], labels[answer], int(wrong[true, answer]), int(counts[true].sum())
            )
            for true, answer in zip(trues, answers, strict=True)
            if wrong[true, answer]
        ),
        taken_for={
            label: Confused(label, labels[row.argmax()], int(row.max()), int(own.sum()))
            if row.any()
            else None
            for label, row, own in zip(labels, wrong, counts, strict=True)
        },
    )


def _cell(labels: list[str], true: int, answer: int, count: int, total: int) -> Cell:
    what = (
        f"{labels[true]}: right" if true == answer else f"{labels[true]} taken for {labels[answer]}"
    )
    share = count / max(total, 1)
    return Cell(
        count,
        math.sqrt(share),
        true == answer,
        f"{what}, {count} of {total} ({100 * share:.1f}\u202f%)",
    )
