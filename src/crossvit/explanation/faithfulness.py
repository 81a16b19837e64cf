"""Faithfulness of maps: deletion and insertion of cells of the picture in the order of a map.

Deletion (Petsiuk, Das and Saenko, 2018): the cells with the most relevance are replaced first; if
the answer depends on them, its probability falls early and the area under the curve is small.
Insertion: from a picture with nothing in it, the same cells are put back first; the area should be
large. Cells are those of the finest branch's grid, in the model's input; a map of a coarser grid is
resampled to it bilinearly. Each kind of map is compared with maps of independent random numbers on
the same images: the mean difference of the areas, with a bootstrap interval over the images.

Two controls are measured beside them. `random blobs` are random numbers on the coarsest grid,
resampled like the maps of that grid: their cells lie together, as a map's do, where those of
`random` are scattered, and scattered cells leave a picture recognisable. `centre` is the same for
every picture and falls off from its middle: a map that does not beat it shows only where things
usually are in photos.

Deleted cells are filled with a fixed baseline: `blur`, the picture through a Gaussian whose sigma
is a tenth of its shorter side (colours stay, shapes go), or `mean`, the picture's mean colour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from crossvit.data.eval_batches import fitted_batches
from crossvit.data.sources import open_data
from crossvit.engines.torch import resolve_device
from crossvit.errors import UsageError
from crossvit.explanation.explainer import at_once, finest, probabilities
from crossvit.explanation.relevance import Reading, density, read, summary_row
from crossvit.model.crossvit import CrossViT
from crossvit.results import Curve, Faithfulness, Interval, MapScore, branch_names
from crossvit.trained import Trained, open_trained

FILLS = ("blur", "mean")
RESAMPLINGS = 2000  # of the images, for an interval
CHANGED_AT_ONCE = 256  # pictures of 64x64 pixels in a forward pass; fewer of larger ones
CENTRE, BLOBS, RANDOM = "centre", "random blobs", "random"


def check_maps(
    run: str | Path,
    data: str | Path,
    *,
    images: int = 200,
    steps: int = 10,
    fill: str = "blur",
    split: str | None = None,
    seed: int = 0,
    device: str = "auto",
    skip_bad: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Faithfulness:
    """Deletion and insertion for every kind of map that the model has.

    The probability is that of the class predicted for the whole picture, correct or not.

    Args:
        run: A run folder, a weight file or a name on the hub.
        data: As for training.
        images: Number of pictures, 2 or more, drawn from `data`.
        steps: Number of steps from the whole picture to none of it, 2 or more.
        fill: What replaces deleted cells: blur or mean.
        split: Part of `data`, as for `evaluate`.
        seed: Of the draw, and of the random maps.
        device: auto, cpu, cuda or mps.
        skip_bad: Leave out pictures that cannot be decoded; `n` of the result counts the rest.
        progress: Called with (images done, images in all).

    Raises:
        UsageError: For a wrong call.
        DataError: For a picture that cannot be decoded (unless `skip_bad`).
    """
    for name, value in (("images", images), ("steps", steps)):
        if value < 2:
            raise UsageError(f"{name} = {value}: should be 2 or more")
    if fill not in FILLS:
        raise UsageError(f"fill = {fill!r}: should be one of {', '.join(FILLS)}")
    trained = open_trained(run)
    available, part = trained.select(open_data(data), split)
    generator = np.random.default_rng(seed)
    chosen = available.take(sorted(generator.permutation(len(available))[:images].tolist()))
    place = resolve_device(device)
    model = trained.build().to(place)
    preprocessing = trained.preprocessing
    curves: dict[str, list[NDArray[np.float64]]] = {}
    reading = None
    batch_size = at_once(model, preprocessing.image_size)
    for _, pixels in fitted_batches(
        chosen, preprocessing, batch_size=batch_size, skip_bad=skip_bad, progress=progress
    ):
        batch = torch.from_numpy(preprocessing.normalise(pixels)).to(place)
        reading = read(model, batch)
        orders = _orders(reading, generator)
        for kind, measured in _measure(
            model, trained, batch, reading.targets, orders, fill=fill, steps=steps
        ).items():
            curves.setdefault(kind, []).append(measured)
    assert reading is not None
    joined = {
        kind: np.concatenate(measured) for kind, measured in curves.items()
    }  # (n, 2, steps + 1)
    grid = finest(reading.grids)
    return Faithfulness(
        run=trained.source,
        data=str(data),
        split=part,
        n=len(joined[RANDOM]),
        fill=fill,
        grid=grid,
        shares=tuple(float(count) / (grid[0] * grid[1]) for count in _counts(grid, steps)),
        intact=float(joined[RANDOM][:, 0, 0].mean()),
        emptied=float(joined[RANDOM][:, 0, -1].mean()),
        scores=_scores(joined, _counts(grid, steps) / (grid[0] * grid[1]), seed=seed),
    )


def map_kinds(reading: Reading) -> dict[str, Tensor]:
    """Every kind of map of a batch by its name, (B, rows, columns) on the finest grid."""
    grid = finest(reading.grids)
    branches = branch_names(len(reading.grids))
    kinds = {
        "rollout": density(reading.on_grids(reading.rollout.mean(dim=0)), grid),
        "gradient-weighted": density(reading.on_grids(reading.gradient.mean(dim=0)), grid),
    }
    for seen in reading.attention:  # later ones replace earlier ones: the last block of all stays
        weights = seen.weights.mean(dim=1)  # (B, M, N)
        if seen.kind == "cross":
            assert seen.branch is not None
            source = (seen.branch + 1) % len(branches)
            if weights.shape[-1] > 1:
                values = weights[:, 0, 1:].unflatten(-1, reading.grids[source])
                kinds[f"cross: {branches[seen.branch]} reads {branches[source]}"] = density(
                    [values], grid
                )
        elif seen.kind == "self":
            assert seen.branch is not None
            row = summary_row(weights, reading.has_class_token)[:, 0, reading.has_class_token :]
            kinds[f"attention: {branches[seen.branch]}"] = density(
                [row.unflatten(-1, reading.grids[seen.branch])], grid
            )
        else:
            counts = [reading.has_class_token + rows * columns for rows, columns in reading.grids]
            for reader, rows_of in zip(branches, weights.split(counts, dim=1), strict=True):
                row = summary_row(rows_of, reading.has_class_token)[:, 0]
                kinds[f"cross: {reader} reads all"] = density(reading.on_grids(row), grid)
    return kinds


def _orders(reading: Reading, generator: np.random.Generator) -> dict[str, Tensor]:
    """Cells of each map and control, the most relevant first, (B, cells); ties at random."""
    rows, columns = finest(reading.grids)
    down, across = (
        torch.linspace(-1, 1, side, dtype=torch.float64) if side > 1 else torch.zeros(1)
        for side in (rows, columns)
    )
    centre = -(down[:, None] ** 2 + across[None, :] ** 2).expand(len(reading.targets), -1, -1)
    coarsest = min(reading.grids, key=lambda grid: grid[0] * grid[1])
    blobs = density([torch.from_numpy(generator.random((len(centre), *coarsest)))], (rows, columns))
    kinds = {kind: values.double().cpu() for kind, values in map_kinds(reading).items()}
    orders = {}
    for kind, values in {
        **kinds,
        CENTRE: centre,
        BLOBS: blobs,
        RANDOM: torch.zeros_like(centre),
    }.items():
        shuffled = torch.from_numpy(
            generator.permuted(np.tile(np.arange(rows * columns), (len(values), 1)), axis=1)
        )
        ranked = values.flatten(1).gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
        orders[kind] = shuffled.gather(1, ranked)
    return orders


def _counts(grid: tuple[int, int], steps: int) -> NDArray[np.int64]:
    """Number of cells changed at each point of a curve, from none to all."""
    counts: NDArray[np.int64] = np.unique(
        np.round(np.linspace(0, grid[0] * grid[1], steps + 1)).astype(np.int64)
    )
    return counts


def _measure(
    model: CrossViT,
    trained: Trained,
    images: Tensor,
    targets: Tensor,
    orders: dict[str, Tensor],
    *,
    fill: str,
    steps: int,
) -> dict[str, NDArray[np.float64]]:
    """Probabilities of the targets, (B, 2, points), of each kind: deletion, then insertion."""
    grid = finest(
        [branch.grid((images.shape[-2], images.shape[-1])) for branch in model.config.branches]
    )
    counts = torch.from_numpy(_counts(grid, steps))
    empty = filled(images, fill)

    def target_probabilities(deleted: Tensor) -> Tensor:
        """deleted: (B, points, cells) booleans -> probabilities (B, points)."""
        masks = deleted.unflatten(-1, grid).to(images.device, images.dtype)
        wide = F.interpolate(
            masks, size=images.shape[-2:], mode="nearest"
        ).bool()  # (B, points, H, W)
        changed = torch.where(wide[:, :, None], empty[:, None], images[:, None]).flatten(0, 1)
        pieces = changed.split(
            max(1, CHANGED_AT_ONCE * 64 * 64 // (images.shape[-1] * images.shape[-2]))
        )
        logits = torch.cat([model(piece) for piece in pieces])
        gathered = probabilities(logits, trained).gather(
            1, targets.repeat_interleave(deleted.shape[1])[:, None]
        )
        return gathered.view(len(images), -1).cpu()

    measured = {}
    with torch.inference_mode():
        ends = target_probabilities(
            torch.tensor([False, True])[None, :, None].expand(len(images), -1, grid[0] * grid[1])
        )
        for kind, order in orders.items():
            rank = order.argsort(dim=1)  # (B, cells): 0 for the most relevant
            first = rank[:, None, :] < counts[None, 1:-1, None]  # (B, points between, cells)
            inside = target_probabilities(torch.cat((first, ~first), dim=1)).chunk(2, dim=1)
            deletion = torch.cat((ends[:, :1], inside[0], ends[:, 1:]), dim=1)
            insertion = torch.cat((ends[:, 1:], inside[1], ends[:, :1]), dim=1)
            measured[kind] = torch.stack((deletion, insertion), dim=1).numpy()
    return measured


def filled(images: Tensor, fill: str) -> Tensor:
    """The baseline of deleted cells: (B, C, H, W) -> the same shape; see the module."""
    if fill == "mean":
        return images.mean(dim=(-2, -1), keepdim=True).expand_as(images)
    shorter = min(images.shape[-2:])
    sigma = shorter / 10
    # three sigmas each way, as far as the mirrored border allows
    kernel = 2 * min(int(3 * sigma), shorter - 1) + 1
    blurred: Tensor = gaussian_blur(images, kernel_size=[kernel, kernel], sigma=[sigma, sigma])
    return blurred


def _scores(
    curves: dict[str, NDArray[np.float64]], shares: NDArray[np.float64], *, seed: int
) -> tuple[MapScore, ...]:
    """Scores of each kind from its curves (n, 2, points), with bootstrap intervals over images."""
    n = len(curves[RANDOM])
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLINGS, n))
    # (resamplings, n): the mean of a resampling is a product with a row
    weights = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n
    areas = {
        kind: np.asarray(np.trapezoid(measured, shares, axis=-1))
        for kind, measured in curves.items()
    }  # (n, 2)
    scores = []
    for kind, measured in curves.items():
        # lower is better for deletion, higher for insertion
        gains = (areas[kind] - areas[RANDOM]) * np.array([-1.0, 1.0])
        deletion, insertion = (
            _curve(measured[:, way], areas[kind][:, way], weights) for way in range(2)
        )
        first, second = (_interval(weights @ gains[:, way]) for way in range(2))
        scores.append(
            MapScore(
                kind=kind,
                deletion=deletion,
                insertion=insertion,
                deletion_gain=float(gains[:, 0].mean()),
                deletion_gain_interval=first,
                insertion_gain=float(gains[:, 1].mean()),
                insertion_gain_interval=second,
                deletion_verdict=_verdict(first),
                insertion_verdict=_verdict(second),
            )
        )
    return tuple(scores)


def _curve(
    measured: NDArray[np.float64], areas: NDArray[np.float64], weights: NDArray[np.float64]
) -> Curve:
    resampled = weights @ measured  # (resamplings, points)
    intervals = tuple(_interval(place) for place in resampled.T)
    return Curve(tuple(measured.mean(axis=0).tolist()), intervals, float(areas.mean()))


def _interval(resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(low), float(high))


def _verdict(gain: Interval) -> str:
    if gain.low > 0:
        return "better"
    return "worse" if gain.high < 0 else "no different"
