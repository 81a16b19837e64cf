"""The confusion matrix of a page: its classes, shades, and the most frequent confusions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from crossvit.results import Evaluation

ALL_SHOWN = 150  # classes up to which the matrix has all of them
MOST_CONFUSED = 60  # classes it has beyond that
NUMBERED = 25  # classes up to which the counts are written into the cells
PAIRS = 10  # most frequent confusions


@dataclasses.dataclass(frozen=True)
class Cell:
    """Images of the row's class that were predicted as the column's.

    Attributes:
        count: Number of images.
        shade: Square root of their share of the row, 0 to 1: one mistake in a hundred is visible.
        correct: Whether the prediction is the true class.
        description: The cell in words.
    """

    count: int
    shade: float
    correct: bool
    description: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A true class.

    Attributes:
        name: Of the class.
        n: Number of its images.
        wrong: Number predicted as another class.
        cells: Of the classes shown.
        others: Number predicted as a class that is not shown.
    """

    name: str
    n: int
    wrong: int
    cells: tuple[Cell, ...]
    others: int


@dataclasses.dataclass(frozen=True)
class Confused:
    """`count` of the `n` images of `label` were predicted as `predicted`."""

    label: str
    predicted: str
    count: int
    n: int


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A confusion matrix as a page shows it.

    Attributes:
        names: Of the classes shown.
        classes: Number of all classes.
        rows: One of each class shown.
        pairs: The most frequent confusions.
        confused_with: The most frequent confusion of every class; None where there is none.
    """

    names: tuple[str, ...]
    classes: int
    rows: tuple[Row, ...]
    pairs: tuple[Confused, ...]
    confused_with: dict[str, Confused | None]

    @property
    def numbered(self) -> bool:
        return len(self.names) <= NUMBERED

    @property
    def cut(self) -> bool:
        """Whether classes were left out."""
        return len(self.names) < self.classes


def matrix_of(evaluation: Evaluation) -> Matrix | None:
    """The matrix of an evaluation; None of a multi-label model.

    Of more than ALL_SHOWN classes it has the MOST_CONFUSED ones.
    """
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
            _cell(labels, int(true), int(predicted), int(counts[true, predicted]), total)
            for predicted in shown
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
    true_classes, predictions = np.unravel_index(places, wrong.shape)
    return Matrix(
        names=tuple(labels[index] for index in shown),
        classes=len(labels),
        rows=tuple(rows),
        pairs=tuple(
            Confused(
                labels[true],
                labels[predicted],
                int(wrong[true, predicted]),
                int(counts[true].sum()),
            )
            for true, predicted in zip(true_classes, predictions, strict=True)
            if wrong[true, predicted]
        ),
        confused_with={
            label: Confused(label, labels[row.argmax()], int(row.max()), int(images.sum()))
            if row.any()
            else None
            for label, row, images in zip(labels, wrong, counts, strict=True)
        },
    )


def _cell(labels: list[str], true: int, predicted: int, count: int, total: int) -> Cell:
    what = (
        f"{labels[true]}: correct"
        if true == predicted
        else f"{labels[true]} predicted as {labels[predicted]}"
    )
    share = count / max(total, 1)
    return Cell(
        count,
        math.sqrt(share),
        true == predicted,
        f"{what}, {count} of {total} ({100 * share:.1f}\u202f%)",
    )
