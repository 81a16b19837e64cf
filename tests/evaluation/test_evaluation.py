"""`crossvit evaluate`: its figures, what it stores and refuses, weights from a hub, old runs, and what it prints."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save
from timm import create_model as timm_model

import crossvit
import crossvit.weights.hub
from crossvit.cli.evaluating import print_evaluation
from crossvit.data import preprocess
from crossvit.data.images import ImageSet
from crossvit.data.sources import open_data
from crossvit.engines.select import load_engine
from crossvit.errors import DataError, RunError, UsageError
from crossvit.evaluation.calibration import calibration
from crossvit.evaluation.evaluator import measure, summarise
from crossvit.evaluation.metrics import best_thresholds, probabilities
from crossvit.results import MULTI_LABEL, Evaluation, TrainingResult
from crossvit.run import Run
from crossvit.train.loop import fit
from crossvit.train.recipe import load_recipe
from crossvit.trained import Trained, open_trained
from support.loopback import serve_hub
from support.runs import TINY

Command = Callable[..., tuple[int, str, str]]
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_schema_1"


@pytest.fixture
def own_run(tiny_run: TrainingResult, tmp_path: Path) -> Path:
    """As `tiny_run`, for tests that change it."""
    return Path(shutil.copytree(tiny_run.run, tmp_path / "own run"))


# ---------------------------------------------------------------- figures


def test_an_evaluation_has_everything_in_it(tiny_run: TrainingResult, scans: Path) -> None:
    result = crossvit.evaluate(tiny_run.run, scans, split="all", target_risk=0.3)
    assert set(result.intervals) == {"top1", "top5", "macro_f1"}
    assert result.intervals["top1"].low <= result.top1 <= result.intervals["top1"].high
    assert np.mean(result.correct) == result.top1
    assert result.images == open_data(scans).part("all").names
    assert result.calibration is not None
    assert result.selective is not None
    assert (sum(one.n for one in result.calibration.bins), result.calibration.replaced) == (
        60,
        None,
    )
    assert (result.selective.target_risk, result.selective.points[-1].risk) == (
        0.3,
        pytest.approx(1 - result.top1),
    )
    assert result.seconds > 0
    assert (result.precision, result.robustness) == ("fp32", None)
    assert tiny_run.evaluation is not None
    assert (
        tiny_run.evaluation.intervals == crossvit.evaluate(tiny_run.run, scans).intervals
    )  # the report of training has them


def test_epochs_are_summarised_without_what_takes_long(
    tiny_run: TrainingResult, scans: Path
) -> None:
    trained = open_trained(tiny_run.run)
    images, part = trained.select(open_data(scans), None)
    output, images = measure(load_engine(trained), images, trained.preprocessing)
    cheap = summarise(output, images, patches=(4, 8), run="r", data="d", split=part)
    assert (cheap.intervals, cheap.calibration, cheap.selective) == ({}, None, None)


def test_robustness_is_measured_where_it_is_asked_for(
    tiny_run: TrainingResult, scans: Path
) -> None:
    counted: list[tuple[int, int]] = []
    result = crossvit.evaluate(
        tiny_run.run,
        scans,
        corruptions=["fog"],
        sizes=[4],
        robustness_images=6,
        progress=lambda *count: counted.append(count),
    )
    assert result.robustness is not None
    assert [score.name for score in result.robustness.corruptions] == ["fog"]
    assert [score.pixels for score in result.robustness.sizes] == [4]
    assert result.robustness.n == 6
    assert counted[-1] == (12 + 7 * 6, 12 + 7 * 6)


def test_several_classes_an_image_are_measured_at_the_runs_thresholds(
    tiny_run: TrainingResult, scans: Path
) -> None:
    """The tiny run taken as a multi-label one, on images of which every other one shows class 2 as well."""
    trained = dataclasses.replace(open_trained(tiny_run.run), task=MULTI_LABEL)
    plain, _ = trained.select(open_data(scans), "all")
    assert plain.task == MULTI_LABEL  # a folder's images have one class each
    labels = tuple(
        tuple({*label, 2}) if index % 2 else label for index, label in enumerate(plain.labels)
    )  # type: ignore[misc]
    images = dataclasses.replace(plain, labels=labels)
    output, images = measure(load_engine(trained), images, trained.preprocessing)
    sure = probabilities(output.logits, task=MULTI_LABEL, temperature=2.0)
    limits = tuple(best_thresholds(sure, images.targets()))
    result = summarise(
        output,
        images,
        patches=(4, 8),
        run="r",
        data="d",
        split="all",
        temperature=2.0,
        thresholds=limits,
        thorough=True,
    )
    assert result.multi_label is not None
    assert (result.task, result.confusion.size, result.calibration, result.selective) == (
        MULTI_LABEL,
        0,
        None,
        None,
    )
    assert [score.threshold for score in result.multi_label.classes] == list(limits)
    assert set(result.intervals) == {"top1", "top5", "macro_f1", "map"}
    said = sure >= np.array(limits)
    assert result.correct == tuple((said == images.targets()).all(axis=1).tolist())
    assert result.multi_label.exact == np.mean(result.correct)
    assert result.macro_f1 == pytest.approx(np.mean([score.f1 for score in result.classes]))
    first = result.mistakes[0]
    index = images.names.index(first.image.removeprefix(f"{scans}/"))
    assert first.label == images.said(index)
    assert first.predicted == (
        ";".join(images.classes[c] for c in np.flatnonzero(said[index])) or "none"
    )
    with pytest.raises(UsageError, match="has several classes an image and .* gives one"):
        open_trained(tiny_run.run).select(
            dataclasses.replace(open_data(scans), parts={"all": images}), "all"
        )


# ---------------------------------------------------------------- maps of mistakes


@pytest.mark.parametrize("maps", [False, True])
def test_the_model_is_built_once_and_a_shown_mistake_decoded_once_more(
    maps: bool, tiny_run: TrainingResult, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    decoded: Counter[str] = Counter()
    build, decode = Trained.build, preprocess.decode

    def counted_build(trained: Trained) -> Any:
        built.append(trained.source)
        return build(trained)

    def counted_decode(source: Any, *rest: Any, **options: Any) -> Any:
        decoded[str(source)] += 1
        return decode(source, *rest, **options)

    monkeypatch.setattr(Trained, "build", counted_build)
    monkeypatch.setattr(preprocess, "decode", counted_decode)
    result = crossvit.evaluate(tiny_run.run, scans, device="cpu", maps=maps)
    shown = {mistake.image for mistake in result.mistakes}
    assert built == [tiny_run.run]
    assert shown
    assert len(decoded) == result.n
    assert {path for path, times in decoded.items() if times == 2} == shown
    assert max(decoded.values()) == 2
    assert all(mistake.picture and bool(mistake.map) is maps for mistake in result.mistakes)


def test_an_epoch_of_training_decodes_no_mistake_for_show(
    scans: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the last evaluation, which the report shows, has pictures."""
    with_pictures: list[int] = []

    def counted(evaluation: Evaluation, *rest: Any, **options: Any) -> Evaluation:
        with_pictures.append(evaluation.n)
        return evaluation

    monkeypatch.setattr("crossvit.train.trainer.with_pictures", counted)
    read: list[int] = []
    monkeypatch.setattr(ImageSet, "read", lambda images, index: read.append(index))
    settings = TINY | {"epochs": 2}
    fit(load_recipe("small", data=str(scans), out=str(tmp_path / "run"), **settings))
    assert (with_pictures, read) == ([12], [])


