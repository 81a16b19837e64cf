"""Several labels an image, or none: read from every source, split, trained with, measured and recorded."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

import crossvit
from crossvit.data.check import check
from crossvit.data.images import Arrays, ImageSet, grouped_split, stratified_split
from crossvit.data.loader import TrainingLoader
from crossvit.data.shard_writing import write_shards
from crossvit.data.shards import MANIFEST
from crossvit.data.sources import open_data
from crossvit.errors import UsageError
from crossvit.results import MULTI_LABEL, TrainingResult
from crossvit.run import Run
from crossvit.train.loop import fit
from crossvit.train.losses import Criterion, Mixing, positive_weights, smoothed
from crossvit.train.recipe import DistillationRecipe, MixingRecipe
from crossvit.trained import open_trained
from support.runs import Heard, recipe, same_bits, weights_of
from support.tables import write_csv

Command = Callable[..., tuple[int, str, str]]
SHOWN = {"0": ("even", "round"), "1": (), "2": ("even",)}  # of a digit


def rows_of(folder: Path) -> list[dict[str, str]]:
    images = open_data(folder).part("all")
    return [
        {"path": name, "labels": "; ".join(SHOWN[images.said(index)])}
        for index, name in enumerate(images.names)
    ]


@pytest.fixture
def table(own_scans: Path) -> Path:
    return write_csv(own_scans / "list.csv", rows_of(own_scans))


@pytest.fixture(scope="module")
def taught(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A run over 60 scans that has learnt something."""
    place = tmp_path_factory.mktemp("several")
    rows = [row | {"path": str(scans / row["path"])} for row in rows_of(scans)]
    return fit(recipe(write_csv(place / "list.csv", rows), place / "run", epochs=12))


# ---------------------------------------------------------------- sources


def test_a_csv_with_a_column_of_labels(table: Path) -> None:
    data = open_data(table)
    images = data.part("all")
    assert (data.classes, data.task, images.task) == (("even", "round"), MULTI_LABEL, MULTI_LABEL)
    assert (images.labels[0], images.labels[8], images.labels[16]) == ((0, 1), (), (0,))
    assert images.targets()[[0, 8, 16]].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert images.targets().dtype == np.uint8
    assert images.counts() == {"even": 16, "round": 8}
    assert [images.said(index) for index in (0, 8, 16)] == ["even;round", "", "even"]
    assert images.take([8]).targets().shape == (1, 2)
    other = images.under(("round", "x", "even"), [2, 0])
    assert (other.labels[0], other.counts()) == ((0, 2), {"round": 8, "x": 0, "even": 16})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,labels\nx.png,0,0\n", "has both columns 'label' and 'labels': keep one"),
        (
            "path,labels\nx.png,\n",
            "has no label in any line to learn from: fill in the column labels",
        ),
        (
            "path,labels,split\nx.png,cat,train\nx.png,cat;dgo,val\n",
            "line 3: unknown label 'dgo': .* no line to learn from has it",
        ),
        ("path,labels\n,cat\n", "line 2: no path"),
    ],
)
def test_a_csv_that_is_wrong_says_where(
    text: str, message: str, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "x.png").write_bytes(next((scans / "0").iterdir()).read_bytes())
    with pytest.raises(UsageError, match=message):
        open_data(tmp_path / "list.csv")


def test_shards_come_back_to_the_bit(table: Path, tmp_path: Path) -> None:
    write_shards(open_data(table), tmp_path / "shards")
    before, after = open_data(table), open_data(tmp_path / "shards")
    assert after.fingerprint == before.fingerprint
    one, other = before.part("all"), after.part("all")
    assert (other.names, other.labels, other.task, other.classes) == (
        one.names,
        one.labels,
        one.task,
        one.classes,
    )
    assert all(
        other.source(index) == Path(one.path(index)).read_bytes() for index in range(len(one))
    )
    with tarfile.open(tmp_path / "shards" / "all-00000.tar") as tar:
        beside = json.loads(tar.extractfile("000000000.json").read())  # type: ignore[union-attr]
    assert beside == {"labels": [0, 1]}
    manifest = json.loads((tmp_path / "shards" / MANIFEST).read_text())
    manifest["parts"]["all"]["labels"][0] = [0, 2]
    (tmp_path / "shards" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="label 2 of 2 classes: labels are from 0 to 1"):
        open_data(tmp_path / "shards")


