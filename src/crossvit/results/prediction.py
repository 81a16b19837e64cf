"""Predictions of a model for images."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Label:
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or why there is none, in `error`.

    top: the most likely classes first.  labels: the answer: the most likely class; of a multi-label model every class at or
    above its threshold, the most likely first; empty if the image could not be read or the model `abstained`.
    """

    image: str
    top: tuple[Label, ...] = ()
    error: str | None = None
    labels: tuple[Label, ...] = ()
    abstained: bool = False

    @property
    def label(self) -> str | None:
        """The most likely class of the answer; None where there is none."""
        return self.labels[0].label if self.labels else None


@dataclasses.dataclass(frozen=True)
class BatchPrediction:
    """What `crossvit predict --out` wrote: `n` results, `failed` of them errors and `abstained` without an answer. `skipped` were
    there already; the others took `seconds`."""

    run: str
    out: str
    n: int
    failed: int
    abstained: int
    skipped: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return (self.n - self.skipped) / self.seconds if self.seconds else 0.0