# ---------------------------------------------------------------- calibrate


def test_calibrate_stores_what_evaluation_then_uses(own_run: Path, scans: Path) -> None:
    before = crossvit.evaluate(own_run, scans)
    stored = crossvit.evaluate(own_run, scans, calibrate=True)
    after = crossvit.evaluate(own_run, scans)
    assert before.calibration is not None
    assert stored.calibration is not None
    fitted = before.calibration.suggested_temperature
    assert (
        Run(own_run).record().temperature == stored.calibration.temperature == pytest.approx(fitted)
    )
    assert fitted != 1.0
    assert stored.calibration.replaced == before.calibration
    assert after.calibration == dataclasses.replace(stored.calibration, replaced=None)
    assert (after.loss, after.selective) == (stored.loss, stored.selective)
    assert after.loss < before.loss
    assert (after.top1, after.correct) == (before.top1, before.correct)
    trained = open_trained(own_run)
    images, _ = trained.select(open_data(scans), None)
    output, _ = measure(load_engine(trained), images, trained.preprocessing)
    assert calibration(output.logits, images.targets(), temperature=fitted).ece == pytest.approx(
        after.calibration.ece
    )


def test_calibrate_refuses_images_that_were_trained_on(
    own_run: Path, own_scans: Path, scans: Path, tmp_path: Path
) -> None:
    text = Run(own_run).record_path.read_text()
    with pytest.raises(
        UsageError,
        match=r"48 of the 60 images of .* were trained on, and --calibrate needs images that were not",
    ):
        crossvit.evaluate(own_run, scans, split="all", calibrate=True)
    record = Run(own_run).record()
    held_out = set(record.data.held_out)
    learnt = tmp_path / "learnt"
    for path in scans.rglob("*.png"):  # what was trained on, moved
        if path.relative_to(scans).as_posix() not in held_out:
            (learnt / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, learnt / path.parent.name)
    with pytest.raises(UsageError, match="48 of the 48 images"):
        crossvit.evaluate(own_run, learnt, calibrate=True)
    Run(own_run).amend(data=dataclasses.replace(record.data, location=str(tmp_path / "gone")))
    for path in list(own_scans.rglob("*.png")):
        path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(UsageError, match="those it was trained on are not to be found"):
        crossvit.evaluate(own_run, own_scans, calibrate=True)
    Run(own_run).record_path.write_text(text)
    assert (
        crossvit.evaluate(own_run, own_scans, calibrate=True).calibration is not None
    )  # new to it


