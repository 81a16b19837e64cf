"""Pictures of any number of channels and more than 8 bits, as arrays: NumPy files and the TIFF that Pillow cannot keep whole.

Shapes: H height, W width, C channels. Files are untrusted: nothing in them is run, and their size is known before they are
decoded. Errors are ValueErrors without a path; `preprocess.decode` says which file it was.
"""

from __future__ import annotations

import io
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PIXELS = 89_478_485  # of a picture in a file, width times height: a quarter of a GiB as RGB, Pillow's own line for warnings
MAX_VALUES = 4 * MAX_PIXELS  # numbers in one picture: as many as in the largest RGBA picture
MAX_CHANNELS = 256
BITS_TAG, SAMPLES_TAG = 258, 277  # TIFF 6.0: BitsPerSample, SamplesPerPixel


def refuse_pixels(width: int, height: int) -> None:
    """Pillow's own error for a picture that is too large to be decoded, from MAX_PIXELS on rather than from twice as many."""
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height} pixels")


def read_npy(file: IO[bytes]) -> NDArray[Any]:
    """(H, W, C) from a .npy file that holds (H, W) or (H, W, C) of uint8, uint16 or floats."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version[0]}.{version[1]} of NumPy's format")
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, by_columns, dtype = header(file)
    _refuse_shape(shape, dtype)
    refuse_pixels(shape[1], shape[0])
    count = int(np.prod(shape))
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise ValueError("the file is truncated")
    return with_channels(
        np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")
    )


def kept_whole(image: Image.Image, channels: int = 0) -> bool:
    """Whether Pillow gives every number of the opened file `image`: it does not of a TIFF with more channels, or more bits in
    several channels, than it has a mode for, or with a page for each of `channels`."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return True
    bits = tags.get(BITS_TAG, (1,))
    deepest = max(bits) if isinstance(bits, tuple) else bits
    if tags.get(SAMPLES_TAG, 1) > len(image.getbands()) or 1 < channels == getattr(
        image, "n_frames", 1
    ):
        return False
    return bool(deepest <= 8 or image.mode.startswith(("I;16", "F")))


def read_tiff(content: bytes, channels: int = 0) -> NDArray[Any]:
    """(H, W, C): the channels of the first page of a TIFF; or its pages, where each has one and there are `channels` of them."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "a kind of TIFF that Pillow does not read whole: pip install 'crossvit[tiff]'"
        ) from None
    with tifffile.TiffFile(
        io.BytesIO(content), is_ome=False
    ) as file:  # no OME: it may name other files
        first: Any = file.pages.first
        refuse_pixels(first.imagewidth, first.imagelength)
        pages = (
            list(file.pages)
            if first.samplesperpixel == 1 < channels == len(file.pages)
            else [first]
        )
        separate = (
            len(first.shape) == 3 and first.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        )  # (C, H, W)
        shape = (*first.shape[1:], first.shape[0]) if separate else first.shape
        _refuse_shape((*shape, channels) if len(pages) > 1 else shape, first.dtype)
        if len(pages) == 1:
            planes = first.asarray()
            return with_channels(np.moveaxis(planes, 0, -1) if separate else planes)
        if any(page.shape != first.shape or page.dtype != first.dtype for page in pages):
            raise ValueError("its pages differ in size: keep one page, or bands of one size")
        return np.stack([page.asarray() for page in pages], axis=-1)


def with_channels(planes: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) as (H, W, C). ValueError for what is no picture."""
    _refuse_shape(planes.shape, planes.dtype)
    return planes if planes.ndim == 3 else planes[:, :, None]


def scaled(planes: NDArray[Any]) -> NDArray[np.float32]:
    """Values in 0..1: bool as 0 and 1, uint8 / 255, uint16 / 65535, floats as they are. ValueError for floats beyond that."""
    if planes.dtype.kind == "b":
        return planes.astype(np.float32)
    if planes.dtype.kind == "u":
        return planes.astype(np.float32) / np.float32(np.iinfo(planes.dtype).max)
    low, high = float(planes.min()), float(planes.max())
    if not (low >= 0 and high <= 1):  # or not a number
        raise ValueError(
            f"its values are from {low:g} to {high:g}: scale them to 0..1 when the file is written"
        )
    return planes.astype(np.float32)


def looked_at(planes: NDArray[Any]) -> Image.Image:
    """For people: 8 bits, one channel as grey, three and four as RGB and RGBA, of more the first three."""
    pixels = np.round(255 * scaled(planes)).astype(np.uint8)
    channels = pixels.shape[2]
    if channels <= 2:
        return Image.fromarray(pixels[:, :, 0])
    return Image.fromarray(np.ascontiguousarray(pixels if channels in (3, 4) else pixels[:, :, :3]))


def _refuse_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            f"an array of {'x'.join(map(str, shape)) or 'no'} numbers: a picture has (height, width, channels)"
        )
    if len(shape) == 3 and shape[2] > MAX_CHANNELS:
        raise ValueError(
            f"an array of {'x'.join(map(str, shape))}: more than {MAX_CHANNELS} channels; they come last"
        )
    if np.prod(shape, dtype=float) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} numbers; make it smaller first")
    if dtype.kind not in "bf" and dtype not in (np.uint8, np.uint16):
        raise ValueError(f"numbers of the type {dtype}: use uint8, uint16 or floats from 0 to 1")
