"""Where images come from, how they are read and prepared, and that order and augmentation follow from the seed alone."""

from __future__ import annotations

import io
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crossvit.data.augment import Augment, seeded
from crossvit.data.check import look_at
from crossvit.data.images import stratified_split
from crossvit.data.loader import Order, TrainingLoader
from crossvit.data.multichannel import MAX_PIXELS
from crossvit.data.preprocess import Preprocessing, read_image
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.results import TrainingResult

Command = Callable[..., tuple[int, str, str]]
STRENGTHS = {"min_crop": 1.0, "flip": 0.5, "rotate": 15.0, "shift": 0.1, "zoom": 0.1, "colour": 0.3}


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- sources


def test_digits_are_1437_to_learn_from_and_360_held_out_in_the_same_proportions() -> None:
    train, held_out = open_data("digits").split(held_out=0.2, seed=0)
    assert (len(train), len(held_out)) == (1437, 360)
    assert not set(train.names) & set(held_out.names)
    for count, held in zip(train.counts().values(), held_out.counts().values(), strict=True):
        assert abs(held - (count + held) * 0.2) < 1
    again = open_data("digits").split(held_out=0.2, seed=0)
    assert (again[0].names, again[1].names) == (train.names, held_out.names)
    assert open_data("digits").split(held_out=0.2, seed=1)[1].names != held_out.names


def test_a_folder_of_class_folders(scans: Path) -> None:
    data = open_data(scans)
    assert data.classes == ("0", "1", "2")
    assert data.parts["all"].counts() == {"0": 20, "1": 20, "2": 20}
    assert data.parts["all"].read(0).mode == "RGB"
    train, held_out = data.split(held_out=0.2, seed=0)
    assert held_out.counts() == {"0": 4, "1": 4, "2": 4}
    assert len(train) == 48


