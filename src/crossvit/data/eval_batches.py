"""Labelled images a batch at a time, for what measures a model: in order, fitted to its input, those that are broken counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.data.images import ImageSet
from crossvit.data.preprocess import Preprocessing
from crossvit.errors import DataError


def fitted_batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    skip_bad: bool = False,
    kept: dict[int, NDArray[Any]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[tuple[list[int], NDArray[Any]]]:
    """(indices, (B, H, W, C) pictures as `preprocessing.fit` gives them) of `images`, decoded in threads.

    kept: fitted pictures by index; read from and filled, so that a second pass decodes nothing. progress: called with (images
    done, images in all) once a batch has been worked on. Images that cannot be decoded are left out with `skip_bad`; without it
    the first of them ends the batches, and the rest is read for a DataError at the end that counts them and names the first.
    """
    pictures = {} if kept is None else kept
    bad: dict[int, DataError] = {}

    def fit(index: int) -> NDArray[Any] | DataError:
        try:
            return (
                pictures[index]
                if index in pictures
                else preprocessing.fit(images.picture(index, preprocessing))
            )
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            fitted = dict(zip(indices, pool.map(fit, indices), strict=True))
            bad |= {
                index: result for index, result in fitted.items() if isinstance(result, DataError)
            }
            good = {
                index: result
                for index, result in fitted.items()
                if not isinstance(result, DataError)
            }
            if kept is not None:
                kept.update(good)
            if good and (skip_bad or not bad):
                yield list(good), np.stack(list(good.values()))
            progress(indices.stop, len(images))
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} of {len(images)} images cannot be decoded: {next(iter(bad.values()))}; mend them or add --skip-bad"
        )
    if len(bad) == len(images):
        raise DataError(f"{images.location} has no image that can be decoded")
