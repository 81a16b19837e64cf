"""Does the loader keep a model fed? Images a second of ours against torchvision's ImageFolder with the same augmentation.

From a folder and from the tar shards made of it, decoding everything (as the first epoch does, or data too large to keep) and
with pictures kept in memory (as later epochs of data that fits); then the share of a training step that is spent waiting for
the next batch. DATA is a folder with train/ and val/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from packs import unpacked
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import crossvit
from crossvit.data import loader as loading
from crossvit.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from crossvit.data.shard_writing import write_shards
from crossvit.data.sources import open_data
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.loop import prepare
from crossvit.train.setup import PreparedRun
from crossvit.train.trainer import Training

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def made(data: str, options: argparse.Namespace, folder: Path) -> Training:
    run = Run(folder / "run")
    recipe = crossvit.load_recipe(
        "small", data=data, out=str(run.path), model=options.model, batch_size=options.batch_size, min_crop=0.5, flip=0.5,
        workers=options.workers,
    )  # fmt: skip
    return prepare(recipe, run, Callback())


def torchvisions(data: Path, plan: PreparedRun, workers: int) -> Batches:
    """ImageFolder with the transforms of `made`'s recipe, in torchvision's own words."""
    recipe = plan.recipe.augmentation
    crop = v2.RandomResizedCrop(
        plan.config.image_size,
        scale=(recipe.min_crop, 1.0),
        interpolation=v2.InterpolationMode.BICUBIC,
    )
    affine = v2.RandomAffine(
        recipe.rotate, (recipe.shift, recipe.shift), (1 - recipe.zoom, 1 + recipe.zoom),
        interpolation=v2.InterpolationMode.BILINEAR, fill=128,
    )  # fmt: skip
    steps = [
        crop, v2.RandomHorizontalFlip(recipe.flip), affine, v2.ColorJitter(recipe.colour, recipe.colour, recipe.colour),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]  # fmt: skip
    images = ImageFolder(str(data / "train"), v2.Compose(steps))
    loader = DataLoader(
        images, plan.recipe.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    return lambda _: iter(loader)


def rate(batches: Batches, count: int, *, epoch: int) -> float:
    """Images a second over the first `count` batches of a pass, after two to warm up."""
    seen = 0
    started = 0.0
    for number, (images, _) in enumerate(batches(epoch)):
        if number == 2:
            started, seen = time.perf_counter(), 0
        seen += len(images)
        if number == count:
            break
    return seen / (time.perf_counter() - started)


def waiting(training: Training, count: int) -> float:
    """The share of `count` training steps that is spent waiting for the next batch."""
    training.model.train()
    batches = training.loader.epoch(1)
    next(batches)
    waited, started = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - asked
        training.train_step(images, labels)
    return waited / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="caltech101_subset_160")
    parser.add_argument("--model", default="crossvit_micro_96")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with unpacked(options.data) as data, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(open_data(data), folder / "shards")
        sources = {
            "folder": made(str(data), options, folder / "a"),
            "shards": made(str(folder / "shards"), options, folder / "b"),
        }
        plan = sources["folder"].prepared
        rates: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            rates.setdefault("torchvision ImageFolder", []).append(
                rate(torchvisions(data, plan, options.workers), options.batches, epoch=0)
            )
            for name, training in sources.items():
                keep = training.loader.loader.dataset
                assert isinstance(keep, loading.TrainingSet)
                keep.cache_bytes, before = 0, keep.cache_bytes
                rates.setdefault(f"ours, {name}", []).append(
                    rate(training.loader.epoch, options.batches, epoch=0)
                )
                keep.cache_bytes = before
        for name, training in sources.items():
            for _ in training.loader.epoch(0):
                pass  # decodes everything once
            rates[f"ours, {name}, kept in memory"] = [
                rate(training.loader.epoch, options.batches, epoch=1) for _ in range(options.rounds)
            ]
        theirs = statistics.median(rates["torchvision ImageFolder"])
        print(
            f"{Path(options.data).name}, {plan.config.image_size} pixels, batch {options.batch_size}, {options.workers} workers"
        )
        for name, found in rates.items():
            middle = statistics.median(found)
            print(
                f"  {name:32} {middle:7.0f} img/s ({min(found):.0f} to {max(found):.0f})  {middle / theirs:.2f}x"
            )
        for name, training in sources.items():
            print(
                f"  waiting, {name}: {100 * waiting(training, options.batches):.1f} % of a step of {options.model}"
            )


if __name__ == "__main__":
    main()
