"""Pictures of any number of channels, with every bit that is stored: NumPy files, TIFF, 16-bit grey, RGBA; and runs on them."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import crossvit
from crossvit.data import multichannel as planes
from crossvit.data.augment import Augment, generators_kept
from crossvit.data.check import check
from crossvit.data.multichannel import MAX_VALUES
from crossvit.data.preprocess import Preprocessing, read_channels, read_image
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.run import Run
from crossvit.train.loop import fit
from crossvit.train.setup import fitting_preprocessing
from crossvit.trained import open_trained
from crossvit.weights.load import load_weights
from support.runs import Heard, recipe, same_bits, weights_of

Command = Callable[..., tuple[int, str, str]]
RNG = np.random.default_rng(0)
DEEP: NDArray[np.uint16] = RNG.integers(0, 65536, (8, 12), dtype=np.uint16)
BANDS: NDArray[np.uint16] = RNG.integers(0, 65536, (8, 12, 5), dtype=np.uint16)
BYTES: NDArray[np.uint8] = RNG.integers(0, 256, (8, 12, 4), dtype=np.uint8)


def npy(array: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def png(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["C", "F"])
def test_a_numpy_file_is_read_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy(np.asarray(BANDS, order=kind)))  # type: ignore[call-overload]
    np.testing.assert_array_equal(
        read_channels(tmp_path / "x.npy", 5), BANDS.astype(np.float32) / np.float32(65535)
    )
    shares = BANDS[..., :2].astype(np.float64) / 65535
    np.testing.assert_array_equal(read_channels(npy(shares), 2), shares.astype(np.float32))
    np.testing.assert_array_equal(
        read_channels(npy(BYTES[..., 0]), 1)[..., 0], BYTES[..., 0] / np.float32(255)
    )
    np.testing.assert_array_equal(
        read_channels(npy(BYTES[..., 0] > 99), 1)[..., 0], BYTES[..., 0] > 99
    )
    np.testing.assert_array_equal(
        read_channels(BANDS, 5), read_channels(npy(BANDS), 5)
    )  # an array without a file


def test_sixteen_bits_of_grey_stay() -> None:
    wanted = DEEP[..., None].astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(read_channels(png(DEEP), 1), wanted)
    np.testing.assert_array_equal(read_channels(tiff(DEEP), 1), wanted)
    assert len(np.unique(np.asarray(read_image(png(DEEP))))) < len(
        np.unique(wanted)
    )  # as RGB they are 8 bits


@pytest.mark.parametrize(
    "options", [{"planarconfig": "contig"}, {"planarconfig": "separate"}, {"compression": "zlib"}]
)
def test_bands_of_a_tiff_stay(options: dict[str, Any]) -> None:
    separate = options.get("planarconfig") == "separate"
    content = tiff(
        np.moveaxis(BANDS, -1, 0) if separate else BANDS,
        photometric="minisblack",
        **{"planarconfig": "contig"} | options,
    )
    np.testing.assert_array_equal(
        read_channels(content, 5), BANDS.astype(np.float32) / np.float32(65535)
    )
    assert np.asarray(read_image(content)).shape == (8, 12, 3)  # for people: the first three


def test_a_tiff_of_16_bit_colours_or_of_pages_stays_whole() -> None:
    colours = BANDS[..., :3]
    np.testing.assert_array_equal(
        read_channels(tiff(colours, photometric="rgb"), 3),
        colours.astype(np.float32) / np.float32(65535),
    )
    pages = tiff(np.moveaxis(BANDS, -1, 0), photometric="minisblack")
    np.testing.assert_array_equal(
        read_channels(pages, 5), BANDS.astype(np.float32) / np.float32(65535)
    )


def test_pictures_become_the_channels_that_are_asked_for() -> None:
    rgba = png(BYTES)
    np.testing.assert_array_equal(read_channels(rgba, 4), BYTES / np.float32(255))
    grey = np.asarray(read_image(rgba).convert("L"))
    np.testing.assert_array_equal(read_channels(rgba, 1)[..., 0], grey / np.float32(255))
    opaque = read_channels(png(BYTES[..., :3]), 4)
    assert (opaque[..., 3] == 1).all()
    np.testing.assert_array_equal(
        read_channels(png(BYTES[..., :3]), 3), BYTES[..., :3] / np.float32(255)
    )


@pytest.mark.parametrize(
    ("content", "channels", "message"),
    [
        (npy(BANDS), 4, "it has 5 channels and 4 are wanted"),
        (png(BYTES), 5, "it has 4 channels and 5 are wanted"),
        (
            npy(BANDS.astype(np.int32)),
            5,
            "numbers of the type int32: use uint8, uint16 or floats from 0 to 1",
        ),
        (
            npy(BANDS.astype(np.float32)),
            5,
            r"its values are from \d+ to \d+: scale them to 0\.\.1 when the file is written",
        ),
        (npy(np.full((2, 2), np.nan)), 1, "its values are from nan to nan"),
        (
            npy(np.zeros((2, 2, 300), np.uint8)),
            3,
            "an array of 2x2x300: more than 256 channels; they come last",
        ),
        (npy(np.zeros(7, np.uint8)), 1, "an array of 7 numbers: a picture has"),
        (npy(np.array([{}], dtype=object)), 1, "an array of 1 numbers"),
        (npy(np.array([[{}]], dtype=object), allow_pickle=True), 1, "numbers of the type object"),
        (npy(BANDS)[:-9], 5, "the file is truncated"),
        (b"\x93NUMPY\x09\x00", 1, "version 9.0 of NumPy's format"),
        (
            tiff(BANDS, photometric="minisblack", planarconfig="contig")[:300],
            5,
            "cannot be decoded",
        ),
    ],
)
def test_what_cannot_be_taken_is_one_line(content: bytes, channels: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_channels(content, channels)
    assert "\n" not in str(raised.value)


def test_a_header_that_promises_too_much_is_not_believed() -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)}
    )  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match=f"more than {MAX_VALUES:,} numbers"):
        read_image(buffer.getvalue())


@pytest.mark.parametrize("kind", ["npy", "contig", "separate"])
def test_arrays_in_files_have_the_limit_of_pictures(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "MAX_PIXELS", 95)  # of 8 x 12
    content = npy(BANDS)
    if kind != "npy":
        bands = np.moveaxis(BANDS, -1, 0) if kind == "separate" else BANDS
        content = tiff(bands, photometric="minisblack", planarconfig=kind)
    with pytest.raises(DataError, match="^<bytes>: more than 95 pixels; make it smaller first$"):
        read_channels(content, 5)
    monkeypatch.setattr(planes, "MAX_PIXELS", 96)
    assert read_channels(content, 5).shape == (8, 12, 5)


def test_separate_planes_may_be_wider_than_there_may_be_channels() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (5, 3, 300), dtype=np.uint8)
    content = tiff(wide, photometric="minisblack", planarconfig="separate")
    np.testing.assert_array_equal(
        read_channels(content, 5), np.moveaxis(wide, 0, -1) / np.float32(255)
    )


def test_as_rgb_other_channels_are_refused_where_a_model_would_learn_from_them() -> None:
    with pytest.raises(
        DataError, match="it has 5 channels and RGB is wanted: train with --channels 5"
    ):
        Preprocessing(image_size=(8, 8)).read(npy(BANDS))
    assert np.asarray(Preprocessing(image_size=(8, 8)).read(npy(BYTES[..., :3]))).shape == (
        8,
        12,
        3,
    )


def test_without_tifffile_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    content, real = (
        tiff(BANDS, photometric="minisblack", planarconfig="contig"),
        builtins.__import__,
    )

    def without(name: str, *more: Any) -> Any:
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError,
        match=r"a kind of TIFF that Pillow does not read whole: pip install 'crossvit\[tiff\]'",
    ):
        read_channels(content, 5)


# ---------------------------------------------------------------- preprocessing


def test_each_channel_is_resized_and_normalised_as_pillow_and_the_formula_have_it() -> None:
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.6, 0.7, 0.8, 0.9)
    preprocessing = Preprocessing(image_size=(5, 7), channels=5, mean=mean, std=std)
    found = preprocessing(npy(BANDS))
    assert found.shape == (5, 5, 7)
    assert found.dtype == np.float32
    for channel in range(5):
        plane = Image.fromarray(BANDS[..., channel].astype(np.float32) / np.float32(65535))
        resized = np.asarray(plane.resize((7, 5), Image.Resampling.BICUBIC)).clip(0, 1)
        np.testing.assert_allclose(
            found[channel], (resized - mean[channel]) / std[channel], atol=1e-6
        )
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


def test_three_channels_of_8_bits_are_rgb_but_for_rounding() -> None:
    kinds = (Preprocessing(image_size=(6, 6), crop=0.875, channels=channels) for channels in (0, 3))
    one, other = (preprocessing(png(BYTES[..., :3])) for preprocessing in kinds)
    np.testing.assert_allclose(one, other, atol=7 / 255 / 0.224)  # 8-bit bicubic rounds twice


def test_records_of_before_are_rgb() -> None:
    record = {"image_size": [8, 8], "crop": None, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    assert Preprocessing.from_dict(record).channels == 0


# ---------------------------------------------------------------- augmentation


def test_planes_are_moved_as_pictures_are_and_not_coloured() -> None:
    settings = {
        "flip": 1.0,
        "rotate": 0.0,
        "shift": 0.0,
        "zoom": 0.0,
        "colour": 0.9,
        "randaugment": "rand-m9-mstd0.5-inc1",
    }
    preprocessing = Preprocessing(image_size=(8, 12), channels=5, mean=(0.5,) * 5, std=(1.0,) * 5)
    augment = Augment(preprocessing, min_crop=1.0, **settings)  # type: ignore[arg-type]
    assert augment.left_out == (
        "colour is for one or three channels and left out with 5 channels",
        "randaugment is for 8-bit RGB (--channels 0) and left out with 5 channels",
    )
    with generators_kept():
        view = augment(augment.view(preprocessing.read(npy(BANDS))), seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(view, (BANDS / np.float32(65535))[:, ::-1])
    grey = Augment(
        Preprocessing(image_size=(8, 12), channels=1, mean=(0.5,), std=(1.0,)),
        min_crop=1.0,
        **settings,
    )  # type: ignore[arg-type]
    with generators_kept():
        other = grey(grey.view(read_channels(png(DEEP), 1)), seed=0, epoch=0, index=0)
    assert not np.array_equal(
        other[:, ::-1, 0], DEEP / np.float32(65535)
    )  # brighter or darker, too
    assert len(grey.left_out) == 1


def test_crops_and_erasing_take_any_number_of_channels() -> None:
    preprocessing = Preprocessing(image_size=(6, 6), channels=5, mean=(0.5,) * 5, std=(0.3,) * 5)
    augment = Augment(
        preprocessing,
        min_crop=0.3,
        flip=0.5,
        rotate=20,
        shift=0.1,
        zoom=0.1,
        colour=0.0,
        erasing=1.0,
    )
    large = np.repeat(np.repeat(preprocessing.read(npy(BANDS)), 9, axis=0), 9, axis=1)
    view = augment.view(large)
    assert view.shape == (12, 18, 5)  # type: ignore[union-attr]
    with generators_kept():
        one, other = (augment(view, seed=0, epoch=0, index=7) for _ in range(2))
    assert one.shape == (5, 6, 6)
    np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- runs


@pytest.fixture
def banded(scans: Path, tmp_path: Path) -> Path:
    """The scans as NumPy files of five 16-bit channels: the scan, its negative, two shades and one that never changes."""
    for path in sorted(scans.rglob("*.png"))[::3]:
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        bands = np.stack((grey, 65535 - grey, grey // 2, grey // 3, np.full_like(grey, 9)), axis=-1)
        place = tmp_path / "banded" / path.parent.name / f"{path.stem}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, bands)
    return tmp_path / "banded"


def test_means_and_deviations_are_those_of_the_training_images(banded: Path) -> None:
    images = open_data(banded).part("all")
    found = fitting_preprocessing(images, Preprocessing(image_size=(8, 8), channels=5))
    pixels = np.stack([np.load(images.path(index)) for index in range(len(images))]) / 65535
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), atol=2e-6)
    np.testing.assert_allclose(
        found.std, [*pixels.std(axis=(0, 1, 2))[:4], 1.0], atol=2e-6
    )  # 1 where nothing changes
    plain = Preprocessing(image_size=(8, 8))
    assert fitting_preprocessing(images, plain) is plain


def test_five_channels_train_evaluate_and_predict_with_one_preprocessing(
    banded: Path, tmp_path: Path, command: Command
) -> None:
    callback = Heard()
    result = fit(recipe(banded, tmp_path / "run", channels=5, epochs=2), callback=callback)
    trained = open_trained(result.run)
    assert (
        trained.config.in_channels,
        trained.preprocessing.channels,
        len(trained.preprocessing.mean),
    ) == (5, 5, 5)
    assert (
        "note   colour is for one or three channels and left out with 5 channels" in callback.lines
    )
    status, out, err = command("evaluate", result.run, banded, "--json")
    assert status == 0, err
    assert f'"top1": {result.top1}, "n": {result.n}' in out
    path = next(banded.rglob("*.npy"))
    (answer,) = crossvit.Predictor(result.run)([path])
    with torch.no_grad():
        logits = trained.build()(torch.from_numpy(trained.preprocessing(path))[None])
    assert answer.top[0].probability == pytest.approx(float(logits.softmax(dim=1).max()), rel=1e-5)
    (refused,) = crossvit.Predictor(result.run)([png(BYTES)])
    assert refused.error is not None
    assert "it has 4 channels and 5 are wanted" in refused.error
    again = fit(recipe(banded, tmp_path / "again", channels=5, epochs=2, workers=2))
    assert same_bits(weights_of(again.run), weights_of(result.run))


def test_a_wrong_number_of_channels_is_said_before_training(banded: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="it has 5 channels and RGB is wanted: train with --channels 5"
    ):
        fit(recipe(banded, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="channels = 999"):
        recipe(banded, tmp_path / "run", channels=999)


def test_grey_runs_start_from_weights_of_colour(scans: Path, tmp_path: Path) -> None:
    colour = fit(recipe(scans, tmp_path / "colour"))
    callback = Heard()
    grey = fit(
        recipe(scans, tmp_path / "grey", channels=1, weights=colour.run, lr=1e-12, final_lr=0.0),
        callback=callback,
    )
    assert any("adapted from 3 channels to 1" in line for line in callback.lines)
    model = crossvit.create_model(open_trained(grey.run).config)
    load_weights(model, colour.run)
    name = (
        "tokens.0.patches.0.weight"
        if "tokens.0.patches.0.weight" in weights_of(grey.run)
        else "tokens.0.patches.weight"
    )
    torch.testing.assert_close(
        weights_of(grey.run)[name], dict(model.named_parameters())[name].detach(), atol=1e-5, rtol=0
    )
    assert len(Run(grey.run).record().preprocessing["mean"]) == 1


def test_the_check_looks_at_them_too(banded: Path) -> None:
    (banded / "0" / "torn.npy").write_bytes(npy(BANDS)[:-9])
    found = check(open_data(banded), pictures=True)
    assert found.modes == {"5 x uint16": 20}
    assert [broken.image for broken in found.broken] == ["0/torn.npy"]
    assert "the file is truncated" in found.broken[0].reason