def test_calibrate_takes_the_held_out_part_of_the_runs_own_data(
    own_run: Path, scans: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    for part in ("train", "val"):
        shutil.copytree(scans, parts / part)
    found = open_data(parts)
    run = Run(own_run)
    data = dataclasses.replace(
        run.record().data,
        location=str(parts),
        fingerprint=found.fingerprint,
        held_out={},
        held_out_part="val",
    )
    run.amend(data=data)
    assert crossvit.evaluate(own_run, parts, calibrate=True).split == "val"
    with pytest.raises(UsageError, match="may have been trained on"):
        crossvit.evaluate(own_run, parts, split="train", calibrate=True)


def test_calibrate_refuses_what_it_cannot_store(own_run: Path, scans: Path, tmp_path: Path) -> None:
    weights = shutil.copy(own_run / "model.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="is not a run, so no temperature can be stored in it"):
        crossvit.evaluate(weights, scans, calibrate=True)
    run = Run(own_run)
    record = run.record()
    run.amend(task=MULTI_LABEL)
    with pytest.raises(
        UsageError, match="gives several classes an image, and a temperature is of one"
    ):
        crossvit.evaluate(own_run, scans, calibrate=True)
    run.write_record(record)
    with run.lock(), pytest.raises(RunError, match="is being trained by another process"):
        crossvit.evaluate(own_run, scans, calibrate=True)
    assert run.record() == record


def test_nothing_is_stored_where_everything_is_right(own_run: Path, own_scans: Path) -> None:
    """The one class the tiny run always gives is the only one there."""
    only = crossvit.Predictor(own_run)(np.zeros((8, 8), dtype=np.uint8))[0].label
    alone = own_scans.parent / "alone"
    for index in range(3):
        (alone / str(only)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + index)).save(alone / str(only) / f"black {index}.png")
    with pytest.raises(
        DataError, match="all 3 images of .* are predicted correctly, so no temperature is the best"
    ):
        crossvit.evaluate(own_run, alone, calibrate=True)
    assert Run(own_run).record().temperature is None


# ---------------------------------------------------------------- weights from a hub


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, bytes]:
    """timm's own model with random weights, and its file as timm puts it on the hub."""
    torch.manual_seed(1)
    model = timm_model("crossvit_9_dagger_240", pretrained=False).eval()
    for head in model.head:
        head.weight.data *= 20  # so that logits stand apart
    return model, save(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        metadata={"format": "pt"},
    )


