"""Before the first step: what the data is, whether every image can be read, and which model suits it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.data.augment import Augment
from crossvit.data.check import Findings, look_at
from crossvit.data.loader import CACHE_BYTES, TrainingLoader
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import HELD_OUT_PARTS, Data, ImageSet, open_data
from crossvit.errors import DataError
from crossvit.factory import model_config
from crossvit.model.config import CrossViTConfig
from crossvit.model.presets import preset
from crossvit.run import Run
from crossvit.train.recipe import Recipe
from crossvit.train.watch import Watch
from crossvit.weights.files import weight_file

ENOUGH_FOR_9_DAGGER = 20_000  # training images from which a model of the paper is chosen for pictures of its size
NAMED_AT_MOST = 5  # broken images named in a message; the rest are counted


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a run is decided by before it starts. `held_out_part` is val, test or held-out."""

    recipe: Recipe
    data: Data
    train: ImageSet
    held_out: ImageSet
    held_out_part: str
    model_name: str
    why_model: str
    config: CrossViTConfig
    preprocessing: Preprocessing

    def training_loader(self) -> TrainingLoader:
        augment = Augment(self.preprocessing, **dataclasses.asdict(self.recipe.augmentation))
        return TrainingLoader(
            self.train,
            augment,
            self.preprocessing,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            workers=self.recipe.workers,
        )

    def room_for_held_out(self) -> dict[int, NDArray[np.uint8]] | None:
        """Where the fitted held-out pictures are kept between epochs; None if they would take too much memory."""
        height, width = self.preprocessing.image_size
        return {} if len(self.held_out) * height * width * 3 <= CACHE_BYTES else None

    def data_record(self) -> dict[str, Any]:
        """For run.json: what was trained on, and by name what was held out where the data had no part for it."""
        split_here = self.held_out_part == "held-out"
        return {
            "location": self.data.location,
            "fingerprint": self.data.fingerprint,
            "train": len(self.train),
            "held_out_part": self.held_out_part,
            "held_out_n": len(self.held_out),
            "held_out": list(self.held_out.names) if split_here else [],
        }


def make_plan(recipe: Recipe, watch: Watch) -> Plan:
    """Open the data, look at every image, choose the model and say what was found.

    Raises UsageError for a wrong call and DataError, before anything is trained, for images that cannot be decoded.
    """
    if recipe.weights:
        weight_file(recipe.weights)  # a wrong path is said before the images are read
    data = open_data(recipe.data)
    train, held_out = data.split(held_out=recipe.held_out, seed=recipe.seed)
    name, why = (recipe.model, "") if recipe.model else _model_of_weights(recipe)
    if name:
        model_config(name)  # an unknown name is said before the images are read
    watch.checking(len(train) + len(held_out))
    looked = [look_at(images, progress=watch.checked) for images in (train, held_out)]
    train, held_out = (
        _without_broken(images, findings, skip=recipe.skip_bad, watch=watch)
        for images, findings in zip((train, held_out), looked, strict=True)
    )
    sides = looked[0].shorter_sides
    if name is None:
        name, why = _suitable_model(statistics.median(sides), len(train))
    config = model_config(
        name,
        num_classes=len(data.classes),
        image_size=(recipe.image_size, recipe.image_size) if recipe.image_size else None,
        drop_path=recipe.drop_path or None,
    )
    part = next((part for part in HELD_OUT_PARTS if part in data.parts), "held-out")
    plan = Plan(
        recipe, data, train, held_out, part, name, why, config,
        Preprocessing(image_size=config.image_size, crop=preset(name).crop),
    )  # fmt: skip
    for line in _found(plan, looked):
        watch.say(line)
    return plan


def _model_of_weights(recipe: Recipe) -> tuple[str | None, str]:
    """The model of the run that the weights come from, if they come from a run."""
    if recipe.weights and Run(recipe.weights).exists():
        return Run(recipe.weights).record()["model"], f", as in {recipe.weights}"
    return None, ""


def _suitable_model(side: float, images: int) -> tuple[str, str]:
    """(name, why) by the typical shorter side in pixels and the number of training images."""
    if images >= ENOUGH_FOR_9_DAGGER and side > 128:
        name = "crossvit_9_dagger_240"
    else:
        name = "crossvit_pico_32" if side <= 40 else "crossvit_nano_64" if side <= 80 else "crossvit_micro_96"
    return name, f", chosen for {images:,} images with sides around {side:.0f} (--model takes another)"


def _without_broken(images: ImageSet, findings: Findings, *, skip: bool, watch: Watch) -> ImageSet:
    if not findings.broken:
        return images
    named = [*findings.broken.values()][:NAMED_AT_MOST]
    more = len(findings.broken) - len(named)
    line = f"{len(findings.broken)} of {len(images)} images cannot be decoded: {'; '.join(named)}" + (
        f"; and {more} more" * bool(more)
    )
    if not skip:
        raise DataError(f"{line}. Mend or remove them, or add --skip-bad")
    watch.say(f"skipped  {line}")
    rest = images.without(set(findings.broken))
    emptied = [name for name, count in rest.counts().items() if count == 0 and images.counts()[name]]
    if emptied:
        raise DataError(
            f"no image of class {', '.join(emptied)} can be decoded in {images.root}: add good ones or remove the folder"
        )
    return rest


def _found(plan: Plan, looked: list[Findings]) -> list[str]:
    heights, widths = zip(*(size for findings in looked for size in findings.sizes), strict=True)
    smallest, largest = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    total = len(plan.train) + len(plan.held_out)
    where = plan.held_out_part if plan.held_out_part != "held-out" else "held out"
    lines = [
        f"data   {plan.data.location}: {len(plan.data.classes)} classes, {total:,} images "
        f"({len(plan.train):,} train, {len(plan.held_out):,} {where}), {sizes} pixels"
    ]
    if plan.data.ignored:
        lines.append(f"note   {plan.data.ignored} files without an image's name ending are ignored")
    without = [name for name, count in plan.held_out.counts().items() if count == 0]
    if without:
        lines.append(f"note   {where} has no image of {', '.join(without)}: nothing is measured for them")
    patch = max(branch.patch for branch in plan.config.branches)
    tiny = sum(min(size) < patch for findings in looked for size in findings.sizes)
    if tiny:
        lines.append(f"note   {tiny} images are smaller than a {patch}-pixel patch: they are enlarged")
    return lines
