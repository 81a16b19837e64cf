"""Pictures made worse: the same whatever the order and the processes, and what is measured on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from crossvit.data.images import Arrays, ImageSet
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import open_data
from crossvit.engines.protocol import EngineOutput
from crossvit.errors import UnknownNameError, UsageError
from crossvit.evaluation.robustness import (
    CORRUPTIONS,
    Corruption,
    Shrunk,
    measure_robustness,
    transforms,
)

GREY = Preprocessing(image_size=(8, 8))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photo of 96x64, from scikit-learn."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((96, 64))


def brightness(images: NDArray[np.float32]) -> EngineOutput:
    """A model of one branch that says 1 of a picture that is bright, 0 of one that is dark."""
    light = images.mean(axis=(1, 2, 3))
    return EngineOutput.of_branches(np.stack([-light, light], axis=1)[None])


def plain(*levels: int) -> ImageSet:
    """Pictures of one grey each, labelled as `brightness` should say."""
    pixels = np.stack([np.full((64, 64, 3), level, dtype=np.uint8) for level in levels])
    labels = tuple(int(level > 115) for level in levels)  # the mean of IMAGENET_MEAN
    names = tuple(str(index) for index in range(len(levels)))
    return ImageSet(
        Arrays("made-up", pixels), ("dark", "bright"), names, labels, (1,) * len(levels)
    )


def test_the_fifteen_are_the_packages_common_ones_in_the_papers_order() -> None:
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")
    assert len(transforms(CORRUPTIONS, ())) == 75


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_same_for_the_same_seed_and_grows(
    name: str, photo: Image.Image
) -> None:
    before = np.random.get_state()[1].copy()
    first, again = (np.asarray(Corruption(name, 3)(photo, seed=7)) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(np.random.get_state()[1], before)  # nobody else's draws change
    clean = np.asarray(photo).astype(float)
    low, high = (
        np.abs(np.asarray(Corruption(name, severity)(photo, seed=7)) - clean).mean()
        for severity in (1, 5)
    )
    assert 0 < low < high
    drawn = name not in (
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    assert np.array_equal(first, np.asarray(Corruption(name, 3)(photo, seed=8))) != drawn


def test_large_and_small_pictures_are_brought_to_the_sizes_the_severities_are_for(
    photo: Image.Image,
) -> None:
    assert Corruption("contrast", 1)(photo.resize((1200, 600)), seed=0).size == (512, 256)
    assert Corruption("contrast", 1)(photo.resize((8, 16)), seed=0).size == (32, 64)
    assert Corruption("contrast", 1)(photo, seed=0).size == photo.size


def test_shrinking_leaves_small_pictures_alone(photo: Image.Image) -> None:
    assert Shrunk(16)(photo, seed=0).size == (24, 16)
    assert Shrunk(100)(photo, seed=0) is photo
    assert Shrunk(1)(photo.resize((300, 4)), seed=0).size == (75, 1)


def test_what_is_measured_at_literal_values() -> None:
    """Contrast 0.4 leaves the mean of a plain picture as it is; brightness adds up to a half: dark ones become bright."""
    images = plain(90, 40, 200, 230)
    asked = transforms(("brightness", "contrast"), (4, 32))
    seen: list[tuple[int, int]] = []
    found = measure_robustness(
        brightness, images, GREY, asked, batch_size=3, progress=lambda *count: seen.append(count)
    )
    assert (found.n, found.unspoilt) == (4, 1.0)
    assert [(score.name, score.top1) for score in found.corruptions] == [
        (
            "brightness",
            (0.75, 0.75, 0.5, 0.5, 0.5),
        ),  # of 255: 90 + 26, 40 + 77 (V of HSV), and so on
        ("contrast", (1.0,) * 5),
    ]
    assert found.mean == pytest.approx(0.8)
    assert [(score.pixels, score.top1) for score in found.sizes] == [(32, 1.0), (4, 1.0)]
    assert seen[-1] == (52, 52)
    assert seen == sorted(seen)


def test_a_sample_is_spread_over_the_images() -> None:
    images = plain(*([10] * 50), *([250] * 50))
    wrong = dataclasses.replace(images, labels=(0,) * 100)
    found = measure_robustness(brightness, wrong, GREY, transforms((), (8,)), sample=10)
    assert (found.n, found.unspoilt, found.mean) == (10, 0.5, None)


def test_other_processes_give_the_same_figures(scans: Path) -> None:
    images = open_data(scans).part("all")
    asked = transforms(("impulse_noise", "glass_blur", "frost"), (4,))
    spread = np.random.default_rng(0).normal(size=(8 * 8 * 3, 3)).astype(np.float32)

    def forward(batch: NDArray[np.float32]) -> EngineOutput:
        return EngineOutput.of_branches((batch.reshape(len(batch), -1) @ spread)[None])

    alone = measure_robustness(forward, images, GREY, asked, sample=12, batch_size=5)
    assert alone == measure_robustness(
        forward, images, GREY, asked, sample=12, batch_size=4, workers=2
    )
    assert len({score.top1 for score in alone.corruptions}) > 1


def test_what_cannot_be_asked_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnknownNameError, match="unknown corruption 'fogg': did you mean fog"):
        transforms(("fogg",), ())
    with pytest.raises(
        UsageError, match="sizes has 0: each should be a shorter side of 1 pixel or more"
    ):
        transforms((), (32, 0))
    with pytest.raises(UsageError, match="pictures of 6 channels cannot be corrupted"):
        transforms((), (8,), channels=6)
    assert transforms((), (), channels=6) == ()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'crossvit\[robustness\]'"):
        transforms(("fog",), ())