@pytest.mark.parametrize("named", [True, False])
def test_a_dataset_with_a_list_of_labels(named: bool, table: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    images = open_data(table).part("all")
    label = datasets.ClassLabel(names=["even", "round"]) if named else datasets.Value("string")
    shown = [list(own) if named else [images.classes[one] for one in own] for own in images.labels]  # type: ignore[union-attr]
    content = [
        {"bytes": Path(images.path(index)).read_bytes(), "path": None}
        for index in range(len(images))
    ]
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(label)})

    def saved(name: str, labels: list[object]) -> Path:
        rows = datasets.Dataset.from_dict({"image": content, "labels": labels}, features=features)
        rows.to_parquet(str(tmp_path / f"{name}.parquet")) if named else rows.save_to_disk(
            str(tmp_path / name)
        )
        return tmp_path / (f"{name}.parquet" if named else name)

    found = open_data(saved("rows", shown)).part("all")
    assert (found.classes, found.labels, found.task) == (images.classes, images.labels, MULTI_LABEL)
    with pytest.raises(
        UsageError, match="row 0: labels is None: give a list, an empty one where no class is shown"
    ):
        open_data(saved("none", [None, *shown[1:]]))
    if named:
        with pytest.raises(UsageError, match="row 1: labels is -1 and should be from 0 to 1"):
            open_data(saved("wrong", [shown[0], [-1], *shown[2:]]))


def test_the_check_counts_every_label_and_finds_conflicts(table: Path) -> None:
    rows = rows_of(table.parent)
    (table.parent / "again.png").write_bytes((table.parent / rows[0]["path"]).read_bytes())
    found = check(open_data(write_csv(table, [*rows, {"path": "again.png", "labels": ""}])))
    assert found.parts[0].classes == {"even": 16, "round": 8}
    assert (found.imbalance, found.identical_count, found.conflict_count) == (2.0, 1, 1)
    assert set(found.identical[0].labels) == {"even;round", "no label"}


# ---------------------------------------------------------------- splits


def label_sets(count: int, shares: tuple[float, ...], *, seed: int, groups: int = 0) -> ImageSet:
    """Images with every class of `shares` by chance, and the last one together with the first."""
    rng = np.random.default_rng(seed)
    shown: NDArray[np.bool_] = rng.random((count, len(shares))) < shares
    shown[:, 0] |= shown[:, -1]
    labels = tuple(tuple(np.flatnonzero(row).tolist()) for row in shown)
    names = tuple(map(str, range(count)))
    grouped = tuple(f"g{number}" for number in rng.integers(0, groups, count)) if groups else ()
    store = Arrays("made-up", np.zeros((1, 2, 2), dtype=np.uint8))
    return ImageSet(
        store, tuple("abcdefgh"[: len(shares)]), names, labels, (1,) * count, grouped, MULTI_LABEL
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share_on_both_sides(seed: int) -> None:
    images = label_sets(400, (0.5, 0.3, 0.1, 0.03, 0.02), seed=seed)
    train, held_out = stratified_split(images, held_out=0.2, seed=seed)
    assert sorted((*train.names, *held_out.names), key=int) == list(images.names)
    assert abs(len(held_out) - 80) <= 8
    for name, count in images.counts().items():
        assert abs(held_out.counts()[name] - 0.2 * count) <= max(1, 0.1 * count)
        assert min(train.counts()[name], held_out.counts()[name]) >= 1
    assert stratified_split(images, held_out=0.2, seed=seed)[1].names == held_out.names
    assert stratified_split(images, held_out=0.2, seed=seed + 9)[1].names != held_out.names


def test_groups_of_images_with_several_labels_stay_whole() -> None:
    images = label_sets(300, (0.5, 0.2, 0.1), seed=1, groups=40)
    train, held_out = grouped_split(images, held_out=0.25, seed=0)
    assert not set(train.groups) & set(held_out.groups)
    assert len(train) + len(held_out) == 300
    assert 0.15 < len(held_out) / 300 < 0.35
    assert min(*train.counts().values(), *held_out.counts().values()) >= 1


def test_a_class_that_all_comes_together_is_said() -> None:
    images = label_sets(30, (0.5, 0.5), seed=0, groups=6)
    together = tuple(
        ("g0" if 1 in label else group)
        for label, group in zip(images.labels, images.groups, strict=True)
    )  # type: ignore[operator]
    stuck = ImageSet(
        images.store,
        images.classes,
        images.names,
        images.labels,
        images.file_sizes,
        together,
        MULTI_LABEL,
    )
    with pytest.raises(UsageError, match="no split of its 6 groups has every class on both sides"):
        grouped_split(stuck, held_out=0.25, seed=0)


# ---------------------------------------------------------------- losses


LOGITS, TARGETS = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[1.0, 0.0]])


