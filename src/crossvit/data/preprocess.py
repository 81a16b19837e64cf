"""THE inference preprocessing, shared by training's evaluation, evaluation and prediction. Pillow and NumPy only.

Files are untrusted: only the formats below are opened, only up to multichannel.MAX_PIXELS, and nothing in a file is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crossvit.data import multichannel
from crossvit.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".npy",
)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
MAX_ASPECT = 64  # longer side over shorter; beyond it a central crop is taken of the middle alone
IMAGENET_MEAN = (
    0.485,
    0.456,
    0.406,
)  # the released weights' normalisation (timm's IMAGENET_DEFAULT)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow finds odd in a file but can decode is no news for people, nor is a size that `opened` refuses.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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

ImageSource = str | Path | bytes | Image.Image | NDArray[Any]
Picture = (
    Image.Image | NDArray[np.float32]
)  # RGB; or (H, W, C) in 0..1, where a number of channels is asked for


def read_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture from a path, the bytes of a file, a Pillow image or an array (H, W) or (H, W, C).

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8, an animation gives its first
    frame, more than four channels their first three. DataError, with the path, for anything that cannot be decoded whole.
    """
    with _named(source):
        return to_rgb(decode(source))


def read_channels(source: ImageSource, channels: int, *, at_least: int = 0) -> NDArray[np.float32]:
    """(H, W, channels) in 0..1 with every bit that is stored: 8-bit values / 255, 16-bit ones / 65535, floats as they are.

    A picture with that many channels is taken as it is; grey, RGB and RGBA become each other; anything else is a DataError.
    """
    with _named(source):
        found = decode(source, channels, at_least=at_least)
        if isinstance(found, Image.Image) and found.mode.startswith(("I", "F")):
            deep = np.asarray(found)[:, :, None]
            found = deep if found.mode == "F" else np.clip(deep, 0, 65535).astype(np.uint16)
        if not isinstance(found, Image.Image):
            if found.shape[2] == channels:
                return multichannel.scaled(found)
            if found.shape[2] not in (1, 3, 4):
                raise ValueError(f"it has {found.shape[2]} channels and {channels} are wanted")
            found = multichannel.looked_at(found)
        if channels not in MODES:
            raise ValueError(f"it has {len(found.getbands())} channels and {channels} are wanted")
        plain = (
            to_rgb(found) if channels in (1, 3) else found
        )  # what is transparent is laid on white
        return multichannel.scaled(
            multichannel.with_channels(np.asarray(plain.convert(MODES[channels])))
        )


def decode(
    source: ImageSource, channels: int = 0, *, at_least: int = 0
) -> Image.Image | NDArray[Any]:
    """What is in `source`: a picture, upright, in Pillow's own mode; or (H, W, C) as stored, where Pillow has no mode for it.

    channels: where a number of them is asked for, a TIFF of which Pillow would drop channels or bits is an array too.
    at_least: pixels of a side that are enough, 0 for all there are: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size.
    """
    if isinstance(source, np.ndarray):
        plain = source.dtype == np.uint8 and (source.ndim == 2 or source.shape[2:] == (3,))
        return Image.fromarray(source) if plain else multichannel.with_channels(source)
    if isinstance(source, Image.Image):
        return upright(source)
    _refuse_special(source)
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        start = file.read(len(multichannel.NUMPY_MAGIC))
        file.seek(0)
        if start == multichannel.NUMPY_MAGIC:
            return multichannel.read_npy(file)
        try:
            with opened(file) as image:
                if at_least:
                    image.draft(None, (at_least, at_least))  # does nothing but to a JPEG
                if not channels or multichannel.kept_whole(image, channels):
                    return upright(image)
        except UnidentifiedImageError:
            if not start.startswith(multichannel.TIFF_MAGICS):
                raise
        file.seek(0)
        return multichannel.read_tiff(file.read(), channels)


def opened(file: IO[bytes]) -> Image.Image:
    """The picture in `file` with its header alone read, in one of FORMATS. Pillow's errors where it is in none of them or has
    more than multichannel.MAX_PIXELS."""
    image = Image.open(file, formats=FORMATS)
    multichannel.refuse_pixels(*image.size)
    return image


def file_format(source: ImageSource) -> str:
    """Pillow's name of the format of the file `source` is the content of, such as PNG. DataError where it is none of FORMATS."""
    assert isinstance(source, bytes)
    with _named(source), opened(io.BytesIO(source)) as image:
        return str(image.format)