def test_a_hub_name_is_evaluated_on_a_folder_as_timms_own_model_is(
    released: tuple[torch.nn.Module, bytes],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Photos in folders of the WordNet ids that timm's model ranks 1st, 3rd and 9th of them, so that the answers are known."""
    from timm.data.imagenet_info import ImageNetInfo

    model, content = released
    rng = np.random.default_rng(0)
    preprocessing = open_trained_file(content, tmp_path)
    known = ImageNetInfo()
    ranks = (0, 0, 0, 2, 2, 8, 8, 8)
    losses = []
    for index, rank in enumerate(ranks):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((320, 260), Image.Resampling.BICUBIC)
        with torch.inference_mode():
            logits = model(torch.from_numpy(preprocessing(picture))[None])[0]
        label = int(logits.argsort(descending=True)[rank])
        losses.append(torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])).item())
        folder = tmp_path / "photos" / known.index_to_label_name(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{index}.png")
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "shared"))
        monkeypatch.setattr(crossvit.weights.hub, "PAUSE", 0.0)
        hub.put("timm/crossvit_9_dagger_240.in1k", "model.safetensors", content)
        status, out, err = command(
            "evaluate", "timm/crossvit_9_dagger_240.in1k", tmp_path / "photos", "--json"
        )
    assert status == 0, err
    found = json.loads(out)
    assert (found["top1"], found["top5"], found["n"]) == (3 / 8, 5 / 8, 8)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert list(found)[:4] == ["top1", "n", "run", "data"]


def open_trained_file(content: bytes, folder: Path) -> Callable[..., np.ndarray]:
    path = folder / "crossvit_9_dagger_240.safetensors"
    path.write_bytes(content)
    return open_trained(path).preprocessing


