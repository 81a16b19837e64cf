"""Evaluations as a real one is, made by hand from drawn answers: what tests of the pages show."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from crossvit.evaluation.bootstrap import compare
from crossvit.results import (
    BranchScore,
    BrokenImage,
    Calibration,
    ClassScore,
    ComparedRun,
    CorruptionScore,
    DataCheck,
    DataRecord,
    Epoch,
    Evaluation,
    ImagePair,
    Interval,
    LabelScore,
    Mistake,
    MultiLabel,
    PartCheck,
    ReliabilityBin,
    ResultRecord,
    RiskPoint,
    Robustness,
    RunRecord,
    RunsCompared,
    Selective,
    SizeScore,
)

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "motion_blur",
    "defocus_blur",
    "fog",
    "brightness",
    "contrast",
    "jpeg_compression",
)


def class_names(count: int) -> list[str]:
    """Names of every length, some of which need escaping or sort by number."""
    kinds = (
        "crab",
        "lobster",
        "<b>tag</b> & co",
        "écrevisse à pattes rouges",
        "fig 10",
        "fig 9",
        "a very long name of a class",
    )
    return [kinds[index] if index < len(kinds) else f"class {index:03d}" for index in range(count)]


def made_evaluation(
    classes: Sequence[str],
    *,
    each: int = 20,
    accuracy: float = 0.85,
    seed: int = 0,
    mistakes: int = 8,
) -> Evaluation:
    """A single-label evaluation with everything in it: about `each` images a class, of which about `accuracy` are right."""
    rng = np.random.default_rng(seed)
    count = len(classes)
    labels = np.repeat(np.arange(count), rng.integers(each // 2, each + each // 2, count))
    sure = rng.beta(5, 1.2, len(labels)).clip(1 / count, 1)
    right = rng.random(len(labels)) < accuracy * (0.4 + 0.6 * sure) / (0.4 + 0.6 * sure.mean())
    predicted = np.where(right, labels, (labels + rng.integers(1, 4, len(labels))) % count)
    right = predicted == labels
    confusion = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    top1 = float(right.mean())
    names = tuple(f"val/{classes[label]}/{index:05d}.jpg" for index, label in enumerate(labels))
    return Evaluation(
        top1=top1,
        n=len(labels),
        run="runs/hand made",
        data="/data/ocean creatures",
        split="val",
        top5=min(1.0, top1 + 0.07),
        macro_f1=top1 - 0.01,
        loss=0.6123,
        branches=(BranchScore("S", 12, top1 - 0.06), BranchScore("L", 16, top1 - 0.03)),
        classes=tuple(_class_scores(confusion, classes)),
        confusion=confusion,
        mistakes=tuple(_mistakes(classes, labels, predicted, sure, names, mistakes)),
        intervals={
            "top1": Interval(top1 - 0.02, top1 + 0.019),
            "macro_f1": Interval(top1 - 0.031, top1 + 0.01),
        },
        calibration=_calibration(sure, right),
        selective=_selective(sure, right),
        robustness=Robustness(
            corruptions=tuple(
                CorruptionScore(
                    name,
                    tuple(top1 * (0.98 - 0.03 * index) ** severity for severity in range(1, 6)),
                )
                for index, name in enumerate(CORRUPTIONS)
            ),
            sizes=tuple(SizeScore(side, top1 * (1 - 4 / side)) for side in (16, 32, 64, 128)),
            mean=0.61,
            n=len(labels),
            unspoilt=top1,
        ),
        seconds=12.3,
        precision="bf16",
        images=names,
        correct=tuple(right.tolist()),
    )


def made_multi_label(classes: Sequence[str]) -> Evaluation:
    """A multi-label evaluation: no confusion, calibration or risk."""
    scores = tuple(
        LabelScore(name, 40 + i, 0.9 - 0.07 * i, 0.35 + 0.05 * i, 0.8, 0.7, 0.75)
        for i, name in enumerate(classes)
    )
    return Evaluation(
        top1=0.91,
        n=500,
        run="runs/several",
        data="photos.csv",
        split="held-out",
        top5=1.0,
        macro_f1=0.75,
        loss=0.2,
        branches=(BranchScore("S", 12, 0.88), BranchScore("L", 16, 0.9)),
        classes=tuple(
            ClassScore(score.label, score.n, score.precision, score.recall, score.f1)
            for score in scores
        ),
        confusion=np.zeros((0, 0), dtype=np.int64),
        task="multi-label",
        intervals={"map": Interval(0.66, 0.74)},
        multi_label=MultiLabel(map=0.7, exact=0.52, micro_f1=0.78, classes=scores),
    )


def made_epochs(count: int, *, reaches: float = 0.85) -> tuple[Epoch, ...]:
    shares = [reaches * (1 - 0.75 ** (number + 1)) for number in range(count)]
    return tuple(
        Epoch(
            number,
            10 * number,
            2.5 - 2 * share,
            share * 0.9,
            share,
            2.3 - 2 * share,
            1e-3,
            2.0,
            800.0,
        )
        for number, share in enumerate(shares, start=1)
    )


def made_record(classes: Sequence[str], **changes: Any) -> RunRecord:
    """run.json as training writes it; `changes` are of its fields."""
    branch = {
        "patch": 12,
        "dim": 96,
        "heads": 3,
        "depth": 1,
        "mlp_ratio": 3.0,
        "tokeniser": "linear",
    }
    record = RunRecord(
        crossvit="0.1.0",
        model="crossvit_nano_64",
        result=ResultRecord(top1=0.85, n=400, loss=0.6123, seconds=131.0),
        classes=tuple(classes),
        preprocessing={"image_size": [64, 64]},
        precision="bf16",
        device="cpu",
        threads=2,
        versions={"python": "3.11.7", "torch": "2.14.1"},
        recipe={
            "data": "/data/ocean creatures",
            "epochs": 10,
            "label_smoothing": 0.1,
            "optimiser": {"lr": 0.001},
        },
        config={"branches": [branch, branch | {"patch": 16, "dim": 192}]},
        data=DataRecord(
            location="/data/ocean creatures",
            fingerprint="0" * 64,
            train=1662,
            held_out_part="val",
            held_out_n=400,
            held_out={},
            notes=("left out 3 files of kinds that are not read: 3 .heic",),
            warnings=(
                "2 images are on both sides of the split, such as train/crab/1.png and val/crab/7.png",
            ),
        ),
    )
    return dataclasses.replace(record, **changes)


def _class_scores(confusion: np.ndarray, classes: Sequence[str]) -> list[ClassScore]:
    right, true, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    rows = zip(
        classes,
        true,
        right / np.maximum(said, 1),
        right / true,
        2 * right / (true + said),
        strict=True,
    )
    return [ClassScore(name, int(n), float(p), float(r), float(f)) for name, n, p, r, f in rows]


def _calibration(sure: np.ndarray, right: np.ndarray) -> Calibration:
    edges = np.linspace(0, 1, 16)
    place = np.minimum((sure * 15).astype(int), 14)
    bins = []
    for index in range(15):
        own = place == index
        figures = (float(sure[own].mean()), float(right[own].mean())) if own.any() else (0.0, 0.0)
        bins.append(
            ReliabilityBin(float(edges[index]), float(edges[index + 1]), int(own.sum()), *figures)
        )
    error = sum(own.n * abs(own.accuracy - own.confidence) for own in bins) / len(sure)
    return Calibration(
        ece=error,
        temperature=1.0,
        bins=tuple(bins),
        suggested_temperature=1.31,
        suggested_ece=error / 3,
    )


def _selective(sure: np.ndarray, right: np.ndarray) -> Selective:
    order = np.argsort(-sure)
    risk = np.cumsum(~right[order]) / np.arange(1, len(sure) + 1)
    kept = np.linspace(0, len(sure) - 1, min(100, len(sure))).astype(int)
    points = tuple(
        RiskPoint(float(sure[order[i]]), float((i + 1) / len(sure)), float(risk[i])) for i in kept
    )
    return Selective(
        points=points,
        area=float(risk.mean()),
        target_risk=float(risk[-1] / 2),
        suggested=points[len(points) // 2],
    )


def _mistakes(
    classes: Sequence[str],
    labels: np.ndarray,
    predicted: np.ndarray,
    sure: np.ndarray,
    names: Sequence[str],
    count: int,
) -> list[Mistake]:
    wrong = np.flatnonzero(labels != predicted)
    surest = wrong[np.argsort(-sure[wrong])][:count]
    return [
        Mistake(
            names[i],
            classes[labels[i]],
            classes[predicted[i]],
            float(sure[i]),
            _png(int(i), 0),
            _png(int(i), 1),
        )
        for i in surest
    ]


def _png(seed: int, channel: int) -> bytes:
    """A picture of a few soft blobs."""
    coarse = np.random.default_rng(seed).integers(40, 230, (5, 7, 3)).astype(np.uint8)
    coarse[..., channel] = 200
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((112, 80), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def made_comparison(
    *, accuracies: Sequence[float], seeds: Sequence[int] | None = None, classes: int = 10
) -> RunsCompared:
    """Runs side by side, a name for each accuracy."""
    names = ("first", "second", "runs/a third with a long name", "fourth")
    labels = class_names(classes)
    runs = tuple(
        ComparedRun(
            name=name,
            run=f"runs/{name}",
            model="crossvit_nano_64",
            parameters=1_150_000 + 10_000 * index,
            macs=26_000_000,
            seconds=131.0 * (index + 1),
            evaluation=made_evaluation(
                labels, accuracy=accuracy, seed=(seeds or range(len(accuracies)))[index]
            ),
            record=made_record(labels),
            epochs=made_epochs(12, reaches=accuracy),
        )
        for index, (name, accuracy) in enumerate(zip(names, accuracies, strict=False))
    )
    n = min(run.evaluation.n for run in runs)
    cut = [
        dataclasses.replace(
            run.evaluation, images=tuple(map(str, range(n))), correct=run.evaluation.correct[:n]
        )
        for run in runs
    ]
    return RunsCompared(
        data="/data/ocean creatures",
        split="val",
        n=n,
        runs=runs,
        tests=tuple(compare(cut[0], other) for other in cut[1:]),
        differing={
            "optimiser.lr": tuple(0.001 * (index + 1) for index in range(len(runs))),
            "augmentation.flip": (0.5, None, 0.0)[: len(runs)],
        },
    )


def made_data_check(classes: Sequence[str]) -> DataCheck:
    """Data with two parts, a broken file, and a pair of either kind."""
    counts = {name: 20 + 7 * index for index, name in enumerate(classes)}
    halves = {name: count // 2 for name, count in counts.items()}
    parts = (
        PartCheck("train", sum(counts.values()), counts, (40, 50), (120, 160), (300, 400)),
        PartCheck("val", sum(halves.values()), halves, (64, 64), (64, 64), (64, 64)),
    )
    images, sides = (
        ("train/a folder with a long name/picture number 1.jpg", "val/crab/2.jpg"),
        ("train", "val"),
    )
    return DataCheck(
        data="/data/ocean creatures",
        n=sum(part.n for part in parts),
        parts=parts,
        imbalance=4.2,
        modes={"RGB": 900, "L": 3},
        broken=(
            BrokenImage(
                "train", "train/crab/9.jpg", "train/crab/9.jpg: not an image in a format read here"
            ),
        ),
        identical_count=1,
        near_count=1,
        leak_count=2,
        conflict_count=1,
        near_bits=4,
        identical=(ImagePair(images, sides, ("crab", "lobster"), 0, _jpeg(1), _jpeg(1)),),
        near=(ImagePair(images, sides, ("crab", "crab"), 3, _jpeg(2), _jpeg(3)),),
        notes=("skipped 3 .heic: files of a kind that is not read here",),
    )


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(_png(seed, 2))).convert("RGB").save(buffer, format="JPEG")
    return buffer.getvalue()