@pytest.mark.parametrize("part", ["val", "test"])
def test_train_and_val_or_test_folders_are_taken_as_they_are(
    part: str, own_scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    own_scans.rename(tmp_path / "data" / "train")
    (tmp_path / "data" / part / "1").mkdir(parents=True)
    (tmp_path / "data" / part / "1" / "x.png").write_bytes(encoded(picture()))
    data = open_data(tmp_path / "data")
    train, held_out = data.split(held_out=0.5, seed=0)
    assert (len(train), held_out.names, held_out.labels) == (24, ("1/x.png",), (1,))
    assert data.evaluation_part() is held_out


def test_the_fingerprint_follows_the_files_not_the_place(own_scans: Path, tmp_path: Path) -> None:
    before = open_data(own_scans).fingerprint
    moved = own_scans.rename(tmp_path / "moved")
    assert open_data(moved).fingerprint == before
    next(moved.rglob("*.png")).unlink()
    assert open_data(moved).fingerprint != before


def test_hidden_and_other_files_are_passed_over_and_counted(own_scans: Path) -> None:
    (own_scans / "0" / ".DS_Store").write_bytes(b"x")
    (own_scans / "0" / "notes.txt").write_text("x")
    (own_scans / ".git").mkdir()
    data = open_data(own_scans)
    assert (len(data.parts["all"]), data.classes) == (24, ("0", "1", "2"))
    assert data.notes == ("skipped 1 .txt: files of a kind that is not read here",)


def test_layouts_that_would_be_misread_are_refused_or_said(own_scans: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for part in ("train", "val"):
        (flat / part).mkdir(parents=True)
        (flat / part / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(
        UsageError, match="flat/train has no class folders: put its images in .*flat/train/<class>/"
    ):
        open_data(flat)
    split = tmp_path / "split"
    split.mkdir()
    own_scans.rename(split / "train")
    (split / "val").mkdir()
    (split / "val" / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(UsageError, match="split/val has no class folders"):
        open_data(split)
    (split / "val" / "a.png").unlink()
    (split / "val" / "0").mkdir()
    with pytest.raises(UsageError, match="split/val has no images: add some, or remove it"):
        open_data(split).split(held_out=0.2, seed=0)
    (split / "val" / "0" / "a.png").write_bytes(encoded(picture()))
    (split / "extra").mkdir()
    data = open_data(split)
    assert len(data.split(held_out=0.2, seed=0)[1]) == 1
    assert data.notes == (
        f"{split} has train/, val/ or test/, so its other folders are ignored: extra",
    )


def test_train_can_be_a_class(own_scans: Path) -> None:
    (own_scans / "0").rename(own_scans / "train")
    assert open_data(own_scans).classes == ("1", "2", "train")


def test_bad_folders_are_refused_with_the_fix(own_scans: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="no folder .*nowhere: give a folder of class folders, a CSV"
    ):
        open_data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no class folders"):
        open_data(tmp_path / "empty")
    (tmp_path / "empty" / "cats").mkdir()
    with pytest.raises(UsageError, match="has no images"):
        open_data(tmp_path / "empty")
    (own_scans / "dogs").mkdir()
    with pytest.raises(UsageError, match="class 'dogs' has no image in .*: add images"):
        open_data(own_scans).split(held_out=0.2, seed=0)
    (own_scans / "dogs" / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(UsageError, match="class 'dogs' has one image"):
        open_data(own_scans).split(held_out=0.2, seed=0)
    (tmp_path / "one" / "cats").mkdir(parents=True)
    (tmp_path / "one" / "cats" / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(UsageError, match=r"has one class only \(cats\)"):
        open_data(tmp_path / "one").split(held_out=0.2, seed=0)


def test_a_split_holds_out_at_least_one_image_of_a_rare_class(own_scans: Path) -> None:
    for path in sorted((own_scans / "2").iterdir())[2:]:
        path.unlink()
    for seed in range(20):
        train, held_out = stratified_split(
            open_data(own_scans).parts["all"], held_out=0.1, seed=seed
        )
        assert (train.counts()["2"], held_out.counts()["2"], len(train) + len(held_out)) == (
            1,
            1,
            18,
        )
        assert not set(train.names) & set(held_out.names)
    nearly_all = stratified_split(open_data(own_scans).parts["all"], held_out=0.97, seed=0)[0]
    assert nearly_all.counts() == {"0": 1, "1": 1, "2": 1}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "RGB"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 600)
        assert image.mode == "I;16"
    else:
        image = picture(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    read = read_image(path)
    assert (read.mode, read.size) == ("RGB", (12, 8))
    assert np.asarray(read).std() > 10  # a clipped 16-bit picture would be flat white


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(read_image(encoded(image))).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    read = read_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert read.size == (8, 16)
    assert read.getpixel((4, 2))[2] > 200


def test_damaged_exif_does_not_cost_the_picture() -> None:
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    text = struct.pack(
        "<HHI4s", 338, 2, 4, b"abc\0"
    )  # ExtraSamples should be numbers: Pillow cannot write it again
    odd = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + turned + text + b"\0\0\0\0"
    assert read_image(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=odd)).size == (8, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_equals_pillows_own(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(), "PNG", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        theirs = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(read_image(content)), np.asarray(theirs))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    read = read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert read.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["path", "bytes", "pillow", "array"])
def test_every_kind_of_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "x.png")
    source = {
        "path": tmp_path / "x.png",
        "bytes": encoded(image),
        "pillow": image,
        "array": np.asarray(image),
    }[kind]
    assert np.array_equal(np.asarray(read_image(source)), np.asarray(image))


def test_what_cannot_be_decoded_is_named_with_the_reason(tmp_path: Path) -> None:
    cases = {
        "empty.png": (b"", r"empty\.png: the file is empty \(0 bytes\)"),
        "text.jpg": (b"hello", r"text\.jpg: not an image in a format read here"),
        "drawing.svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "not an image in a format read here",
        ),
        "cut.jpg": (
            encoded(picture(size=(200, 200)), "JPEG")[:3000],
            r"cut\.jpg: cannot be decoded \(image file is truncated",
        ),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "nowhere.png")


HUGE = b"P5 10000 9000 255\n"  # a header of 90 million pixels, and none of them: who decodes it says that it is truncated
TOO_LARGE = "more than 89,478,485 pixels; make it smaller first"


@pytest.mark.parametrize("what", ["ignore", "error"])  # no one's filter of warnings changes it
@pytest.mark.parametrize(
    "side", [9_500, 20_000]
)  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_refused_before_it_is_decoded(what: str, side: int) -> None:
    content = b"P5 %d %d 255\n" % (side, side)
    for read in (
        read_image,
        Preprocessing(image_size=(8, 8), channels=1).read,
        Preprocessing(image_size=(8, 8)).read,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter(what)  # type: ignore[arg-type]
            with pytest.raises(DataError, match=f"^<bytes>: {TOO_LARGE}$"):
                read(content)


def test_the_largest_picture_is_not_refused() -> None:
    with pytest.raises(DataError, match="truncated"):
        read_image(b"P5 %d 1 255\n" % MAX_PIXELS)


def test_every_verb_names_a_picture_that_is_too_large(
    command: Command, tiny_run: TrainingResult, own_scans: Path, tmp_path: Path
) -> None:
    huge = own_scans / "2" / "huge.pgm"
    huge.write_bytes(HUGE)
    said = f"{huge}: {TOO_LARGE}"
    run = tiny_run.run
    assert (
        said
        in command("train", own_scans, "--out", tmp_path / "run", "--model", "crossvit_pico_32")[2]
    )
    assert said in command("evaluate", run, own_scans, "--split", "all")[2]
    assert said in command("explain", run, own_scans, "--check", "--split", "all")[2]
    assert f"{huge}  error: {TOO_LARGE}" in command("predict", run, huge)[1]
    assert (
        f"{huge}  error: {TOO_LARGE}"
        in command("explain", run, huge, "--out", tmp_path / "maps")[1]
    )
    assert TOO_LARGE in command("data", "check", own_scans)[1]
    assert command("data", "shard", own_scans, tmp_path / "shards")[0] == 0  # files as they are
    assert TOO_LARGE in command("data", "check", tmp_path / "shards")[1]
    assert (
        TOO_LARGE
        in command(
            "train", tmp_path / "shards", "--out", tmp_path / "run", "--model", "crossvit_pico_32"
        )[2]
    )
    assert not (tmp_path / "run").exists()


def test_broken_images_are_found_among_good_ones(own_scans: Path) -> None:
    (own_scans / "0" / "a-broken.png").write_bytes(b"")
    findings = look_at(open_data(own_scans).parts["all"])
    assert list(findings.broken) == ["0/a-broken.png"]
    assert "0 bytes" in findings.broken["0/a-broken.png"]
    assert findings.sizes == [(8, 8)] * 24


# ---------------------------------------------------------------- preprocessing


def torchvisions(image: Image.Image, size: int, crop: float) -> NDArray[np.float32]:
    """The usual evaluation transform, as timm builds it."""
    from torchvision.transforms import v2

    from crossvit.data.preprocess import IMAGENET_MEAN, IMAGENET_STD

    return v2.Compose(
        [
            v2.Resize(int(size / crop), v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
        ]
    )(image).numpy()


@pytest.mark.parametrize("size", [(320, 240), (240, 333), (500, 500), (100, 61), (240, 240)])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_centre_crop_equals_torchvisions(size: tuple[int, int], crop: float) -> None:
    image = picture(size=size)
    ours = Preprocessing(image_size=(240, 240), crop=crop)(image)
    np.testing.assert_allclose(ours, torchvisions(image, 240, crop), atol=1e-5)


def test_without_a_crop_the_whole_picture_is_seen() -> None:
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (0, 0, 20, 10))
    pixels = Preprocessing(image_size=(8, 8)).fit(image)
    assert pixels.shape == (8, 8, 3)
    assert pixels[:, 0].min() == 255
    assert pixels[:, -1].max() == 0


def test_normalisation_is_value_over_255_minus_mean_over_std() -> None:
    preprocessing = Preprocessing(image_size=(1, 2), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    pixels = np.array([[[0, 255, 51], [255, 0, 102]]], dtype=np.uint8)
    expected = [[[-1.0, 1.0]], [[0.75, -0.25]], [[0.1, 0.2]]]
    np.testing.assert_allclose(preprocessing.normalise(pixels), expected, atol=1e-6)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


# ---------------------------------------------------------------- order and augmentation


def test_seeded_decides_all_three_generators_and_restores_them() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    untouched = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(1, 2, 3):
        first = draw()
    assert draw() == untouched
    with seeded(1, 2, 3):
        assert draw() == first
    with seeded(1, 2, 4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_epochs_go_through_every_image_in_another_order() -> None:
    images = Order((0,) * 50, seed=3)
    orders = [[key.image for key in images.epoch(epoch)] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 2
    assert orders[0] != orders[1]
    assert [key.image for key in images.epoch(1)] == orders[1]


def loader(folder: Path, workers: int) -> TrainingLoader:
    preprocessing = Preprocessing(image_size=(16, 16))
    images = open_data(folder).parts["all"]
    return TrainingLoader(
        images,
        Augment(preprocessing, **STRENGTHS),
        preprocessing,
        batch_size=7,
        seed=5,
        workers=workers,
    )


def test_batches_follow_from_seed_and_epoch_whatever_was_loaded_before(scans: Path) -> None:
    first = loader(scans, workers=0)
    once = list(first.epoch(1))
    list(first.epoch(0))  # pictures are kept in memory by now
    torch.manual_seed(99)
    again = list(first.epoch(1))
    assert (
        len(first) == len(once) == 9
    )  # ceil(60 / 7): the last batch is short, and no image is left out
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(once, again, strict=True)
    )
    assert not torch.equal(once[0][0], next(iter(first.epoch(2)))[0])
    assert once[0][0].dtype == torch.float32
    assert once[0][0].shape == (7, 3, 16, 16)


@pytest.mark.slow
def test_workers_change_nothing(scans: Path) -> None:
    here, there = list(loader(scans, workers=0).epoch(1)), list(loader(scans, workers=2).epoch(1))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(here, there, strict=True)
    )


def test_random_crops_come_from_a_larger_view() -> None:
    augment = Augment(Preprocessing(image_size=(16, 16)), **(STRENGTHS | {"min_crop": 0.3}))
    view = augment.view(picture(size=(400, 200)))
    assert view.size == (64, 32)
    assert augment.view(picture(size=(20, 20))).size == (20, 20)
    assert augment(view, seed=0, epoch=0, index=0).shape == (16, 16, 3)


def test_large_jpegs_are_decoded_smaller_for_training_alone() -> None:
    content = encoded(
        picture(size=(1600, 1200)).resize((40, 30)).resize((1600, 1200)), "JPEG", quality=95
    )
    preprocessing = Preprocessing(image_size=(64, 64))
    whole, smaller = preprocessing.read(content), preprocessing.read(content, at_least=128)
    assert (whole.size, smaller.size) == (
        (1600, 1200),
        (200, 150),
    )  # an eighth: both sides are 128 or more
    assert preprocessing.read(content, at_least=601).size == (1600, 1200)
    assert preprocessing.read(encoded(picture(size=(400, 400))), at_least=10).size == (
        400,
        400,
    )  # no JPEG
    apart = np.abs(preprocessing.fit(whole).astype(int) - preprocessing.fit(smaller).astype(int))
    assert apart.mean() < 2  # of 255
    assert preprocessing.read(content, at_least=128).tobytes() == smaller.tobytes()


def test_zero_strengths_leave_the_picture_as_the_preprocessing_fits_it() -> None:
    preprocessing = Preprocessing(image_size=(16, 16))
    augment = Augment(
        preprocessing, min_crop=1.0, flip=0.0, rotate=0.0, shift=0.0, zoom=0.0, colour=0.0
    )
    image = picture()
    assert np.array_equal(
        augment(augment.view(image), seed=0, epoch=0, index=0), preprocessing.fit(image)
    )
