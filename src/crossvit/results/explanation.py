"""Relevance maps of a prediction, and their faithfulness."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from crossvit.results.evaluation import Interval
from crossvit.results.prediction import Label


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """A map over the patches of one grid.

    Attributes:
        kind: `attention`: weights of the class token of branch `reader` in a block (the mean over
            its patches in a model without class tokens). `cross`: weights of its read from another
            branch in a fusion. `rollout`, `gradient`: relevance for its answer through all stages,
            gradient for one class. `difference`: its gradient map minus the mean of the others'.
        reader: A branch, or `all` for the mean of their logits.
        on: The branch whose grid it is, or `all` for the maps of every grid, resampled to the
            finest one.
        share: Part of the weight that lies on these patches, 0 to 1; the rest is on class tokens
            and on other grids (for gradient on other grids alone).
        values: (heads, rows, columns), or (1, rows, columns) where heads are averaged. They are
            shares of the weight; on `all`, multiples of the average (mean 1), and a difference is
            one of those.
        stage: From 1; None for maps through all stages.
        block: From 1; None for maps through all blocks.
    """

    kind: str
    reader: str
    on: str
    share: float
    values: NDArray[np.float32] = dataclasses.field(repr=False, metadata={"json": False})
    stage: int | None = None
    block: int | None = None

    @property
    def name(self) -> str:
        """Its name in the file of arrays, for instance `attention.L.on-L.stage3.block4`."""
        place = "" if self.stage is None else f".stage{self.stage}.block{self.block}"
        return f"{self.kind}.{self.reader}.on-{self.on}{place}"


@dataclasses.dataclass(frozen=True)
class BranchAnswer:
    """The answer of one branch's head.

    Attributes:
        name: S, L or a number.
        patch: Side in pixels.
        grid: (rows, columns).
        top: Its most probable class.
        explained: Its probability of the explained class.
        from_other: Share of its rollout relevance on other branches' patches, 0 to 1.
    """

    name: str
    patch: int
    grid: tuple[int, int]
    top: Label
    explained: Label
    from_other: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which parts of an image the prediction came from.

    Attributes:
        image: Name of the image.
        top: The model's answer.
        explained: The class of the gradient maps.
        branches: The answer of each branch.
        disagreement: Distance of the branches' gradient maps, 0 (equal) to 1 (on different
            patches): the share of a branch's map that would have to move to make it the mean of
            the others', averaged over the branches.
        size: (width, height) of the upright image in pixels.
        seen: (left, top, right, bottom) of the part that the model saw, in pixels of the image.
        maps: Every map.
        photo: The image, scaled down, (H, W, 3) uint8.
        features: Patch tokens of each branch after the last encoder, (D, rows, columns).
        picture: File of the sheet, where it was written.
        arrays: File of the arrays, where it was written.
        features_picture: File of the feature maps, where it was written.
        error: Why the image could not be explained; None where it was.
    """

    image: str
    top: Label | None = None
    explained: Label | None = None
    branches: tuple[BranchAnswer, ...] = ()
    disagreement: float | None = None
    size: tuple[int, int] | None = None
    seen: tuple[float, float, float, float] | None = None
    maps: tuple[TokenMap, ...] = dataclasses.field(default=(), repr=False)
    photo: NDArray[np.uint8] | None = dataclasses.field(
        default=None, repr=False, metadata={"json": False}
    )
    features: tuple[NDArray[np.float32], ...] = dataclasses.field(
        default=(), repr=False, metadata={"json": False}
    )
    picture: str | None = None
    arrays: str | None = None
    features_picture: str | None = None
    error: str | None = None

    def select(
        self,
        kind: str,
        *,
        reader: str | None = None,
        on: str | None = None,
        stage: int | None = None,
    ) -> list[TokenMap]:
        """Maps of one kind in the order of stages and blocks.

        Args:
            kind: As `TokenMap.kind`.
            reader: Only maps of this branch, or `all`.
            on: Only maps on this branch's grid, or `all`.
            stage: Only maps of this stage, from 1.
        """
        criteria = {"reader": reader, "on": on, "stage": stage}
        wanted = {name: value for name, value in criteria.items() if value is not None}
        return [
            item
            for item in self.maps
            if item.kind == kind and all(getattr(item, name) == wanted[name] for name in wanted)
        ]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Mean probability of the class (0 to 1) at each share of changed cells.

    With its 95 % intervals and the area under the curve.
    """

    mean: tuple[float, ...]
    intervals: tuple[Interval, ...]
    area: float


@dataclasses.dataclass(frozen=True)
class MapScore:
    """Deletion and insertion curves of one kind of map, against random maps.

    Attributes:
        kind: The kind of map.
        deletion: Curve of deleting the most relevant cells first; lower is better.
        insertion: Curve of inserting the most relevant cells first; higher is better.
        deletion_gain: By how much the area is better than that of random maps on the same images.
        deletion_gain_interval: Its 95 % interval.
        insertion_gain: As `deletion_gain`.
        insertion_gain_interval: Its 95 % interval.
        deletion_verdict: `better` where the interval lies above zero, `worse` where below, else
            `no different`.
        insertion_verdict: As `deletion_verdict`.
    """

    kind: str
    deletion: Curve
    insertion: Curve
    deletion_gain: float
    deletion_gain_interval: Interval
    insertion_gain: float
    insertion_gain_interval: Interval
    deletion_verdict: str
    insertion_verdict: str


@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """Deletion and insertion of cells of the finest grid, for each kind of map.

    The probability is that of the class predicted for the whole image.

    Attributes:
        run: The model, as it was given.
        data: The data, as they were given.
        split: Part of the data.
        n: Number of images.
        fill: What replaces a deleted cell: blur or mean.
        grid: (rows, columns) of the cells.
        shares: Shares of changed cells at which the curves were measured, 0 to 1.
        intact: Mean probability with every cell.
        emptied: Mean probability with every cell deleted.
        scores: Every kind of map, then the controls.
    """

    run: str
    data: str
    split: str
    n: int
    fill: str
    grid: tuple[int, int]
    shares: tuple[float, ...]
    intact: float
    emptied: float
    scores: tuple[MapScore, ...]