@contextlib.contextmanager
def _named(source: ImageSource) -> Iterator[None]:
    """Whatever goes wrong with `source` inside is a DataError in one line with its name."""
    name = source_name(source)
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{name}: {_why_unidentified(source)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(
            f"{name}: more than {multichannel.MAX_PIXELS:,} pixels; make it smaller first"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except Exception as error:  # an untrusted file can make a decoder fail in any way
        raise DataError(
            f"{name}: cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def _refuse_special(source: str | Path | bytes) -> None:
    """OSError for a folder, and for a pipe or device, on which a reader could wait for ever."""
    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise OSError("a folder, a pipe or a device, not a file")


def source_name(source: ImageSource) -> str:
    """What an image is called in messages and results: its path, or `<bytes>`, `<Image>`, `<ndarray>`."""
    return str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


def upright(image: Image.Image) -> Image.Image:
    """Decoded and turned as its EXIF block says."""
    image.load()
    turn = UPRIGHT.get(_orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image | NDArray[Any]) -> Image.Image:
    """8-bit RGB of what `decode` gives."""
    if isinstance(image, np.ndarray):
        image = multichannel.looked_at(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = (
            np.asarray(image).astype(np.int64) >> 8
        )  # 16-bit grey; Pillow's own conversion would clip it to white
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a file to the model's input.

    image_size: (height, width) in pixels. mean, std: per channel, of values in 0..1.
    crop: None resizes the whole picture to the input and cuts nothing off; a share c in (0, 1] scales the picture to
    cover 1/c of the input, keeping its shape, and takes the centre (the paper's evaluation has c = 0.875 at 240).
    channels: 0 takes every picture as 8-bit RGB; a number takes so many channels with all their bits (see `read_channels`).
    """

    image_size: tuple[int, int]
    crop: float | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 0

    def read(self, source: ImageSource, *, at_least: int = 0) -> Picture:
        """The picture as `fit` takes it; at_least: see `decode`. DataError, with the path, for what cannot be decoded or has
        other channels."""
        if self.channels:
            return read_channels(source, self.channels, at_least=at_least)
        with _named(source):
            found = decode(source, at_least=at_least)
            if isinstance(found, np.ndarray) and found.shape[2] not in (1, 3, 4):
                raise ValueError(
                    f"it has {found.shape[2]} channels and RGB is wanted: train with --channels {found.shape[2]}"
                )
            return to_rgb(found)

    def fit(self, picture: Picture) -> NDArray[Any]:
        """At `image_size`, bicubic: an RGB picture -> (H, W, 3) uint8, (H, W, C) -> (H, W, C) float32 in 0..1."""
        if isinstance(picture, Image.Image):
            return np.asarray(self._fitted(picture))
        fitted = [
            self._fitted(Image.fromarray(np.ascontiguousarray(plane)))
            for plane in np.moveaxis(picture, -1, 0)
        ]
        return np.stack([np.asarray(plane) for plane in fitted], axis=-1).clip(
            0.0, 1.0
        )  # bicubic swings over, as uint8 cannot

    def _fitted(self, image: Image.Image) -> Image.Image:
        height, width = self.image_size
        if self.crop is None:
            return image.resize((width, height), Image.Resampling.BICUBIC)
        middle = _middle(image.size)
        if middle != (0, 0, *image.size):
            image = image.crop(middle)
        size = self._cover(image.size, self.crop)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return image.resize(size, Image.Resampling.BICUBIC).crop(
            (left, top, left + width, top + height)
        )

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of what `fit` keeps of a picture of `size` (width, height), in the picture's own pixels."""
        if self.crop is None:
            return 0.0, 0.0, float(size[0]), float(size[1])
        height, width = self.image_size
        outer_left, outer_top, right, bottom = _middle(size)
        middle = right - outer_left, bottom - outer_top
        cover = self._cover(middle, self.crop)
        left, top = round((cover[0] - width) / 2), round((cover[1] - height) / 2)
        across, down = middle[0] / cover[0], middle[1] / cover[1]
        return (
            outer_left + left * across,
            outer_top + top * down,
            outer_left + (left + width) * across,
            outer_top + (top + height) * down,
        )

    def _cover(self, size: tuple[int, int], crop: float) -> tuple[int, int]:
        """(width, height) to which a picture of `size` is scaled so that it covers 1/`crop` of the input."""
        height, width = self.image_size
        scale = max(int(height / crop) / size[1], int(width / crop) / size[0])
        # floor, as torchvision does for the longer side; never less than what the crop needs
        return max(width, int(size[0] * scale + 1e-6)), max(height, int(size[1] * scale + 1e-6))

    def normalise(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """(..., H, W, C) uint8, or float32 in 0..1 -> (..., C, H, W) float32, (value − mean) / std of values in 0..1."""
        unit = 255.0 if pixels.dtype == np.uint8 else 1.0
        scale = (1.0 / (unit * np.asarray(self.std))).astype(np.float32)[:, None, None]
        offset = (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)[:, None, None]
        values = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(
            np.float32
        )  # turned while it is small
        values *= scale
        values -= offset
        return values

    def __call__(self, source: ImageSource) -> NDArray[np.float32]:
        """Read, fit and normalise: (C, H, W) float32."""
        return self.normalise(self.fit(self.read(source)))

    def to_dict(self) -> dict[str, Any]:
        record = {
            "image_size": list(self.image_size),
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        return {**record, "channels": self.channels}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        height, width = record["image_size"]
        return cls(
            image_size=(height, width),
            crop=record["crop"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            channels=record.get(
                "channels", 0
            ),  # as RGB, in records of before there was another way
        )


def _middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the middle of a picture that is a hair, the whole of any other: all that a central crop sees
    of it, and scaled whole it could fill the memory. size: (width, height)."""
    reach = MAX_ASPECT * min(size)
    left, top = (max(0, (side - reach) // 2) for side in size)
    return left, top, left + min(size[0], reach), top + min(size[1], reach)


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
