"""A map laid over the part of a photo that the model saw: the pixels on the panels of `maps.py`."""

from __future__ import annotations

import dataclasses
import io

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom
Colours = NDArray[np.float64]  # (H, W, 3) in 0..1
Values = NDArray[np.float32]  # (rows, columns)

HEAT = matplotlib.colormaps["inferno"]
# Orange against blue: told apart by people who do not see red and green.
SIDES = LinearSegmentedColormap.from_list(
    "sides", ["#0b5fa5", "#7fb4dc", "#f2f2f2", "#f0a868", "#c4500a"]
)
SMALLEST_TOP = 3.0  # times the average: a scale never ends below it, so that flat maps look flat
SMOOTH_SIDE = 256  # pixels that an overlay has at least, so that a map on a small photo is smooth


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo, (H, W, 3) uint8, and the part that was seen, as shares of its width and height."""

    photo: NDArray[np.uint8]
    seen: Box

    def faded(self) -> Colours:
        """The whole photo, grey and pale: what lies outside the part that was seen."""
        return 0.25 * _grey(self.photo) + 0.75

    def heat(self, values: Values, normal: Normalize) -> Colours:
        """The seen part, dark and grey, under a heat map that is stronger where there is more."""
        grey = self._part()
        level = np.clip(normal(_resized(values, grey)), 0, 1)
        return _blend(0.8 * grey, HEAT, level, strength=0.3 + 0.5 * level)

    def difference(self, values: Values, reach: float) -> Colours:
        """The seen part in grey, orange where `values` are positive and blue where negative.

        The colour is full from ±`reach` on.
        """
        grey = self._part()
        share = np.clip(_resized(values, grey) / reach, -1, 1)
        return _blend(grey, SIDES, (share + 1) / 2, strength=0.1 + 0.75 * np.abs(share))

    def pixels(self) -> tuple[int, int, int, int]:
        """The seen part in pixels of the photo, one at least."""
        height, width = self.photo.shape[:2]
        left, top, right, bottom = (
            round(share * side) for share, side in zip(self.seen, (width, height) * 2, strict=True)
        )
        left, top = min(left, width - 1), min(top, height - 1)
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def _part(self) -> Colours:
        left, top, right, bottom = self.pixels()
        part = _grey(self.photo)[top:bottom, left:right]
        larger = max(1.0, SMOOTH_SIDE / max(part.shape[:2]))
        size = (max(1, round(part.shape[1] * larger)), max(1, round(part.shape[0] * larger)))
        enlarged = Image.fromarray((part * 255).round().astype(np.uint8)).resize(
            size, Image.Resampling.BILINEAR
        )
        return np.asarray(enlarged) / 255


def overlay_png(picture: Image.Image, values: Values, seen: Box) -> bytes:
    """A heat map over a part of an RGB picture, as PNG bytes of the picture's size.

    Args:
        picture: RGB.
        values: Multiples of the average, (rows, columns); they set the scale.
        seen: (left, top, right, bottom) of the part, as shares of width and height.
    """
    scene = Scene(np.asarray(picture), seen)
    left, top, right, bottom = scene.pixels()
    heat = Image.fromarray(_bytes(scene.heat(values, scale([values]))))
    laid = Image.fromarray(_bytes(scene.faded()))
    laid.paste(heat.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    buffer = io.BytesIO()
    laid.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def scale(maps: list[Values], share: float = 0.99) -> Normalize:
    """From zero to what the share `share` of all patches lies below."""
    return Normalize(
        0,
        max(
            SMALLEST_TOP,
            float(np.quantile(np.concatenate([values.ravel() for values in maps]), share)),
        ),
    )


def _blend(grey: Colours, colours: Colormap, level: Colours, *, strength: Colours) -> Colours:
    laid: Colours = (1 - strength[..., None]) * grey + strength[..., None] * colours(level)[..., :3]
    return laid


def _grey(photo: NDArray[np.uint8]) -> Colours:
    luminance = photo @ np.array([0.299, 0.587, 0.114]) / 255  # ITU-R BT.601, as Pillow's
    return np.repeat(luminance[..., None], 3, axis=-1)


def _resized(values: Values, like: Colours) -> Values:
    size = (like.shape[1], like.shape[0])
    return np.asarray(
        Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    )


def _bytes(colours: Colours) -> NDArray[np.uint8]:
    return (colours * 255).round().astype(np.uint8)
