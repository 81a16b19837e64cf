"""A trained model wherever it is: a run, a weight file, or a name on the hub, with what is needed to use it.

Opening a run reads run.json alone and imports no torch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossvit import results
from crossvit.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from crossvit.errors import UsageError
from crossvit.model.config import CrossViTConfig
from crossvit.results.run_record import UNKNOWN_SIZE, RunRecord
from crossvit.run import Run

if TYPE_CHECKING:
    from crossvit.data.images import Data, ImageSet
    from crossvit.model.crossvit import CrossViT
    from crossvit.weights.files import Weights

SINGLE_LABEL, MULTI_LABEL = results.SINGLE_LABEL, results.MULTI_LABEL
CLASSES_NAMED = 20  # in a message; the rest are counted
IMAGENET_CLASSES = 1000  # of ImageNet-1k, whose names are known where weights say none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a trained model is, and how to build it.

    source: what was asked for.  model: the name of a preset, None for a config of its own.  classes: the name of each output.
    aliases: of each class, other names that data may have for it (WordNet ids and numbers of ImageNet-1k); may be empty.
    task: `single-label` (softmax) or `multi-label` (a sigmoid a class).  temperature: what logits are divided by before either.
    thresholds: of a multi-label model, the probability from which each class is said; empty where none were set.
    record: run.json, None for what is not a run.
    """

    source: str
    model: str | None
    config: CrossViTConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    aliases: tuple[tuple[str, ...], ...] = ()
    task: str = SINGLE_LABEL
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    record: RunRecord | None = None
    weights: Weights | None = None  # where they have been read already

    def build(self) -> CrossViT:
        """The model with its weights, in evaluation mode. What the weights had to be adapted in is logged."""
        import torch

        from crossvit.factory import create_model
        from crossvit.weights.files import read_weights
        from crossvit.weights.load import load_weights

        weights = read_weights(self.source) if self.weights is None else self.weights
        with torch.device("meta"):  # every parameter is read, so none is drawn first
            model = create_model(self.config)
        for note in load_weights(model, weights):
            logging.getLogger("crossvit").warning("%s", note)
        return model.eval()

    def positions(self) -> dict[str, int]:
        """Every name of a class, its own and its aliases, and which output it is. A name of two classes is left out."""
        found: dict[str, int] = {}
        twice: set[str] = set()
        for index, names in enumerate(self.aliases):
            for name in names:
                if found.setdefault(name, index) != index:
                    twice.add(name)
        others = {name: index for name, index in found.items() if name not in twice}
        return {**others, **{name: index for index, name in enumerate(self.classes)}}

    def select(self, data: Data, split: str | None = None) -> tuple[ImageSet, str]:
        """The part of `data` to measure this model on, under its own class indices.

        Images that the run held out are known by name and size, wherever they lie now: where there
        are some, the others may have been trained on, so those are taken alone unless `split` says
        otherwise.

        Args:
            data: What `open_data` gives.
            split: The name of a part, `held-out`, or None for the part to evaluate on.

        Returns:
            (images, name of the part).

        Raises:
            UsageError: For a part that is not there, or classes that the model does not have.
        """
        whole = data.parts.get("all") or data.parts.get("train")
        known = {} if self.record is None else self.record.data.held_out
        files = zip(whole.names, whole.file_sizes, strict=True) if whole is not None else ()
        held_out = [
            index
            for index, (name, size) in enumerate(files)
            if known.get(name) in (size, UNKNOWN_SIZE)
        ]
        if whole is not None and held_out and split in (None, "held-out"):
            images, part = whole.take(held_out), "held-out"
        elif split == "held-out":
            raise UsageError(
                f"{data.location} has none of the images that this run held out: leave out --split held-out"
            )
        elif split is not None:
            images, part = data.part(split), split
        else:
            images = data.evaluation_part()
            part = next(name for name, candidate in data.parts.items() if candidate is images)
        return _relabelled(images, self), part


def open_trained(source: str | Path) -> Trained:
    """The finished run, weight file, timm folder, address or hub name `source`.

    UsageError where there is nothing, or the run has not finished; WeightsError or RunError for what is damaged.
    """
    run = Run(source)
    return (
        _of_run(run)
        if run.exists() or (run.path.is_dir() and not _has_weights(run.path))
        else _of_weights(source)
    )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _of_run(run: Run) -> Trained:
    record = run.finished_record()
    return Trained(
        source=str(run.path),
        model=record.model,
        config=CrossViTConfig.from_dict(record.config),
        classes=record.classes,
        preprocessing=Preprocessing.from_dict(record.preprocessing),
        task=record.task,
        temperature=1.0 if record.temperature is None else record.temperature,
        thresholds=record.thresholds or (),
        record=record,
    )


def _of_weights(source: str | Path) -> Trained:
    from crossvit.weights.files import read_weights
    from crossvit.weights.identify import identify

    weights = read_weights(source)
    model, config = identify(weights)
    classes, aliases = (
        (weights.classes, ()) if weights.classes else _class_names(config.num_classes)
    )
    return Trained(
        source=str(source),
        model=model,
        config=config,
        classes=classes,
        aliases=aliases,
        preprocessing=Preprocessing.from_dict(
            weights.preprocessing or paper_preprocessing(model, config)
        ),
        weights=weights,
    )


def _relabelled(images: ImageSet, trained: Trained) -> ImageSet:
    """`images` under the model's own class indices; their classes may go by any name that the model's have."""
    positions = trained.positions()
    unknown = sorted(set(images.classes) - set(positions))
    if unknown:
        raise UsageError(
            f"{images.location} has classes the run was not trained on: {_listed(unknown)} (it knows {_listed(trained.classes)})"
        )
    if trained.task != images.task:
        if images.task == MULTI_LABEL:
            raise UsageError(
                f"{images.location} has several classes an image and {trained.source} gives one: retrain it on such data"
            )
        images = dataclasses.replace(
            images,
            labels=tuple((label,) for label in images.labels if isinstance(label, int)),
            task=MULTI_LABEL,
        )
    return images.under(trained.classes, [positions[name] for name in images.classes])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - CLASSES_NAMED} more" if len(names) > CLASSES_NAMED else ""
    return ", ".join(names[:CLASSES_NAMED]) + more


def paper_preprocessing(model: str | None, config: CrossViTConfig) -> dict[str, Any]:
    """That of the released weights, for a file that says nothing of its own; channels that are not RGB get the mean over RGB."""
    from crossvit.model.presets import PRESETS

    channels = config.in_channels
    crop = PRESETS[model].crop if model in PRESETS else None
    mean, std = (
        values if channels == 3 else (round(sum(values) / 3, 3),) * channels
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return Preprocessing(image_size=config.image_size, crop=crop, mean=mean, std=std).to_dict()


def _class_names(count: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """(names, aliases) of the outputs of weights that say none: ImageNet-1k's where there are a thousand, else numbers.

    A name that two classes of ImageNet-1k have in common (crane, maillot) has its WordNet id behind it.
    """
    if count != IMAGENET_CLASSES:
        return tuple(str(index) for index in range(count)), ()
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo()
    ids = [known.index_to_label_name(index) for index in range(count)]
    synonyms = [known.index_to_description(index).split(", ") for index in range(count)]
    first = [words[0] for words in synonyms]
    names = tuple(
        word if first.count(word) == 1 else f"{word} ({ids[index]})"
        for index, word in enumerate(first)
    )
    return names, tuple(
        (ids[index], str(index), *words, ", ".join(words)) for index, words in enumerate(synonyms)
    )
