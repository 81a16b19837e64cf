"""Before the first step: what the data is, whether every image can be read, and which model suits it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.data.augment import Augment
from crossvit.data.check import Findings, look_at, warnings_of
from crossvit.data.images import HELD_OUT_PARTS, NAMED_AT_MOST, Data, ImageSet
from crossvit.data.loader import CACHE_BYTES, Bounds, Order, TrainingLoader, whole
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.factory import model_config
from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.presets import preset
from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS
from crossvit.results import MULTI_LABEL, SINGLE_LABEL, DataRecord, RunRecord
from crossvit.train.callbacks import Callback
from crossvit.train.distributed import SINGLE_PROCESS, Team
from crossvit.train.durations import STEP_UNITS, parse_duration
from crossvit.train.recipe import AugmentationRecipe, DistillationRecipe, MixingRecipe, Recipe
from crossvit.weights.files import read_weights, weight_file
from crossvit.weights.identify import identify

ENOUGH_FOR_9_DAGGER = (
    20_000  # training images from which a model of the paper is chosen for its size; see dev/LOG.md
)
IMAGES_SEEN = 60_000  # by a run whose epochs are chosen; see dev/LOG.md
SEEN_AT_LEAST = 12_000  # images, by such a run; see dev/LOG.md
PART_IMAGES = (
    16  # the fastest of 8 and 16 for crossvit_9_240 and crossvit_small_240 in bf16; see dev/LOG.md
)
MANY_TOKENS = 196  # of a branch, from which a model is large in that sense
FEW = 400  # images, for which the batch is smaller; see dev/LOG.md
MEASURED_AT_MOST = (
    2_000  # images, whose mean and deviation are taken for all where channels are not RGB
)
CONSTANT = 1e-4  # standard deviation of values in 0..1, up to which a channel is taken not to change: 7 steps of 16 bits
UNEVEN = 10  # times as many images of one class as of another, from which it is said


@dataclasses.dataclass(frozen=True)
class PreparedRun:
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
    warnings: tuple[str, ...] = ()

    def training_loader(self, *, bounds: Bounds = whole) -> TrainingLoader:
        """`bounds`: the share of each batch that is loaded here."""
        recipe = self.recipe
        return TrainingLoader(
            self.train,
            self.augment(),
            self.preprocessing,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            repeats=recipe.augmentation.repeats,
            balanced=recipe.sampling == "balanced",
            workers=recipe.workers,
            bounds=bounds,
        )

    def augment(self) -> Augment:
        settings = dataclasses.asdict(self.recipe.augmentation)
        del settings["repeats"]  # which image comes when, the loader's business
        return Augment(self.preprocessing, **settings)

    def room_for_held_out(self) -> dict[int, NDArray[Any]] | None:
        """Where the fitted held-out pictures are kept between epochs; None if they would take too much memory."""
        height, width = self.preprocessing.image_size
        bytes_a_pixel = 4 * self.preprocessing.channels or 3  # float32, or 8-bit RGB
        return {} if len(self.held_out) * height * width * bytes_a_pixel <= CACHE_BYTES else None

    def data_record(self) -> DataRecord:
        """For run.json: what was trained on, and by name and size what was held out where the data had no part for it."""
        images = self.held_out
        split_here = self.held_out_part == "held-out"
        return DataRecord(
            location=self.data.location,
            fingerprint=self.data.fingerprint,
            train=len(self.train),
            held_out_part=self.held_out_part,
            held_out_n=len(images),
            held_out=dict(zip(images.names, images.file_sizes, strict=True)) if split_here else {},
            notes=tuple(self.data.notes),
            warnings=tuple(self.warnings),
        )


def prepare_run(
    recipe: Recipe,
    callback: Callback,
    *,
    recorded: RunRecord | None = None,
    team: Team = SINGLE_PROCESS,
) -> PreparedRun:
    """Open the data, look at every image, choose the model and say what was found.

    recorded: run.json of the run that is gone on with; its model stays.  team: each process looks at its share.
    Raises UsageError for a wrong call and DataError, before anything is trained, for images that cannot be decoded.
    """
    require_known_parts(recipe)
    data = open_data(recipe.data)
    data.split(
        held_out=recipe.held_out, seed=recipe.seed
    )  # a folder that cannot be split is said before, too
    if recipe.sampling == "balanced" and data.task == MULTI_LABEL:
        raise UsageError(
            f"{recipe.data} has several labels an image: --class-weights balanced in place of --sampling balanced"
        )
    chosen = _chosen_model(recipe, recorded)
    callback.on_check_start(sum(len(team.shard(images.names)) for images in data.parts.values()))
    reader = Preprocessing(
        image_size=(1, 1), channels=recipe.channels
    )  # before the model, and with it the size, is known
    looked = {part: _look(images, reader, callback, team) for part, images in data.parts.items()}
    data = _without_broken(data, looked, skip=recipe.skip_bad)
    train, held_out = data.split(held_out=recipe.held_out, seed=recipe.seed)
    sizes = [size for findings in looked.values() for size in findings.sizes]
    name, base, why = chosen or _suitable_model(
        statistics.median(min(size) for size in sizes), len(train)
    )
    part = next((part for part in HELD_OUT_PARTS if part in data.parts), "held-out")
    if recipe.batch_size == 0:
        recipe = dataclasses.replace(recipe, batch_size=suitable_batch(len(train)))
    if recipe.overfit_one_batch:
        recipe, train = _one_batch(recipe, train)
        held_out, part = train, "train"
    if recipe.epochs == 0:
        recipe = dataclasses.replace(recipe, epochs=suitable_epochs(len(train)))
    config = model_config(
        base,
        num_classes=len(data.classes),
        in_channels=recipe.channels or 3,
        image_size=(recipe.image_size, recipe.image_size) if recipe.image_size else None,
        drop_path=recipe.drop_path,
        block=recipe.block,
        fusion=recipe.fusion,
        branches=_with_tokeniser(base, recipe.tokeniser),
    )
    preprocessing = (
        Preprocessing.from_dict(recorded.preprocessing)
        if recorded is not None
        else fitting_preprocessing(
            train,
            Preprocessing(
                image_size=config.image_size, crop=preset(name).crop, channels=recipe.channels
            ),
        )
    )
    prepared = PreparedRun(recipe, data, train, held_out, part, name, why, config, preprocessing)
    prepared = dataclasses.replace(prepared, warnings=tuple(_warnings(prepared, looked)))
    for line in (
        *_found(prepared, sizes),
        *(f"warn   {warning}" for warning in (*prepared.warnings, *_less_than_asked(prepared))),
    ):
        callback.on_message(line)
    return prepared


def fitting_preprocessing(images: ImageSet, preprocessing: Preprocessing) -> Preprocessing:
    """`preprocessing` with the mean and standard deviation of each channel of `images`, where they are not RGB's of ImageNet:
    over every pixel of MEASURED_AT_MOST of them, evenly spaced. A channel that never changes has the deviation 1."""
    if preprocessing.channels in (0, 3):
        return preprocessing
    step = -(-len(images) // MEASURED_AT_MOST)
    sums = np.zeros((2, preprocessing.channels))
    taken = range(0, len(images), step)
    for index in taken:
        pixels = preprocessing.fit(images.picture(index, preprocessing)).astype(np.float64)
        sums += pixels.mean(axis=(0, 1)), (pixels**2).mean(axis=(0, 1))
    mean, square = sums / len(taken)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    std = np.where(deviation > CONSTANT, deviation, 1.0)
    return dataclasses.replace(
        preprocessing, mean=tuple(mean.round(6).tolist()), std=tuple(std.round(6).tolist())
    )


def _look(images: ImageSet, reader: Preprocessing, callback: Callback, team: Team) -> Findings:
    own = images.take(range(*team.bounds(len(images))))
    found = team.gather(look_at(own, preprocessing=reader, progress=callback.on_image_checked))
    return Findings(
        {name: reason for one in found for name, reason in one.broken.items()},
        {name: look for one in found for name, look in one.looks.items()},
    )


def suitable_epochs(images: int) -> int:
    """Epochs for `images` training images, so that a run sees about IMAGES_SEEN of them: from 6 to 60, and of fewer than 200
    images up to 240, so that it sees 12,000."""
    return max(
        min(max(round(IMAGES_SEEN / images), 6), 60), min(round(SEEN_AT_LEAST / images), 240)
    )


def suitable_batch(images: int) -> int:
    """Images a step for `images` training images: 16 for fewer than FEW of them, so that there are enough steps, else 32."""
    return 16 if images < FEW else 32


def suitable_parts(config: CrossViTConfig, *, images: int, device: str) -> int:
    """Parts to take a batch of `images` in: on a CPU so that about PART_IMAGES of a large model are worked on at once, which
    its cache holds (`make bench NAME=training`); all of them together elsewhere."""
    most_tokens = max(math.prod(branch.grid(config.image_size)) for branch in config.branches)
    return math.ceil(images / PART_IMAGES) if device == "cpu" and most_tokens >= MANY_TOKENS else 1


def _one_batch(recipe: Recipe, train: ImageSet) -> tuple[Recipe, ImageSet]:
    """(recipe, images) of the first batch alone, with nothing that varies it, softens its targets, gives others than its labels
    or ends the run early."""
    first = Order(train.labels, recipe.seed).epoch(0)[: recipe.batch_size]
    recipe = dataclasses.replace(
        recipe,
        augmentation=AugmentationRecipe(rotate=0.0, shift=0.0, zoom=0.0, colour=0.0),
        mixing=MixingRecipe(),
        distillation=DistillationRecipe(),
        checkpoints=dataclasses.replace(recipe.checkpoints, patience="0"),
        label_smoothing=0.0,
        drop_path=0.0,
        sampling="all",
    )
    return recipe, train.take([key.image for key in first])


def require_known_parts(recipe: Recipe) -> None:
    """ConfigError for a block, fusion or tokeniser of the recipe that nobody has registered."""
    for registry in (BLOCKS, FUSIONS, TOKENISERS):
        if (name := getattr(recipe, registry.kind)) is not None:
            registry.check(name)


def _with_tokeniser(config: CrossViTConfig, name: str | None) -> tuple[BranchConfig, ...] | None:
    if name is None:
        return None
    return tuple(dataclasses.replace(branch, tokeniser=name) for branch in config.branches)


def _chosen_model(
    recipe: Recipe, recorded: RunRecord | None
) -> tuple[str, CrossViTConfig, str] | None:
    """(name, config, why) where they are given: by the run that is gone on with, by `model`, or by the weights that are the
    start; None where the images decide. What cannot work is an error before the images are read."""
    if recorded is not None:
        return recorded.model, CrossViTConfig.from_dict(recorded.config), ""
    if recipe.model:
        if recipe.weights:
            weight_file(recipe.weights)
        return recipe.model, model_config(recipe.model, image_size=recipe.image_size), ""
    if recipe.weights:
        name, config = identify(read_weights(recipe.weights))
        if name is None:
            raise UsageError(
                f"{recipe.weights} is of a model without a name: give a recipe with --model"
            )
        return name, config, f", as in {recipe.weights}"
    return None


def _suitable_model(side: float, images: int) -> tuple[str, CrossViTConfig, str]:
    """(name, config, why) by the typical shorter side in pixels and the number of training images: the preset whose input
    is nearest to the side, as dev/LOG.md says."""
    if images >= ENOUGH_FOR_9_DAGGER and side > 128:
        name = "crossvit_9_dagger_240"
    else:
        name = (
            "crossvit_pico_32"
            if side <= 40
            else "crossvit_nano_64"
            if side <= 80
            else "crossvit_micro_96"
        )
    return (
        name,
        model_config(name),
        f", chosen for {images:,} images with sides around {side:.0f} (--model takes another)",
    )


def _without_broken(data: Data, looked: Mapping[str, Findings], *, skip: bool) -> Data:
    """`data` less the images that cannot be decoded, which are counted and named: in its notes with `skip`, else in a
    DataError."""
    reasons = [reason for findings in looked.values() for reason in findings.broken.values()]
    if not reasons:
        return data
    more = f"; and {len(reasons) - NAMED_AT_MOST} more" if len(reasons) > NAMED_AT_MOST else ""
    total = sum(len(images) for images in data.parts.values())
    line = f"{len(reasons)} of {total} images cannot be decoded: {'; '.join(reasons[:NAMED_AT_MOST])}{more}"
    if not skip:
        raise DataError(f"{line}. Repair or delete them, or add --skip-bad")
    good = data.without({part: findings.broken for part, findings in looked.items()})
    return dataclasses.replace(good, notes=(*data.notes, f"skipped: {line}"))


def _warnings(prepared: PreparedRun, looked: Mapping[str, Findings]) -> list[str]:
    """What makes a score look better than it is, or a class be learnt worse than others."""
    sides = (
        {"train": prepared.train}
        if prepared.held_out is prepared.train
        else {"train": prepared.train, "held out": prepared.held_out}
    )
    lines = warnings_of(prepared.data, looked, sides)
    counts = {name: count for name, count in prepared.train.counts().items() if count}
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if (
        counts[most] > UNEVEN * counts[least]
        and prepared.recipe.sampling != "balanced"
        and prepared.recipe.class_weights == "none"
    ):
        sampling = " or --sampling balanced" * (prepared.train.task == SINGLE_LABEL)
        lines.append(
            f"{most} has {counts[most]} images and {least} {counts[least]}: --class-weights balanced{sampling} makes up for it"
        )
    return lines


def _less_than_asked(prepared: PreparedRun) -> list[str]:
    """Fields of the recipe that another one, or the length of the run, takes the effect from."""
    recipe, optimiser = prepared.recipe, prepared.recipe.optimiser
    lines: list[str] = []
    steps_an_epoch = math.ceil(len(prepared.train) / recipe.batch_size)
    steps = recipe.epochs * steps_an_epoch
    warmup = parse_duration(optimiser.warmup, name="warmup", units=STEP_UNITS).steps(
        per_epoch=steps_an_epoch, total=steps
    )
    if warmup >= steps:
        lines.append(
            f"the warm-up of {optimiser.warmup} takes the whole run of {recipe.epochs} epochs, so that the rate never comes to "
            f"{optimiser.lr:g}: --warmup '10 %'"
        )
    if warmup and optimiser.warmup_lr > optimiser.lr:
        lines.append(
            f"the warm-up starts from {optimiser.warmup_lr:g}, above the highest rate of {optimiser.lr:g}: it falls"
        )
    if recipe.sampling == "balanced" and recipe.augmentation.repeats > 1:
        lines.append(
            "--sampling balanced draws each image by itself, so that --repeats does nothing"
        )
    if recipe.sampling == recipe.class_weights == "balanced":
        lines.append(
            "--sampling balanced and --class-weights balanced make up for rare classes twice: one of them is enough"
        )
    return lines


def _found(prepared: PreparedRun, image_sizes: Sequence[tuple[int, int]]) -> list[str]:
    heights, widths = zip(*image_sizes, strict=True)
    smallest, largest = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    total = len(prepared.train) + len(prepared.held_out)
    where = prepared.held_out_part if prepared.held_out_part != "held-out" else "held out"
    lines = [
        f"data   {prepared.data.location}: {len(prepared.data.classes)} classes, {total:,} images "
        f"({len(prepared.train):,} train, {len(prepared.held_out):,} {where}), {sizes} pixels"
    ]
    lines += [f"note   {note}" for note in (*prepared.data.notes, *prepared.augment().left_out)]
    if prepared.train.task == MULTI_LABEL:
        bare = sum(
            label == () for images in (prepared.train, prepared.held_out) for label in images.labels
        )
        lines.append(
            f"note   several labels an image ({bare:,} images have none): a yes or no for each class"
        )
    without = [name for name, count in prepared.held_out.counts().items() if count == 0]
    if without:
        lines.append(
            f"note   {where} has no image of {', '.join(without)}: nothing is measured for them"
        )
    patch = max(branch.patch for branch in prepared.config.branches)
    tiny = sum(min(size) < patch for size in image_sizes)
    if tiny:
        lines.append(
            f"note   {tiny} images are smaller than a {patch}-pixel patch: they are enlarged"
        )
    return lines
