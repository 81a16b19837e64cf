"""Explanations: relevance maps of each branch, what passed between them, where they disagree.

The mathematics is in `relevance.py`; `faithfulness.py` measures whether the maps mean anything.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossvit.data.preprocess import ImageSource, Preprocessing, read_image, source_name
from crossvit.engines.torch import resolve_device
from crossvit.errors import DataError, unknown_name
from crossvit.explanation.relevance import Reading, density, read, token_counts
from crossvit.model.attention import AttentionMap
from crossvit.model.crossvit import CrossViT
from crossvit.results import BranchAnswer, Explanation, Label, TokenMap, branch_names
from crossvit.trained import MULTI_LABEL, Trained, open_trained

PHOTO_SIDE = 640  # pixels of the longer side of the picture kept with an explanation
TOKENS_AT_ONCE = 2**21  # entries of a batch's (T, T) matrices: a few hundred MB with gradients
MOST_AT_ONCE = 64  # images
ALL = "all"


class Explainer:
    """Explains the predictions of one trained model.

    `explainer(image)` takes a path, the bytes of a file, a Pillow image or a uint8 array. It always
    returns an `Explanation`: for an image that cannot be decoded, one with `error` set.

    Args:
        run: A run folder, a weight file or a name on the hub.
        class_name: Explain this class instead of the predicted one.
        device: auto, cpu, cuda or mps.

    Raises:
        UnknownNameError: For a class that the model does not have.
    """

    def __init__(
        self, run: str | Path, *, class_name: str | None = None, device: str = "auto"
    ) -> None:
        self.trained = open_trained(run)
        self.target = None if class_name is None else _class_index(self.trained, class_name)
        self.device = resolve_device(device)
        self.model = self.trained.build().to(self.device)

    def __call__(self, source: ImageSource) -> Explanation:
        name, preprocessing = source_name(source), self.trained.preprocessing
        try:
            taken = preprocessing.read(source)
            # as people see it, where the model takes other channels than RGB
            picture = taken if isinstance(taken, Image.Image) else read_image(source)
            pixels = preprocessing.fit(taken)
        except DataError as error:
            return Explanation(name, error=str(error))
        images = torch.from_numpy(preprocessing.normalise(pixels)[None]).to(self.device)
        targets = None if self.target is None else torch.tensor([self.target], device=self.device)
        return _assemble(name, picture, read(self.model, images, targets), self.trained)


def explain(
    run: str | Path, image: ImageSource, *, class_name: str | None = None, device: str = "auto"
) -> Explanation:
    """Explain the prediction for one image.

    Args:
        run: A run folder, a weight file or a name on the hub.
        image: A path, the bytes of a file, a Pillow image or a uint8 array.
        class_name: Explain this class instead of the predicted one.
        device: auto, cpu, cuda or mps.

    Raises:
        DataError: For an image that cannot be decoded.
        UnknownNameError: For a class that the model does not have.
    """
    explanation = Explainer(run, class_name=class_name, device=device)(image)
    if explanation.error is not None:
        raise DataError(explanation.error)
    return explanation


def mistake_maps(
    model: CrossViT,
    preprocessing: Preprocessing,
    pictures: Sequence[Image.Image],
    *,
    fitted: Sequence[NDArray[Any]] | None = None,
    side: int = 128,
) -> list[bytes]:
    """The relevance map of the model's answer to each picture, laid over the picture.

    The map is the gradient-weighted one of the predicted class; see `relevance.py`.

    Args:
        model: In evaluation mode, on any device.
        preprocessing: The model's.
        pictures: Upright RGB pictures.
        fitted: The pictures as the model takes them, where those are not RGB.
        side: Longer side of the result in pixels, at most.

    Returns:
        PNG bytes of each picture.
    """
    from crossvit.report.overlay import overlay_png

    device = next(model.parameters()).device
    inputs = (
        [preprocessing.fit(preprocessing.read(picture)) for picture in pictures]
        if fitted is None
        else fitted
    )
    maps: list[NDArray[np.float32]] = []
    size = at_once(model, preprocessing.image_size)
    for start in range(0, len(pictures), size):
        pixels = np.stack(inputs[start : start + size])
        reading = read(model, torch.from_numpy(preprocessing.normalise(pixels)).to(device))
        maps += list(_on_finest(reading, reading.gradient.mean(dim=0)).cpu().numpy())
    return [
        overlay_png(
            _thumbnail(picture, side),
            values,
            _relative(preprocessing.seen(picture.size), picture.size),
        )
        for picture, values in zip(pictures, maps, strict=True)
    ]


def at_once(model: CrossViT, image_size: tuple[int, int]) -> int:
    """Number of images in a batch that fits in memory."""
    tokens = sum(
        token_counts(model.config, [branch.grid(image_size) for branch in model.config.branches])
    )
    return int(np.clip(TOKENS_AT_ONCE // tokens**2, 1, MOST_AT_ONCE))


def arrays(explanation: Explanation) -> dict[str, NDArray[np.float32]]:
    """Every map by its name, and the features, as they are written to the .npz."""
    names = [branch.name for branch in explanation.branches]
    features = zip(names, explanation.features, strict=True)
    return {item.name: item.values for item in explanation.maps} | {
        f"features.{name}": values for name, values in features
    }


def npz_bytes(explanation: Explanation) -> bytes:
    """Bytes of a compressed .npz file: `arrays`, and `seen`, their part of the picture."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, seen=np.asarray(explanation.seen), **arrays(explanation)
    )
    return buffer.getvalue()