@pytest.mark.parametrize("column", ["wnid", "index"])
@pytest.mark.parametrize("form", ["csv", "folder"])
def test_a_photo_of_every_class_of_imagenet_stands_for_its_output(
    column: str,
    form: str,
    released: tuple[torch.nn.Module, bytes],
    pack: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    photos = pack("imagenet1k_one_per_class_256")
    with (photos / "labels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    if form == "csv":
        data = photos / f"{column}.csv"
        data.write_text(
            "path,label\n" + "".join(f"{line['file']},{line[column]}\n" for line in lines)
        )
    else:
        data = tmp_path / "photos"
        for line in lines:
            (data / line[column]).mkdir(parents=True)
            (data / line[column] / Path(line["file"]).name).symlink_to(photos / line["file"])
    path = tmp_path / "crossvit_9_dagger_240.safetensors"
    path.write_bytes(released[1])
    images, part = open_trained(path).select(open_data(data), None)
    index_of = {Path(line["file"]).name: int(line["index"]) for line in lines}
    assert (len(images), part, len(set(images.labels))) == (1000, "all", 1000)
    assert [index_of[Path(name).name] for name in images.names] == list(images.labels)


# ---------------------------------------------------------------- old runs, wrong calls, and what is printed


def test_a_run_of_the_first_schema_still_works(scans: Path, tmp_path: Path) -> None:
    """Written by crossvit 0.1.0 at 676b0cc (random weights), before runs had a task, a temperature or channels."""
    run = shutil.copytree(OLD_RUN, tmp_path / "old")
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    (prediction,) = crossvit.Predictor(run)(picture)
    found = {label.label: label.probability for label in prediction.top}
    assert found == {
        name: pytest.approx(p, abs=1e-5)
        for name, p in {"1": 0.4394639, "2": 0.2872231, "0": 0.2733130}.items()
    }
    result = crossvit.evaluate(run, scans, calibrate=False)
    assert (result.n, result.split, result.task) == (60, "all", "single-label")
    assert open_trained(run).temperature == 1.0


def test_figures_out_of_range_are_refused(tiny_run: TrainingResult, scans: Path) -> None:
    with pytest.raises(
        UsageError, match="target_risk = 5: should be a share of the answers, 0 to 1"
    ):
        crossvit.evaluate(tiny_run.run, scans, target_risk=5)
    with pytest.raises(UsageError, match="robustness_images = 0: should be 1 or more"):
        crossvit.evaluate(tiny_run.run, scans, robustness_images=0)


def test_the_command_prints_every_figure_and_says_what_it_stored(
    own_run: Path, scans: Path, command: Command
) -> None:
    words = [
        "--calibrate",
        "--sizes",
        8,
        4,
        "--workers",
        0,
        "--report",
        own_run / "evaluation.html",
    ]
    status, out, err = command("evaluate", own_run, scans, *words)
    assert status == 0, err
    for line in (
        "top-1  ",
        "F1     ",
        "branch S alone",
        "calibration  confidence is ",
        "abstention  ",
        "robustness   top-1",
        "4 pixels",
    ):
        assert line in out
    temperature = Run(own_run).record().temperature
    assert (
        f"stored       temperature {temperature:.4g} in {own_run}/run.json, in place of 1\n" in out
    )
    assert "evaluate" in (own_run / "evaluation.html").read_text()
    assert (
        f"at temperature {temperature:.2f}, the best for these images\n"
        in command("evaluate", own_run, scans)[1]
    )
    status, out, err = command(
        "evaluate", own_run, scans, "--report", own_run / "nowhere" / "page.html"
    )
    assert (status, out) == (2, "")
    assert "cannot be a file: name one in a folder that is there" in err


def test_json_is_one_object_with_the_first_figures_first(
    tiny_run: TrainingResult, scans: Path, command: Command
) -> None:
    status, out, _ = command(
        "evaluate", tiny_run.run, scans, "--sizes", "4", "--workers", "0", "--json"
    )
    found = json.loads(out)
    assert (status, list(found)[:4]) == (0, ["top1", "n", "run", "data"])
    assert set(found["robustness"]) == {"corruptions", "sizes", "mean", "n", "unspoilt"}
    assert set(found["intervals"]["top1"]) == {"low", "high"}
    assert "images" not in found


def test_several_classes_and_no_threshold_are_printed_too(
    tiny_run: TrainingResult, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = dataclasses.replace(open_trained(tiny_run.run), task=MULTI_LABEL)
    images, part = trained.select(open_data(scans), None)
    output, images = measure(load_engine(trained), images, trained.preprocessing)
    print_evaluation(
        summarise(output, images, patches=(4, 8), run="r", data="d", split=part, thorough=True)
    )
    out = capsys.readouterr().out
    assert "mAP    " in out
    assert "exact  " in out
    result = crossvit.evaluate(tiny_run.run, scans, target_risk=0.0)
    assert result.selective is not None
    print_evaluation(
        dataclasses.replace(result, selective=dataclasses.replace(result.selective, suggested=None))
    )
    assert "no confidence threshold gets wrong answers down to 0.0 %" in capsys.readouterr().out
