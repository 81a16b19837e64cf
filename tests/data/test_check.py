"""`crossvit data check`: every planted fault is found, nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossvit.data.check import check, look_at, near_identical
from crossvit.data.images import Arrays, Data, ImageSet
from crossvit.data.sources import open_data
from crossvit.train.loop import fit
from support.runs import Heard, recipe

Command = Callable[..., tuple[int, str, str]]


def photo(seed: int) -> Image.Image:
    """Something with large soft shapes, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two parts of two classes, five different pictures in each."""
    seed = 0
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(5):
                photo(seed).save(tmp_path / "photos" / part / name / f"{number}.png")
                seed += 1
    return tmp_path / "photos"


def test_clean_data_has_nothing_wrong(photos: Path) -> None:
    found = check(open_data(photos))
    assert (found.n, found.imbalance, found.modes) == (20, 1.0, {"RGB": 20})
    assert (
        found.identical_count,
        found.near_count,
        found.leak_count,
        found.conflict_count,
        found.broken,
    ) == (0, 0, 0, 0, ())
    assert [(part.part, part.classes, part.median) for part in found.parts] == [
        (part, {"cat": 5, "dog": 5}, (80, 96)) for part in ("train", "val")
    ]


def test_what_is_planted_is_found(photos: Path) -> None:
    train, val = photos / "train", photos / "val"
    shutil.copy(train / "cat" / "0.png", val / "cat" / "leak.png")
    shutil.copy(train / "cat" / "1.png", train / "dog" / "conflict.png")
    with Image.open(train / "dog" / "2.png") as original:
        original.resize((70, 58), Image.Resampling.LANCZOS).save(
            val / "dog" / "smaller.jpg", quality=60
        )
    (train / "dog" / "torn.png").write_bytes((train / "dog" / "3.png").read_bytes()[:200])
    Image.new("L", (50, 50), 7).save(train / "cat" / "grey.png")
    found = check(open_data(photos), pictures=True)
    leak, conflict = found.identical
    assert {Path(image).name for image in leak.images} == {"0.png", "leak.png"}
    assert (leak.parts, leak.leak, leak.conflict) == (("train", "val"), True, False)
    assert {Path(image).name for image in conflict.images} == {"1.png", "conflict.png"}
    assert (set(conflict.labels), conflict.leak, conflict.conflict) == ({"cat", "dog"}, False, True)
    (near,) = found.near
    assert {Path(image).name for image in near.images} == {"2.png", "smaller.jpg"}
    assert near.leak
    assert (found.identical_count, found.near_count, found.leak_count, found.conflict_count) == (
        2,
        1,
        2,
        1,
    )
    assert [broken.image for broken in found.broken] == ["dog/torn.png"]
    assert found.modes == {"RGB": 23, "L": 1}
    assert leak.first_picture.startswith(b"\xff\xd8")


def test_bands_find_every_pair_that_comparing_all_finds() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (60, 4, 4), dtype=np.uint8)
    pictures = np.stack(
        [
            np.asarray(Image.fromarray(one).resize((48, 48), Image.Resampling.BICUBIC))
            for one in coarse
        ]
    )
    noisy = np.clip(pictures.astype(int) + rng.integers(-3, 4, pictures.shape), 0, 255).astype(
        np.uint8
    )
    both = np.concatenate((pictures, noisy))
    names = tuple(map(str, range(len(both))))
    images = ImageSet(
        Arrays("made-up", both), ("a", "b"), names, (0,) * len(both), (1,) * len(both)
    )
    data = Data("made-up", ("a", "b"), {"all": images})
    looks = {"all": look_at(images, near=True)}
    hashes = [look.near for look in looks["all"].looks.values()]
    every = {
        (one, other)
        for one in range(len(both))
        for other in range(one + 1, len(both))
        if (hashes[one] ^ hashes[other]).bit_count() <= 4
    }
    found = {(one.position, other.position) for one, other, _ in near_identical(data, looks)}
    assert found == every
    assert len(found) >= 10


def test_the_command_says_it_and_draws_it(photos: Path, tmp_path: Path, command: Command) -> None:
    shutil.copy(photos / "train" / "cat" / "0.png", photos / "val" / "dog" / "leak.png")
    status, out, _ = command("data", "check", photos, "--report", tmp_path / "check.html")
    assert status == 0
    assert "same     " in out
    assert "(in train and val; labelled cat and dog)" in out
    assert (
        out.splitlines()[-2]
        == "in all   0 broken; 1 exact duplicates (1 filed under two classes), 0 near-duplicates; 1 of these shared by two parts of the split"
    )
    page = (tmp_path / "check.html").read_text()
    assert page.count("data:image/jpeg;base64") == 2
    status, out, _ = command("data", "check", photos, "--json")
    record = json.loads(out)
    assert (record["leak_count"], record["conflict_count"], record["identical"][0]["parts"]) == (
        1,
        1,
        ["train", "val"],
    )
    assert "first_picture" not in record["identical"][0]


def test_train_warns_of_what_it_sees_anyway(scans: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    shutil.copytree(scans, folder)
    for number in range(6):
        shutil.copy(sorted((folder / "0").iterdir())[0], folder / "0" / f"again-{number}.png")
    for photo in sorted((folder / "2").iterdir())[2:]:
        photo.unlink()
    callback = Heard()
    fit(recipe(folder, tmp_path / "run"), callback=callback)
    warned = [line for line in callback.lines if line.startswith("warn")]
    assert any("images are on both sides of the split, such as" in line for line in warned)
    assert any("--class-weights balanced or --sampling balanced" in line for line in warned)
    clean = Heard()
    fit(recipe(scans, tmp_path / "clean"), callback=clean)
    assert not [line for line in clean.lines if line.startswith("warn")]
