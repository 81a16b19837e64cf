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
MAX_ASPECT = 64  # longer side over shorter; beyond it a central crop is taken of the middle alone
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
        _refuse_special(source)
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


def _refuse_special(source: str | Path | bytes) -> None:
    """OSError for a folder, and for a pipe or device, on which a reader could wait for ever."""
    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise OSError("a folder, a pipe or a device, not a file")


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

    def read(self, source: ImageSource) -> Image.Image:
        """The picture as `fit` takes it. DataError, with the path, for what cannot be decoded."""
        return read_image(source)

    def fit(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB picture -> (H, W, 3) uint8 at `image_size`, bicubic."""
        height, width = self.image_size
        if self.crop is None:
            return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        image = _middle(image)
        cover_height, cover_width = int(height / self.crop), int(width / self.crop)
        scale = max(cover_height / image.height, cover_width / image.width)
        # floor, as torchvision does for the longer side; never less than what the crop needs
        size = (max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, (value/255 − mean) / std."""
        scale = (1.0 / (255.0 * np.asarray(self.std))).astype(np.float32)
        offset = (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) * scale - offset, -1, -3))

    def __call__(self, source: ImageSource) -> NDArray[np.float32]:
        """Read, fit and normalise: (3, H, W) float32."""
        return self.normalise(self.fit(self.read(source)))

    def to_dict(self) -> dict[str, Any]:
        return {"image_size": list(self.image_size), "crop": self.crop, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        height, width = record["image_size"]
        return cls(image_size=(height, width), crop=record["crop"], mean=tuple(record["mean"]), std=tuple(record["std"]))


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a picture that is a hair: all that a central crop sees of it, and scaled whole it could fill the memory."""
    reach = MAX_ASPECT * min(image.size)
    if max(image.size) <= reach:
        return image
    left, top = (max(0, (side - reach) // 2) for side in image.size)
    return image.crop((left, top, left + min(image.width, reach), top + min(image.height, reach)))


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
