"""Explanations of whole models: maps that point where the answer is, laid where the model looked, checked, drawn and written."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import crossvit
from crossvit import BranchConfig, CrossViTConfig
from crossvit.data.preprocess import Preprocessing
from crossvit.errors import DataError, UnknownNameError
from crossvit.explanation.explainer import Explainer, arrays
from crossvit.explanation.faithfulness import filled, map_kinds
from crossvit.explanation.relevance import read
from crossvit.model.crossvit import CrossViT
from crossvit.report.maps import explanation_png
from crossvit.results import Faithfulness, TrainingResult, to_json
from crossvit.trained import open_trained
from crossvit.weights.files import header, write_weights
from support.models import SMALL

Command = Callable[..., tuple[int, str, str]]

PLANTED = CrossViTConfig(
    image_size=32,
    num_classes=4,
    stages=2,
    init="xavier",
    branches=(
        BranchConfig(patch=4, dim=32, heads=2, depth=1, mlp_ratio=2),
        BranchConfig(patch=8, dim=48, heads=2, depth=1, mlp_ratio=2),
    ),
)
CLASSES = ("red", "green", "blue", "white")
COLOURS = torch.tensor([[230, 40, 40], [40, 230, 40], [40, 40, 230], [250, 250, 250]])
CHANCE = 1 / 16


def planted(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grey noise with one square of 8x8 pixels in one of 16 places, whose colour alone is the class: (pictures (n, 32, 32, 3)
    uint8, labels, places)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = (
        torch.randint(90, 166, (count, 32, 32, 1), generator=generator)
        .expand(-1, -1, -1, 3)
        .clone()
    )
    labels = torch.randint(0, 4, (count,), generator=generator)
    places = torch.randint(0, 16, (count,), generator=generator)
    for picture, label, place in zip(pictures, labels, places, strict=True):
        row, column = divmod(int(place), 4)
        picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = COLOURS[label]
    return pictures.to(torch.uint8), labels, places


def inputs(pictures: Tensor) -> Tensor:
    return torch.from_numpy(Preprocessing(image_size=(32, 32)).normalise(pictures.numpy()))


def save(model: CrossViT, path: Path, classes: tuple[str, ...], crop: float | None = None) -> Path:
    preprocessing = Preprocessing(image_size=model.config.image_size, crop=crop).to_dict()
    described = header(
        model=None, config=model.config, classes=classes, preprocessing=preprocessing
    )
    write_weights(path, model.state_dict(), described)
    return path


@pytest.fixture(scope="session")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file of a model trained for some seconds to say the colour of the planted square."""
    torch.manual_seed(0)
    model = CrossViT(PLANTED)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    pictures, labels, _ = planted(1024, seed=0)
    images = inputs(pictures)
    for step in range(80):
        batch = torch.arange(32) + 32 * (step % 32)
        loss = sum(
            F.cross_entropy(own, labels[batch]) for own in model.branch_logits(images[batch])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return save(model.eval(), tmp_path_factory.mktemp("finder") / "finder.safetensors", CLASSES)


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planted pictures as a folder of class folders."""
    folder = tmp_path_factory.mktemp("squares")
    pictures, labels, places = planted(48, seed=2)
    for index, (picture, label, place) in enumerate(zip(pictures, labels, places, strict=True)):
        own = folder / CLASSES[int(label)]
        own.mkdir(exist_ok=True)
        Image.fromarray(picture.numpy()).save(own / f"{index:02d}-{int(place):02d}.png")
    return folder


@pytest.fixture(scope="session")
def checked(finder: Path, squares: Path) -> Faithfulness:
    return crossvit.check_maps(finder, squares, images=40, steps=8, fill="mean")


# ---------------------------------------------------------------- what maps point at


def test_maps_of_the_whole_answer_point_at_the_planted_square(finder: Path) -> None:
    model = open_trained(finder).build()
    pictures, labels, places = planted(64, seed=1)
    reading = read(model, inputs(pictures))
    assert (reading.targets == labels).float().mean() > 0.95
    kinds = map_kinds(reading)
    assert set(kinds) == {
        "rollout", "gradient-weighted", "attention: S", "attention: L", "cross: S reads L", "cross: L reads S",
    }  # fmt: skip
    for kind in ("rollout", "gradient-weighted"):
        in_places = (
            F.avg_pool2d(kinds[kind][:, None], 2)[:, 0].flatten(1) / 16
        )  # (n, 16): the share on each place
        assert in_places.gather(1, places[:, None]).mean() > 2 * CHANCE, kind
        assert (in_places.argmax(dim=1) == places).float().mean() > 0.6, kind


def test_the_check_finds_that_they_beat_random_maps(checked: Faithfulness) -> None:
    assert (checked.n, checked.split, checked.grid, len(checked.shares)) == (40, "all", (8, 8), 9)
    scores = {score.kind: score for score in checked.scores}
    assert list(scores)[-3:] == ["centre", "random blobs", "random"]
    weighted = scores["gradient-weighted"]
    assert (weighted.deletion_verdict, weighted.insertion_verdict) == ("better", "better")
    assert weighted.deletion.area < scores["random"].deletion.area
    assert weighted.insertion.area > scores["random"].insertion.area
    random = scores["random"]
    assert (random.deletion_gain, random.deletion_verdict, random.insertion_verdict) == (
        0.0,
        "no different",
        "no different",
    )
    for score in checked.scores:
        assert score.deletion.mean[0] == score.insertion.mean[-1] == pytest.approx(checked.intact)
        assert score.deletion.mean[-1] == score.insertion.mean[0] == pytest.approx(checked.emptied)
        assert score.deletion.area == pytest.approx(
            np.trapezoid(score.deletion.mean, checked.shares)
        )
        gain = scores["random"].deletion.area - score.deletion.area
        assert score.deletion_gain == pytest.approx(gain)
        assert (
            score.deletion_gain_interval.low
            <= score.deletion_gain
            <= score.deletion_gain_interval.high
        )
        assert all(
            interval.low <= mean <= interval.high
            for interval, mean in zip(score.deletion.intervals, score.deletion.mean, strict=True)
        )


def test_the_check_is_the_same_for_the_same_seed(finder: Path, squares: Path) -> None:
    once, again, other = (
        crossvit.check_maps(finder, squares, images=6, steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert to_json(once) == to_json(again) != to_json(other)


def test_what_stands_in_for_a_cell() -> None:
    images = torch.rand(2, 3, 20, 30)
    assert torch.equal(
        filled(images, "mean"), images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    )
    blurred = filled(images, "blur")
    assert blurred.shape == images.shape
    assert blurred.std(dim=(2, 3)).max() < 0.3 * images.std(dim=(2, 3)).min()
    flat = torch.full((1, 1, 4, 4), 0.25)
    torch.testing.assert_close(filled(flat, "blur"), flat)


# ---------------------------------------------------------------- one image


def test_an_explanation_has_every_map_and_its_answer_is_the_predictors(
    tiny_run: TrainingResult, scans: Path
) -> None:
    image = next(scans.glob("1/*.png"))
    found = crossvit.explain(tiny_run.run, image)
    (predicted,) = crossvit.Predictor(tiny_run.run)(image)
    assert found.top is not None
    assert found.top.label == predicted.label
    assert found.top.probability == pytest.approx(predicted.top[0].probability, rel=1e-4)
    assert found.explained == found.top
    assert [branch.name for branch in found.branches] == ["S", "L"]
    assert [branch.grid for branch in found.branches] == [(8, 8), (4, 4)]
    assert len(found.select("attention", reader="L")) == 2 * 2  # two stages of two blocks
    (crossed,) = found.select("cross", reader="S", stage=2)
    assert (crossed.on, crossed.values.shape, crossed.name) == (
        "L",
        (4, 4, 4),
        "cross.S.on-L.stage2.block1",
    )
    for branch in found.branches:
        own, other = (
            found.select("rollout", reader=branch.name, on=on)[0]
            for on in sorted("SL", key=lambda on: on != branch.name)
        )
        assert branch.from_other == pytest.approx(other.share)
        assert own.share + other.share < 1  # the rest is on class tokens
        assert own.values.sum() == pytest.approx(own.share, rel=1e-5)
    weighted = [found.select("gradient", reader="all", on=on)[0].share for on in "SL"]
    assert sum(weighted) == pytest.approx(1.0, rel=1e-5)
    together = found.select("gradient", reader="all", on="all")[0].values
    assert together.mean() == pytest.approx(1.0, rel=1e-5)
    first, second = (found.select("difference", reader=name)[0].values for name in "SL")
    np.testing.assert_allclose(first, -second, atol=1e-6)
    assert found.disagreement == pytest.approx(np.abs(first).mean() / 2, rel=1e-5)
    assert 0 <= found.disagreement <= 1
    assert [own.shape for own in found.features] == [(64, 8, 8), (128, 4, 4)]
    said = json.dumps(to_json(found))
    assert "values" not in said
    assert set(arrays(found)) >= {
        "features.S",
        "rollout.all.on-all",
        "attention.S.on-S.stage1.block1",
    }


def test_another_class_can_be_explained_and_an_unknown_one_is_refused(
    finder: Path, squares: Path
) -> None:
    image = next(squares.glob("red/*"))
    red, green = (crossvit.explain(finder, image, class_name=name) for name in CLASSES[:2])
    assert (red.explained.label, green.explained.label) == ("red", "green")
    assert red.explained.probability > green.explained.probability
    assert red.top == green.top
    difference = [one.select("gradient", reader="all", on="all")[0].values for one in (red, green)]
    assert not np.allclose(*difference)
    np.testing.assert_array_equal(
        red.select("rollout")[0].values, green.select("rollout")[0].values
    )
    with pytest.raises(UnknownNameError, match="unknown class 'gren': did you mean green"):
        Explainer(finder, class_name="gren")


@pytest.mark.parametrize("crop", [None, 0.8])
@pytest.mark.parametrize("size", [(90, 60), (33, 200), (7, 5)])
def test_maps_are_laid_on_what_the_model_saw(crop: float | None, size: tuple[int, int]) -> None:
    """`seen` is the part of the picture that `fit` kept: a ramp of columns and rows comes back as its own coordinates."""
    preprocessing = Preprocessing(image_size=(24, 36), crop=crop)
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width).round()[None, :]
    ramp[..., 1] = np.linspace(0, 255, height).round()[:, None]
    kept = preprocessing.fit(Image.fromarray(ramp)).astype(float)
    left, top, right, bottom = preprocessing.seen(size)
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    for channel, low, high, length, side in (
        (0, left, right, width, 36),
        (1, top, bottom, height, 24),
    ):
        places = (
            low + (np.arange(side) + 0.5) * (high - low) / side - 0.5
        )  # pixel centres in the picture
        expected = np.clip(places / (length - 1), 0, 1) * 255
        line = kept[12, :, 0] if channel == 0 else kept[:, 18, 1]
        np.testing.assert_allclose(line[2:-2], expected[2:-2], atol=255 / length * 0.5 + 2)


def test_a_crop_is_laid_in_the_picture_and_what_was_cut_off_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = save(CrossViT(SMALL).eval(), tmp_path / "w.safetensors", tuple("abcde"), crop=0.75)
    found = crossvit.explain(
        weights, np.random.default_rng(0).integers(0, 255, (50, 120, 3), dtype=np.uint8)
    )
    assert found.size == (120, 50)
    left, top, right, bottom = found.seen
    assert 0 < left < right < 120
    assert 0 < top < bottom < 50
    assert (right - left) / (bottom - top) == pytest.approx(36 / 24, rel=0.05)
    assert _opened(explanation_png(found)).width == 1200


@pytest.mark.parametrize(
    "changes",
    [
        {"branches": SMALL.branches[:1], "fusion": "none"},
        {"fusion": "all-attention", "fusion_depth": 2},
        {"fusion": "pairwise"},
        {"fusion_depth": 2, "as_released": True},
        {"branches": (*SMALL.branches, BranchConfig(patch=12, dim=16, heads=2, depth=0))},
        {
            "branches": tuple(
                dataclasses.replace(branch, class_token=False) for branch in SMALL.branches
            )
        },
    ],
    ids=[
        "one branch",
        "all-attention",
        "pairwise",
        "as released",
        "three branches",
        "no class tokens",
    ],
)
def test_every_kind_of_model_is_explained_and_drawn(
    changes: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = CrossViT(dataclasses.replace(SMALL, **changes)).eval()
    weights = save(model, tmp_path / "w.safetensors", ("cat $x_1$", "b", "c", "d", "ねこ"))
    found = crossvit.explain(
        weights,
        np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8),
        class_name="ねこ",
    )
    branches = len(model.config.branches)
    assert (found.disagreement is None) == (branches == 1)
    assert bool(found.select("cross")) == (
        model.config.fusion in ("all-attention", "cross-attention")
    )
    assert any(branch.from_other > 0 for branch in found.branches) == (
        model.config.fusion != "none"
    )
    assert _opened(explanation_png(found)).width >= 1200


@pytest.mark.parametrize("size", [(1, 1), (400, 3), (2, 90)])
def test_odd_pictures_are_drawn(size: tuple[int, int], tiny_run: TrainingResult) -> None:
    picture = Image.new("RGB", size, "orange")
    found = crossvit.explain(tiny_run.run, picture)
    assert _opened(explanation_png(found)).width == 1200
    trained = open_trained(tiny_run.run)
    (laid,) = crossvit.mistake_maps(trained.build(), trained.preprocessing, [picture])
    assert _opened(laid).size == (
        min(size[0], 128),
        max(1, min(size[1], 128) if size[0] < 128 else 1),
    )


def test_mistake_maps_are_small_pictures(tiny_run: TrainingResult, scans: Path) -> None:
    trained = open_trained(tiny_run.run)
    pictures = [
        Image.open(path).convert("RGB").resize((300, 200))
        for path in sorted(scans.glob("2/*.png"))[:3]
    ]
    maps = crossvit.mistake_maps(trained.build(), trained.preprocessing, pictures)
    assert [_opened(one).size for one in maps] == [(128, 85)] * 3
    assert len(set(maps)) == 3
    assert crossvit.mistake_maps(trained.build(), trained.preprocessing, []) == []
    assert pictures[0].size == (300, 200)


# ---------------------------------------------------------------- the verb


def test_explain_writes_a_picture_and_its_arrays(
    command: Command, tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    first, second = (
        sorted(scans.glob("0/*.png"))[0],
        tmp_path / sorted(scans.glob("0/*.png"))[0].name,
    )
    second.write_bytes(first.read_bytes())  # another folder, the same name
    out = tmp_path / "out é"
    status, printed, err = command(
        "explain", tiny_run.run, first, second, "--out", out, "--features"
    )
    assert (status, err) == (0, "")
    assert len(printed.splitlines()) == 2
    names = {path.name for path in out.iterdir()}
    stem = first.stem
    assert names == {
        f"{stem}{again}.{kind}"
        for again in ("", "-2")
        for kind in ("explanation.png", "explanation.npz", "features.png")
    }
    assert _opened((out / f"{stem}.explanation.png").read_bytes()).width == 1200
    assert _opened((out / f"{stem}.features.png").read_bytes()).width == 1200
    with np.load(out / f"{stem}.explanation.npz", allow_pickle=False) as written:
        assert written["rollout.S.on-L"].shape == (1, 4, 4)
        assert written["seen"].tolist() == [0, 0, 8, 8]


def test_an_unreadable_image_is_an_entry_and_the_others_go_on(
    command: Command, tiny_run: TrainingResult, own_scans: Path, tmp_path: Path
) -> None:
    good = sorted((own_scans / "0").glob("*.png"))[0]
    bad = own_scans / "0" / "0000-bad.png"
    bad.write_text("hello")
    status, out, err = command(
        "explain", tiny_run.run, bad, good, tmp_path / "gone.png", "--out", tmp_path / "o", "--json"
    )
    assert (status, err) == (1, "")
    said = json.loads(out)
    assert (said["n"], said["failed"]) == (3, 2)
    errors = [entry["error"] for entry in said["explanations"]]
    assert "not an image in a format read here" in errors[0]
    assert errors[1] is None
    assert "no such file" in errors[2]
    assert Path(said["explanations"][1]["picture"]).is_file()
    with pytest.raises(DataError, match="0000-bad.png"):
        crossvit.explain(tiny_run.run, bad)


def test_the_check_prints_its_table_and_writes_its_plot(
    command: Command, finder: Path, squares: Path, tmp_path: Path
) -> None:
    words = ["explain", finder, squares, "--check", "--sample", 8, "--steps", 4]
    status, out, err = command(*words, "--out", tmp_path / "o")
    assert (status, err) == (0, "")
    assert "8x8 cells, fill blur" in out
    assert "cross: L reads S" in out
    assert _opened((tmp_path / "o" / "faithfulness.png").read_bytes()).width == 1200
    said = json.loads(command(*words, "--json")[1])
    assert said == json.loads((tmp_path / "o" / "faithfulness.json").read_text())


def test_the_check_counts_broken_pictures_or_leaves_them_out(
    command: Command, finder: Path, squares: Path, tmp_path: Path
) -> None:
    """As `evaluate` does; what is measured without them is what is measured where they are not."""
    data = tmp_path / "squares"
    shutil.copytree(squares, data)
    broken = sorted(data.rglob("*.png"))[3:40:36]
    for path in broken:
        path.write_bytes(b"no picture")
    words = ["explain", finder, data, "--check", "--steps", 2, "--json"]
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert err.startswith(f"crossvit: 2 of 48 images cannot be decoded: {broken[0]}: not an image")
    assert err.endswith("; mend them or add --skip-bad\n")
    status, out, _ = command(*words, "--skip-bad")
    said = json.loads(out)
    assert (status, said["n"]) == (0, 46)
    for path in broken:
        path.unlink()
    without = json.loads(command(*words)[1])
    assert without["n"] == 46
    assert [said["intact"], said["emptied"]] == pytest.approx(
        [without["intact"], without["emptied"]], rel=1e-5
    )
    assert said["scores"][0]["deletion"]["mean"] == pytest.approx(
        without["scores"][0]["deletion"]["mean"], rel=1e-4
    )


BAD_CALLS = {
    "no image": (["explain", "RUN", "--out", "OUT"], 2, "no image given"),
    "image not here": (["explain", "RUN", "gone.jpg", "--out", "OUT"], 2, "no image at gone.jpg"),
    "no out": (["explain", "RUN", "IMAGE"], 2, "no --out given"),
    "unknown class": (
        ["explain", "RUN", "IMAGE", "--out", "OUT", "--class", "seven"],
        2,
        "unknown class 'seven': known: 0, 1, 2",
    ),
    "no run": (["explain", "gone", "IMAGE", "--out", "OUT"], 2, "no weights at gone"),
    "out is a file": (["explain", "RUN", "IMAGE", "--out", "IMAGE"], 1, "cannot write to"),
    "two data": (
        ["explain", "RUN", "SCANS", "SCANS", "--check"],
        2,
        "--check takes one DATA and got 2",
    ),
    "check of a class": (
        ["explain", "RUN", "SCANS", "--check", "--class", "1"],
        2,
        "leave out --class",
    ),
    "fill": (
        ["explain", "RUN", "SCANS", "--check", "--fill", "black"],
        2,
        "fill = 'black': should be one of blur, mean",
    ),
    "one image": (
        ["explain", "RUN", "SCANS", "--check", "--sample", "1"],
        2,
        "images = 1: should be 2 or more",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_wrong_call_is_one_line(
    case: str, command: Command, tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    words, expected, says = BAD_CALLS[case]
    image = next(scans.glob("0/*.png"))
    places = {"OUT": tmp_path / "out", "RUN": tiny_run.run, "SCANS": scans, "IMAGE": image}
    status, out, err = command(*(places.get(word, word) for word in words))
    assert (status, out) == (expected, "")
    assert len(err.splitlines()) == 1
    assert says in err
    assert not (tmp_path / "out").exists()


def _opened(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return picture
