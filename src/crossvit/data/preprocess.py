"""THE inference preprocessing, shared by training's evaluation, evaluation and prediction. Pillow and NumPy only.

Files are untrusted: only the formats below are opened, only up to MAX_PIXELS, and nothing in a file is run.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crossvit.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's own limit against decompression bombs
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # the released weights' normalisation (timm's IMAGENET_DEFAULT)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow finds odd in a file but can decode is no news for people; a decompression bomb is an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# EXIF orientation -> the turn that makes the picture upright (EXIF 2.3, tag 0x0112)
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]


def read_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture from a path, the bytes of a file, a Pillow image or a uint8 array (H, W) or (H, W, 3).

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8, an animation gives its first
    frame. DataError, with the path, for anything that cannot be decoded whole.
    """
    name = source_name(source)
    try:
        if isinstance(source, np.ndarray):
            return to_rgb(Image.fromarray(source))
        if isinstance(source, Image.Image):
            return to_rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: {_why_unidentified(source)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller first") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except Exception as error:  # an untrusted file can make a decoder fail in any way
        raise DataError(f"{name}: cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})") from error


def source_name(source: ImageSource) -> str:
    """What an image is called in messages and results: its path, or `<bytes>`, `<Image>`, `<ndarray>`."""
    return str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn upright and convert to RGB."""
    image.load()
    turn = UPRIGHT.get(_orientation(image) or 1)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8  # 16-bit grey; Pillow's own conversion would clip it to white
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an RGB picture to the model's input.

    image_size: (height, width) in pixels. mean, std: per channel, of values in 0..1.
    crop: None resizes the whole picture to the input and cuts nothing off; a share c in (0, 1] scales the picture to
    cover 1/c of the input, keeping its shape, and takes the centre (the paper's evaluation has c = 0.875 at 240).
    """

    image_size: tuple[int, int]
    crop: float | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def fit(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB picture -> (H, W, 3) uint8 at `image_size`, bicubic."""
        height, width = self.image_size
        if self.crop is None:
            return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        size = self._cover(image.size, self.crop)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height)))

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of what `fit` keeps of a picture of `size` (width, height), in the picture's own pixels."""
        if self.crop is None:
            return 0.0, 0.0, float(size[0]), float(size[1])
        height, width = self.image_size
        cover = self._cover(size, self.crop)
        left, top = round((cover[0] - width) / 2), round((cover[1] - height) / 2)
        across, down = size[0] / cover[0], size[1] / cover[1]
        return left * across, top * down, (left + width) * across, (top + height) * down

    def _cover(self, size: tuple[int, int], crop: float) -> tuple[int, int]:
        """(width, height) to which a picture of `size` is scaled so that it covers 1/`crop` of the input."""
        height, width = self.image_size
        scale = max(int(height / crop) / size[1], int(width / crop) / size[0])
        # floor, as torchvision does for the longer side; never less than what the crop needs
        return max(width, int(size[0] * scale + 1e-6)), max(height, int(size[1] * scale + 1e-6))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, (value/255 − mean) / std."""
        scale = (1.0 / (255.0 * np.asarray(self.std))).astype(np.float32)
        offset = (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) * scale - offset, -1, -3))

    def __call__(self, source: ImageSource) -> NDArray[np.float32]:
        """Read, fit and normalise: (3, H, W) float32."""
        return self.normalise(self.fit(read_image(source)))

    def to_dict(self) -> dict[str, Any]:
        return {"image_size": list(self.image_size), "crop": self.crop, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        height, width = record["image_size"]
        return cls(image_size=(height, width), crop=record["crop"], mean=tuple(record["mean"]), std=tuple(record["std"]))


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None where there is none or the EXIF block is damaged (the picture itself may be fine)."""
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # noqa: BLE001  # an untrusted block
        return None
    return value if isinstance(value, int) else None


def _why_unidentified(source: object) -> str:
    if isinstance(source, str | Path) and Path(source).stat().st_size == 0:
        return "the file is empty (0 bytes)"
    return f"not an image in a format read here ({', '.join(FORMATS)})"
