"""Prediction: evaluation's inputs to the bit, views, labels, abstention, pictures of every kind, which images are found."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import expit, softmax

import crossvit
from crossvit.data.preprocess import MAX_ASPECT, Preprocessing, read_image
from crossvit.data.sources import is_image_file, open_data
from crossvit.engines.protocol import EngineOutput
from crossvit.errors import UsageError
from crossvit.evaluation.evaluator import measure
from crossvit.prediction.image_paths import find_images, scan_images
from crossvit.prediction.predictor import (
    READ_AHEAD,
    VIEWS,
    Predictor,
    centre,
)
from crossvit.results import Label, TrainingResult
from crossvit.trained import Trained, open_trained

Changed = Callable[..., Predictor]


class Recorder:
    """An engine that keeps what went in and came out."""

    precision = "fp32"

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def __call__(self, images: Any) -> Any:
        self.inputs.append(images.copy())
        self.outputs.append(self.engine(images))
        return self.outputs[-1]


@pytest.fixture(scope="module")
def paths(scans: Path) -> list[str]:
    return find_images([str(scans)])


@pytest.fixture
def changed(tiny_run: TrainingResult, monkeypatch: pytest.MonkeyPatch) -> Changed:
    """A Predictor of the tiny run as if its record said something else."""

    def make(record: dict[str, Any], **options: Any) -> Predictor:
        def opened(source: str) -> Trained:
            return dataclasses.replace(open_trained(source), **record)

        monkeypatch.setattr("crossvit.prediction.predictor.open_trained", opened)
        return Predictor(tiny_run.run, **options)

    return make


# ---------------------------------------------------------------- the model's answer


@pytest.mark.parametrize("crop", [None, 0.875])
def test_inputs_and_logits_are_evaluations_to_the_bit(
    crop: float | None, changed: Changed, scans: Path, paths: list[str]
) -> None:
    preprocessing = Preprocessing(image_size=(32, 32), crop=crop)
    predictor = changed({"preprocessing": preprocessing}, batch_size=24)
    ours, evaluations = Recorder(predictor.engine), Recorder(predictor.engine)
    predictor.engine = ours
    predictor(paths)
    images = open_data(scans).parts["all"]
    assert [images.path(index) for index in range(len(images))] == paths
    measure(evaluations, images, preprocessing, batch_size=24)
    assert [len(batch) for batch in ours.inputs] == [24, 24, 12]
    for mine, theirs in zip(ours.inputs, evaluations.inputs, strict=True):
        assert np.array_equal(mine, theirs)
    for mine, theirs in zip(ours.outputs, evaluations.outputs, strict=True):
        assert all(map(np.array_equal, mine, theirs))


@pytest.mark.parametrize(
    ("temperature", "task"), [(1.0, "single-label"), (2.5, "single-label"), (2.5, "multi-label")]
)
def test_probabilities_are_scipys(
    temperature: float, task: str, changed: Changed, paths: list[str]
) -> None:
    predictor = changed({"temperature": temperature, "task": task}, top_k=3)
    predictor.engine = Recorder(predictor.engine)
    predictions = predictor(paths[:8])
    logits = predictor.engine.outputs[0].logits.astype(float) / temperature
    expected = softmax(logits, axis=1) if task == "single-label" else expit(logits)
    for prediction, row in zip(predictions, expected, strict=True):
        assert {label.label: label.probability for label in prediction.top} == pytest.approx(
            dict(zip(predictor.classes, row, strict=True))
        )
        assert [label.probability for label in prediction.top] == pytest.approx(
            sorted(row, reverse=True)
        )


def test_several_labels_are_those_at_or_above_their_thresholds(changed: Changed) -> None:
    predictor = changed({"task": "multi-label", "thresholds": (0.5, 0.9, 0.25)}, top_k=1)
    logits = np.log([[0.5 / 0.5, 0.8 / 0.2, 0.9 / 0.1], [0.1 / 0.9, 0.1 / 0.9, 0.1 / 0.9]])
    predictor.engine = Recorder(
        lambda images: EngineOutput.of_branches(np.stack([logits, logits]).astype(np.float32))
    )
    both, none = predictor([np.zeros((8, 8, 3), np.uint8)] * 2)
    assert [label.label for label in both.labels] == ["2", "0"]
    assert [label.probability for label in both.labels] == pytest.approx([0.9, 0.5])
    assert (both.label, len(both.top)) == ("2", 1)
    assert (none.label, none.labels, none.error, none.abstained) == (None, (), None, False)
    assert none.top[0].probability == pytest.approx(0.1)
    with pytest.raises(
        UsageError, match="thresholds say which are given, so leave out abstain_below"
    ):
        changed({"task": "multi-label"}, abstain_below=0.5)


def test_abstaining_keeps_what_the_answer_would_have_been(
    tiny_run: TrainingResult, paths: list[str]
) -> None:
    sure = Predictor(tiny_run.run)(paths)
    middle = sorted(prediction.top[0].probability for prediction in sure)[len(sure) // 2]
    unsure = Predictor(tiny_run.run, abstain_below=middle)(paths)
    for before, after in zip(sure, unsure, strict=True):
        assert after.top == before.top
        abstains = before.top[0].probability < middle  # at `middle` itself it answers
        assert (after.abstained, after.labels, after.label) == (
            (True, (), None) if abstains else (False, before.top[:1], before.label)
        )
    assert 0 < sum(prediction.abstained for prediction in unsure) <= len(unsure) // 2


def test_views_are_averaged_as_logits(tiny_run: TrainingResult, paths: list[str]) -> None:
    predictor = Predictor(tiny_run.run, tta="flip-zoom", top_k=3)
    predictor.engine = Recorder(predictor.engine)
    (prediction,) = predictor(paths[0])
    assert len(predictor.engine.inputs) == len(VIEWS["flip-zoom"]) == 6
    plain, mirrored = predictor.engine.inputs[0], predictor.engine.inputs[3]
    assert np.array_equal(mirrored, plain[..., ::-1])
    assert np.array_equal(plain[0], predictor.preprocessing(paths[0]))
    logits = np.mean([output.logits[0] for output in predictor.engine.outputs], axis=0)
    assert [label.probability for label in prediction.top] == pytest.approx(
        sorted(softmax(logits), reverse=True), abs=1e-6
    )


def test_with_mirrored_views_a_picture_and_its_mirror_image_are_one(
    tiny_run: TrainingResult, paths: list[str]
) -> None:
    picture = read_image(paths[0])
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for tta, same in (("flip", True), ("none", False)):
        one, other = Predictor(tiny_run.run, tta=tta)([picture, mirror])
        assert (one.top[0].probability == pytest.approx(other.top[0].probability, abs=1e-6)) is same


@pytest.mark.parametrize("size", [(10, 20), (1, 1), (7, 3)])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.8, 0.5])
def test_the_centre_of_a_picture_and_of_an_array_are_the_same(
    size: tuple[int, int], share: float
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    cut = centre(pixels.astype(np.float32), share)
    assert np.array_equal(np.asarray(centre(Image.fromarray(pixels), share)), cut)
    assert cut.shape[:2] == tuple(max(1, round(share * side)) for side in size)
    if share == 0.5 and size == (10, 20):
        assert np.array_equal(cut, pixels[2:7, 5:15])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tta": "flop"}, "unknown test-time augmentation 'flop': did you mean flip"),
        ({"abstain_below": 0.0}, "abstain_below = 0.0: should be a probability"),
        ({"abstain_below": float("nan")}, "abstain_below = nan"),
        ({"batch_size": 0}, "batch_size = 0: should be 1 or more"),
        ({"workers": 0}, "workers = 0: should be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], says: str, tiny_run: TrainingResult
) -> None:
    with pytest.raises(UsageError, match=says):
        Predictor(tiny_run.run, **options)


def test_a_weight_file_predicts_as_the_run_it_is_of(
    tiny_run: TrainingResult, paths: list[str]
) -> None:
    expected = Predictor(tiny_run.run)(paths[:4])
    assert Predictor(Path(tiny_run.run) / "model.safetensors")(paths[:4]) == expected


def test_an_array_of_pictures_is_a_batch(tiny_run: TrainingResult, paths: list[str]) -> None:
    predictor = Predictor(tiny_run.run)
    pixels = np.stack([np.asarray(read_image(path)) for path in paths[:3]])
    assert [prediction.top for prediction in predictor(pixels)] == [
        prediction.top for prediction in predictor(paths[:3])
    ]
    assert len(predictor(pixels[0])) == 1


def test_weights_that_are_damaged_give_errors_and_no_numbers(
    tiny_run: TrainingResult, paths: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run.run, tmp_path / "run"))
    weights = load_file(run / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, run / "model.safetensors")
    (prediction,) = Predictor(run)(paths[0])
    assert prediction.top == ()
    assert "not a finite number" in str(prediction.error)


def test_threads_may_share_a_predictor(tiny_run: TrainingResult, paths: list[str]) -> None:
    predictor = Predictor(tiny_run.run)
    expected = [predictor(path) for path in paths[:12]]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(predictor, paths[:12])) == expected


def test_images_are_taken_only_as_they_are_needed(
    tiny_run: TrainingResult, paths: list[str]
) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield paths[0]

    batches = Predictor(tiny_run.run, batch_size=4).batches(endless())
    for number in range(1, 6):
        assert len(next(batches)) == 4
        assert taken == 4 * (number + READ_AHEAD)
    batches.close()
    assert taken == 4 * (5 + READ_AHEAD)


# ---------------------------------------------------------------- pictures of every kind

NOT_AN_IMAGE = "not an image in a format read here"


def photo(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).astype(np.uint8).reshape(height, width, 3)
    return Image.fromarray(ramp).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def large_png(width: int, height: int) -> bytes:
    """A whole PNG of one bit a pixel, all black: small as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    squeeze = zlib.compressobj(1)
    row = bytes(1 + width // 8)
    pixels = b"".join(squeeze.compress(row * 100) for _ in range(height // 100)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def animation(kind: str) -> bytes:
    return encoded(
        photo(),
        kind,
        save_all=True,
        append_images=[Image.new("RGB", (40, 30), "red")] * 2,
        duration=50,
    )


EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6

# name -> (content of the file, what the error says; None where the picture is classified)
PICTURES: dict[str, tuple[bytes, str | None]] = {
    "a header of 300 million pixels.ppm": (
        b"P6 20000 15000 255\n" + bytes(300),
        "more than 89,478,485 pixels",
    ),
    "300 million real pixels.png": (large_png(20_000, 15_000), "more than 89,478,485 pixels"),
    "100 million real pixels.png": (large_png(10_000, 10_000), "more than 89,478,485 pixels"),
    "truncated.jpg": (encoded(photo(400, 300), "JPEG")[:2000], "truncated"),
    "truncated.png": (encoded(photo(400, 300), "PNG")[:300], "cannot be decoded"),
    "text.jpg": (b"This is text.\n", NOT_AN_IMAGE),
    "page.png": (b"<!DOCTYPE html><html>404</html>", NOT_AN_IMAGE),
    "drawing.svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        NOT_AN_IMAGE,
    ),
    "empty.png": (b"", "the file is empty (0 bytes)"),
    "one pixel.png": (encoded(photo(1, 1), "PNG"), None),
    "hair.png": (encoded(photo(1, 5000), "PNG"), None),
    "16 bits.png": (
        encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        None,
    ),
    "cmyk.jpg": (encoded(photo(mode="CMYK"), "JPEG"), None),
    "grey.jpg": (encoded(photo(mode="L"), "JPEG"), None),
    "palette.png": (encoded(photo(mode="P"), "PNG"), None),
    "transparent.png": (encoded(photo(mode="RGBA"), "PNG"), None),
    "animated.gif": (animation("GIF"), None),
    "animated.webp": (animation("WEBP"), None),
    "turned.jpg": (encoded(photo(), "JPEG", exif=EXIF_ROTATED), None),
    "no ending": (encoded(photo(), "PNG"), None),
    "путь с пробелами 写真 é.png": (encoded(photo(), "PNG"), None),
    "two\nlines.png": (encoded(photo(), "PNG"), None),
}


def test_each_picture_is_a_result(tiny_run: TrainingResult, tmp_path: Path) -> None:
    """All in one batch, so that none of them spoils the others; as files and as bytes."""
    for name, (content, _) in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    predictor = Predictor(tiny_run.run)
    for sources in (
        [tmp_path / name for name in PICTURES],
        [content for content, _ in PICTURES.values()],
    ):
        for (name, (_, says)), prediction in zip(PICTURES.items(), predictor(sources), strict=True):
            if says is None:
                assert (prediction.error, len(prediction.top)) == (None, 3), name
            else:
                assert says in str(prediction.error) or (
                    says.startswith("the file is") and NOT_AN_IMAGE in str(prediction.error)
                )
                assert prediction.top == (), name


def test_what_is_no_file_is_a_result_and_nothing_waits(
    tiny_run: TrainingResult, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    specials = [tmp_path / "pipe.png", tmp_path / "folder.png", "/dev/zero"]
    absent = [tmp_path / "dangling.png", tmp_path / "gone.png", "x" * 5000, "nul\0.png", ""]
    predictions = Predictor(tiny_run.run)([*specials, *absent])
    for prediction in predictions[:3]:
        assert str(prediction.error).endswith(
            "cannot be decoded (a folder, a pipe or a device, not a file)"
        )
    for prediction in predictions[3:5]:
        assert str(prediction.error).endswith(": no such file")
    assert all(prediction.error for prediction in predictions)
    with pytest.raises(UsageError, match="has no images"):
        find_images([str(tmp_path)])  # none of these is a file with an image's ending that is there


def test_pictures_are_read_as_people_see_them() -> None:
    assert (
        read_image(encoded(photo(), "PNG", exif=EXIF_ROTATED)).tobytes()
        == photo().transpose(Image.Transpose.ROTATE_270).tobytes()
    )
    first = np.asarray(read_image(animation("WEBP")), dtype=int)
    assert abs(first - np.asarray(photo())).mean() < 10  # the first picture, not the red ones
    sixteen = np.array([[0, 256, 65535]], dtype=np.uint16)
    assert np.asarray(read_image(encoded(Image.fromarray(sixteen), "PNG")))[0, :, 0].tolist() == [
        0,
        1,
        255,
    ]


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_hair_does_not_fill_the_memory_and_others_are_not_touched(side: str) -> None:
    """Scaled to cover the crop, a picture of 1 x 200,000 would have 15 thousand million pixels."""
    preprocessing = Preprocessing(image_size=(240, 240), crop=0.875)
    long = Image.new("RGB", (200_000, 1) if side == "width" else (1, 200_000), "white")
    assert preprocessing.fit(long).shape == (240, 240, 3)
    within = photo(3 * MAX_ASPECT, 3)
    height, width = 274, 274 * MAX_ASPECT
    whole = within.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 240) / 2), round((height - 240) / 2)
    assert np.array_equal(
        preprocessing.fit(within), np.asarray(whole.crop((left, top, left + 240, top + 240)))
    )


# ---------------------------------------------------------------- which images


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """As `sorted` of the whole paths, whatever names folders and files have."""
    chance = random.Random(0)
    for _ in range(150):
        parts = [
            "".join(chance.choices("aB.-0 é", k=chance.randint(1, 3))).strip(". ") or "x"
            for _ in range(chance.randint(0, 3))
        ]
        folder = tmp_path.joinpath("root", *parts)
        if not any(place.is_file() for place in (folder, *folder.parents)):
            folder.mkdir(parents=True, exist_ok=True)
            (
                folder / f"{chance.choice('aB-0é')}{chance.choice(['.png', '.JPG', '.txt', ''])}"
            ).touch()
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / ".hidden.png").touch()
    expected = sorted(str(path) for path in (tmp_path / "root").rglob("*") if is_image_file(path))
    assert len(expected) > 50
    assert list(scan_images([str(tmp_path / "root")])) == expected


def test_a_folder_that_cannot_be_listed_is_a_result_with_an_error(
    tiny_run: TrainingResult, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = os.scandir

    def scandir(folder: str) -> Any:
        if folder.endswith("/1"):
            raise PermissionError(13, "Permission denied", folder)
        return listing(folder)

    monkeypatch.setattr("os.scandir", scandir)
    found = find_images([str(scans)])
    assert len(found) == 41
    assert found[20] == str(scans / "1")
    assert Predictor(tiny_run.run)(found[20])[0].error is not None


def test_predictions_say_which_record_they_are() -> None:
    """The record that scripts build on."""
    record = crossvit.Prediction("a.jpg", (Label("cat", 0.9),), labels=(Label("cat", 0.9),))
    assert list(dataclasses.asdict(record)) == ["image", "top", "error", "labels", "abstained"]
    assert record.label == "cat"