def softplus(value: float) -> float:
    return float(np.logaddexp(0, value))


def test_the_loss_is_binary_cross_entropy_of_the_branches_mean() -> None:
    branches = torch.cat((LOGITS + 1, LOGITS - 1))
    plain = Criterion(label_smoothing=0.3, task=MULTI_LABEL)(
        branches, TARGETS, TARGETS
    )  # smoothed by Mixing, not here
    assert plain.item() == pytest.approx((softplus(-2) + softplus(-1)) / 2)
    weighted = Criterion(label_smoothing=0.0, weights=torch.tensor([3.0, 5.0]), task=MULTI_LABEL)(
        LOGITS, TARGETS, TARGETS
    )
    assert weighted.item() == pytest.approx(
        (3 * softplus(-2) + softplus(-1)) / 2
    )  # having a class is what is weighed
    assert positive_weights([1, 4, 0], 5).tolist() == [4.0, 0.25, 1.0]


def test_a_teacher_answers_for_each_class() -> None:
    def taught(answers: torch.Tensor, distil: str) -> float:
        teaching = DistillationRecipe(
            teacher="x", distil=distil, distil_weight=1.0, temperature=2.0
        )
        criterion = Criterion(
            label_smoothing=0.0, teacher=lambda images: answers, recipe=teaching, task=MULTI_LABEL
        )
        return criterion(LOGITS, TARGETS, TARGETS).item()

    answers = torch.tensor([[0.0, 4.0]])
    chances = (0.5, 1 / (1 + np.exp(-2)))
    pupils = (1 / (1 + np.exp(-1)), 1 / (1 + np.exp(0.5)))
    apart = [
        p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        for p, q in zip(chances, pupils, strict=True)
    ]
    assert taught(answers, "soft") == pytest.approx(4 * np.mean(apart), rel=1e-5)
    assert taught(LOGITS[0], "soft") == pytest.approx(0.0, abs=1e-6)
    assert taught(answers, "hard") == pytest.approx((softplus(2) + softplus(1)) / 2)


def test_mixing_mixes_the_labels_of_both_images() -> None:
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    images = targets[:, :, None, None].expand(4, 3, 2, 2)
    mixing = Mixing(
        MixingRecipe(mixup=1.0), classes=3, label_smoothing=0.0, seed=0, task=MULTI_LABEL
    )
    mixed, wanted = mixing(images, targets, step=3)
    torch.testing.assert_close(mixed[:, :, 0, 0], wanted)  # the images hold their own labels
    assert not torch.equal(wanted, targets)
    off = Mixing(MixingRecipe(), classes=3, label_smoothing=0.2, seed=0, task=MULTI_LABEL)
    torch.testing.assert_close(off(images, targets, step=0)[1], targets * 0.8 + 0.1)
    torch.testing.assert_close(smoothed(targets, 0.0), targets)


# ---------------------------------------------------------------- runs


def test_the_loader_gives_a_row_for_each_image(table: Path, tmp_path: Path) -> None:
    from crossvit.data.augment import Augment
    from crossvit.data.preprocess import Preprocessing

    images, preprocessing = open_data(table).part("all"), Preprocessing(image_size=(16, 16))
    augment = Augment(
        preprocessing, min_crop=1.0, flip=0.0, rotate=0.0, shift=0.0, zoom=0.0, colour=0.0
    )
    loader = TrainingLoader(images, augment, preprocessing, batch_size=5, seed=0)
    _, targets = next(iter(loader.epoch(0)))
    order = [key.image for key in loader.batches.order.epoch(0)[:5]]
    assert targets.dtype == torch.float32
    assert targets.tolist() == images.targets()[order].tolist()


