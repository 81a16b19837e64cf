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
    """The prediction for one image.

    Attributes:
        image: Name of the image.
        top: The most probable classes, the most probable first.
        error: Why the image could not be read; None where it was.
        labels: The answer: the most probable class, or for a multi-label model every class at or
            above its threshold, the most probable first. Empty without an answer.
        abstained: Whether the confidence was below `abstain_below`.
    """

    image: str
    top: tuple[Label, ...] = ()
    error: str | None = None
    labels: tuple[Label, ...] = ()
    abstained: bool = False

    @property
    def label(self) -> str | None:
        """The most probable class of the answer; None without an answer."""
        return self.labels[0].label if self.labels else None


@dataclasses.dataclass(frozen=True)
class BatchPrediction:
    """Summary of `crossvit predict --out`.

    Attributes:
        run: The model, as it was given.
        out: The file or folder of results.
        n: Number of results.
        failed: Number of them that are errors.
        abstained: Number of them without an answer because of low confidence.
        skipped: Number of them written by an earlier call.
        seconds: Duration of the others.
    """

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
