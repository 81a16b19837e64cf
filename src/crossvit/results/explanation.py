"""What an answer was read from, and whether such maps mean anything."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from crossvit.results.evaluation import Interval
from crossvit.results.prediction import Label


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """How much of something each patch of one grid has: (heads, rows, columns), or (1, rows, columns) where heads are joined.

    kind: `attention` (what the class token of branch `reader` attended to in its own block; the mean over its patches in a model
    without class tokens), `cross` (what it read from another branch in a fusion), `rollout` and `gradient` (what its answer was
    read from, through all stages; gradient for one class), `difference` (its gradient map less the mean of the others').
    reader: a branch, or `all` for the mean of their logits. on: the branch whose grid it is, or `all` for every grid's map
    brought to the finest one. share: of what was read, the part that lies on these patches, 0 to 1: the rest is on class tokens
    and on other grids (for gradient on other grids alone). stage, block: from 1, None for what goes through all of them.

    Values of attention, cross, rollout and gradient are shares of what was read; on `all` they are multiples of the average (their
    mean is 1), and a difference is one of those.
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
        """What it is called among the arrays of an explanation: `attention.L.on-L.stage3.block4`."""
        place = "" if self.stage is None else f".stage{self.stage}.block{self.block}"
        return f"{self.kind}.{self.reader}.on-{self.on}{place}"


@dataclasses.dataclass(frozen=True)
class BranchAnswer:
    """One branch alone: its patch in pixels, its grid (rows, columns), its own answer, and what it gives the explained class.

    from_other: of what it read (rollout), the share that came from other branches' patches.
    """

    name: str
    patch: int
    grid: tuple[int, int]
    top: Label
    explained: Label
    from_other: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an answer was read from; or why there is none, in `error`.

    top: the model's answer. explained: the class the gradient maps are for. disagreement: how far apart the branches' gradient
    maps are, 0 (the same) to 1 (on different patches): the share of a branch's that would have to be moved to make it the mean
    of the others', on average over the branches. size: (width, height) of the picture, upright; seen: (left, top, right,
    bottom), the part of it that the model saw, in its pixels. photo: the picture, made smaller, (H, W, 3) uint8. features: of
    each branch the last encoder's patch tokens, (D, rows, columns). picture, arrays: the files that were written.
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
        """The maps of one kind, in the order of stages and blocks."""
        criteria = {"reader": reader, "on": on, "stage": stage}
        wanted = {name: value for name, value in criteria.items() if value is not None}
        return [
            item
            for item in self.maps
            if item.kind == kind and all(getattr(item, name) == wanted[name] for name in wanted)
        ]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The mean probability of the class (0 to 1) at each share of changed cells, its intervals and the area under it."""

    mean: tuple[float, ...]
    intervals: tuple[Interval, ...]
    area: float


@dataclasses.dataclass(frozen=True)
class MapScore:
    """How well one kind of map says what the answer hangs on.

    deletion: the most relevant cells taken away first; the lower the better. insertion: put back first; the higher the better.
    deletion_gain, insertion_gain: by how much the area is better than that of random maps on the same images (positive is
    better), with their 95 % intervals. verdict: `better` where that lies above zero, `worse` where below, else `no different`.
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
    """Deletion and insertion of cells of the finest grid, for each kind of map, on `n` images; `fill` stands where one is away.

    shares: of cells changed, the places of the curves. intact, emptied: mean probability of the class (the model's own answer on
    the whole picture) with every cell there and with none. scores: every kind of map, then the controls.
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