def test_a_run_learns_and_records_what_it_is(taught: TrainingResult) -> None:
    evaluation = taught.evaluation
    assert evaluation is not None
    assert evaluation.multi_label is not None
    assert (
        evaluation.multi_label.map > 0.8
    )  # 0.5 by chance: the shares of the classes are 2/3 and 1/3
    assert taught.record.result.map == evaluation.multi_label.map == taught.epochs[-1].val_map
    assert taught.epochs[-1].loss < taught.epochs[0].loss
    trained = open_trained(taught.run)
    assert (trained.task, trained.classes, len(trained.thresholds)) == (
        MULTI_LABEL,
        ("even", "round"),
        2,
    )
    assert all(0 < threshold < 1 for threshold in trained.thresholds)
    assert [entry["val_map"] for entry in Run(taught.run).entries()] == [
        entry.val_map for entry in taught.epochs
    ]


def test_its_score_is_scikit_learns_on_the_same_images(taught: TrainingResult) -> None:
    table = taught.record.data.location
    held = open_data(table).part("all")
    held = held.take(
        [index for index, name in enumerate(held.names) if name in taught.record.data.held_out]
    )
    model = crossvit.create_model(open_trained(taught.run).config, weights=taught.run).eval()
    preprocessing = open_trained(taught.run).preprocessing
    pixels = np.stack([preprocessing(held.source(index)) for index in range(len(held))])
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels)).numpy()
    assert taught.evaluation is not None
    assert taught.evaluation.multi_label is not None
    assert taught.evaluation.multi_label.map == pytest.approx(
        average_precision_score(held.targets(), logits), abs=1e-6
    )


def test_best_and_patience_go_by_map(table: Path, tmp_path: Path) -> None:
    callback = Heard()
    result = fit(
        recipe(table, tmp_path / "run", epochs=6, lr=0.05, warmup="0", select="best"),
        callback=callback,
    )
    scores = [(entry.val_map or 0.0, -entry.val_loss) for entry in callback.epochs]
    best = max(range(len(scores)), key=lambda index: scores[index])
    assert result.record.result.selected_epoch == best + 1
    assert result.record.result.map == callback.epochs[best].val_map
    assert any("several labels an image (8 images have none)" in line for line in callback.lines)


def test_shards_train_to_the_same_bits_with_mixing_weights_and_parts(
    table: Path, tmp_path: Path
) -> None:
    write_shards(open_data(table), tmp_path / "shards")
    settings = {"mixup": 0.5, "class_weights": "balanced", "accumulate": 2}
    one, other = (
        fit(recipe(data, tmp_path / f"run-{data.name}", **settings))
        for data in (table, tmp_path / "shards")
    )
    assert same_bits(weights_of(one.run), weights_of(other.run))
    assert one.epochs[0].loss == other.epochs[0].loss


def test_what_needs_one_label_an_image_is_refused(
    table: Path, taught: TrainingResult, tiny_run: TrainingResult, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError,
        match="several labels an image: --class-weights balanced in place of --sampling balanced",
    ):
        fit(recipe(table, tmp_path / "run", sampling="balanced"))
    rows = [
        row | {"labels": {"": "1", "even": "2"}.get(row["labels"], "0")}
        for row in rows_of(table.parent)
    ]
    same_classes = write_csv(table.parent / "other.csv", rows)
    with pytest.raises(UsageError, match="the teacher .* is single-label and .* multi-label"):
        fit(recipe(same_classes, tmp_path / "run", teacher=tiny_run.run))


def test_the_command_evaluates_it(taught: TrainingResult, command: Command) -> None:
    status, out, err = command("evaluate", taught.run, taught.record.data.location, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["task"], found["split"]) == (MULTI_LABEL, "held-out")
    assert found["multi_label"]["map"] == pytest.approx(taught.record.result.map)


def test_the_command_trains_on_a_list_and_writes_its_page(
    table: Path, tmp_path: Path, command: Command
) -> None:
    words = ["--model", "crossvit_pico_32", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    status, out, err = command("train", table, "--out", tmp_path / "run", *words)
    assert status == 0, err
    assert "mAP" in err
    assert "mAP" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mean average precision" in page
    status, out, err = command("predict", tmp_path / "run", table.parent / "0", "--json")
    assert status == 0, err