def finest(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid of most patches."""
    return max(grids, key=lambda grid: grid[0] * grid[1])


def _class_index(trained: Trained, name: str) -> int:
    positions = trained.positions()
    if name not in positions:
        raise unknown_name("class", name, list(positions))
    return positions[name]


def _assemble(image: str, picture: Image.Image, reading: Reading, trained: Trained) -> Explanation:
    """The record of the one image in `reading`."""
    branches = branch_names(len(reading.grids))
    target = int(reading.targets[0])
    maps = [*_attention_maps(reading, branches), *_relevance_maps(reading, branches)]
    differences = [item.values for item in maps if item.kind == "difference"]
    return Explanation(
        image=image,
        top=_most_likely(reading.logits.mean(dim=0)[0], trained),
        explained=_probability(reading.logits.mean(dim=0)[0], target, trained),
        branches=tuple(
            BranchAnswer(
                name=name,
                patch=branch.patch,
                grid=grid,
                top=_most_likely(logits[0], trained),
                explained=_probability(logits[0], target, trained),
                from_other=sum(
                    item.share
                    for item in maps
                    if (item.kind, item.reader) == ("rollout", name) and item.on not in (name, ALL)
                ),
            )
            for name, branch, grid, logits in zip(
                branches, trained.config.branches, reading.grids, reading.logits, strict=True
            )
        ),
        disagreement=float(np.mean([np.abs(values).mean() / 2 for values in differences]))
        if differences
        else None,
        size=picture.size,
        seen=trained.preprocessing.seen(picture.size),
        maps=tuple(maps),
        photo=np.asarray(_thumbnail(picture, PHOTO_SIDE)),
        features=tuple(
            feature[0, reading.has_class_token :].T.unflatten(-1, grid).cpu().numpy()
            for feature, grid in zip(reading.features, reading.grids, strict=True)
        ),
    )


def _attention_maps(reading: Reading, branches: Sequence[str]) -> Iterator[TokenMap]:
    """Each attention of the pass: the row of the branch's class token (or the mean of rows)."""
    for seen in reading.attention:
        if seen.kind == "cross":
            assert seen.branch is not None
            source = (seen.branch + 1) % len(branches)
            row = seen.weights[
                0, :, 0, 1:
            ]  # (H, n_source): the first key is the class token itself
            if row.shape[-1]:  # as released, later blocks have no other key
                yield _token_map(
                    "cross",
                    branches[seen.branch],
                    branches[source],
                    row.unflatten(-1, reading.grids[source]),
                    seen,
                )
        elif seen.kind == "self":
            assert seen.branch is not None
            row = _reading_row(seen.weights[0], reading.has_class_token)[
                :, reading.has_class_token :
            ]
            name = branches[seen.branch]
            yield _token_map(
                "attention", name, name, row.unflatten(-1, reading.grids[seen.branch]), seen
            )
        else:
            yield from _joint_maps(reading, branches, seen)


def _joint_maps(
    reading: Reading, branches: Sequence[str], seen: AttentionMap
) -> Iterator[TokenMap]:
    """All-attention: every branch's class token over the patches of all branches."""
    counts = [reading.has_class_token + rows * columns for rows, columns in reading.grids]
    for reader, weights in zip(
        branches, seen.weights[0].split(counts, dim=1), strict=True
    ):  # (H, N_b, T)
        for on, values in zip(
            branches, reading.on_grids(_reading_row(weights, reading.has_class_token)), strict=True
        ):
            yield _token_map("cross", reader, on, values, seen)


def _relevance_maps(reading: Reading, branches: Sequence[str]) -> Iterator[TokenMap]:
    """Relevance of each branch and of the mean logits, on every grid and on the finest one."""
    for kind, rows in (("rollout", reading.rollout[:, 0]), ("gradient", reading.gradient[:, 0])):
        for reader, row in zip((*branches, ALL), (*rows, rows.mean(dim=0)), strict=True):
            parts = reading.on_grids(row)
            if kind == "gradient":  # scaled to shares of what lies on patches
                total = float(sum(part.sum() for part in parts))
                parts = [part / total if total > 0 else part for part in parts]
            for on, values in zip(branches, parts, strict=True):
                yield TokenMap(kind, reader, on, float(values.sum()), _array(values[None]))
            combined = density(parts, finest(reading.grids))
            yield TokenMap(
                kind, reader, ALL, float(sum(part.sum() for part in parts)), _array(combined[None])
            )
    if len(branches) > 1:
        by_branch = _on_finest(reading, reading.gradient[:, 0])  # (branches, *finest)
        rest = (by_branch.sum(dim=0) - by_branch) / (len(branches) - 1)  # mean of the others
        for reader, values in zip(branches, by_branch - rest, strict=True):
            yield TokenMap("difference", reader, ALL, 1.0, _array(values[None]))


def _on_finest(reading: Reading, relevance: Tensor) -> Tensor:
    """(..., T) -> (..., *finest grid), in multiples of the average."""
    return density(reading.on_grids(relevance), finest(reading.grids))


def _token_map(kind: str, reader: str, on: str, values: Tensor, seen: AttentionMap) -> TokenMap:
    share = float(values.sum(dim=(-2, -1)).mean())
    return TokenMap(
        kind, reader, on, share, _array(values), stage=seen.stage + 1, block=seen.block + 1
    )


def _reading_row(weights: Tensor, has_class_token: bool) -> Tensor:
    """The row of the class token, or the mean of all rows: (H, M, N) -> (H, N)."""
    return weights[:, 0] if has_class_token else weights.mean(dim=1)


def _array(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def _most_likely(logits: Tensor, trained: Trained) -> Label:
    return _probability(logits, int(logits.argmax()), trained)


def _probability(logits: Tensor, index: int, trained: Trained) -> Label:
    return Label(trained.classes[index], float(probabilities(logits, trained)[index]))


def probabilities(logits: Tensor, trained: Trained) -> Tensor:
    """Logits (..., classes) to probabilities: softmax or, of a multi-label model, sigmoid."""
    scaled = logits.double() / trained.temperature
    return scaled.sigmoid() if trained.task == MULTI_LABEL else scaled.softmax(dim=-1)


def _thumbnail(picture: Image.Image, side: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side))
    return small


def _relative(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box in pixels as shares of the picture's width and height."""
    left, top, right, bottom = box
    return left / size[0], top / size[1], right / size[0], bottom / size[1]
