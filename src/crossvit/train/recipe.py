"""What a training run is: nested frozen records, read from TOML. Standard library only.

Every field is an option of `crossvit train` under its own name (`lr` of [optimiser] is `--lr`), so no two fields have the
same. Shipped recipes are in `crossvit/recipes/`; each one's header says its command, hardware, time and result.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from crossvit.errors import (
    VERY_LIKE,
    ConfigError,
    UnknownNameError,
    UsageError,
    nearest_names,
    unknown_name,
)
from crossvit.run import Run
from crossvit.train.durations import STEP_UNITS, UNITS, Duration, parse_duration

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
PARTS = ("tokens", "branch0", "branch1", "branch2", "branch3", "fusion", "heads", "backbone")
DURATIONS = ("warmup", "every", "patience")
PARTS_BY_NAME = ("block", "fusion", "tokeniser")  # of the model; see crossvit.model.registry
PLAIN_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def option(default: Any, help: str) -> Any:
    """A field with the line that explains it, in `--help` as here."""
    return dataclasses.field(default=default, metadata={"help": help})


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: should be {right}")


def _require_all(
    record: object,
    names: str,
    *,
    low: float = 0.0,
    high: float = float("inf"),
    open_high: bool = True,
) -> None:
    """Every field in `names` lies from `low` to `high`."""
    for name in names.split():
        value = getattr(record, name)
        holds = low <= value < high if open_high else low <= value <= high
        most = f"from {low:g} up to {'(not including) ' * open_high}{high:g}"
        _require(
            holds,
            name,
            value,
            f"a number of {low:g} or more" if high == float("inf") else f"a number {most}",
        )


def _tidy_duration(record: object, name: str, units: tuple[str, ...]) -> None:
    """Check the duration in a field and write it in one way, so that equal lengths are equal fields."""
    object.__setattr__(
        record, name, str(parse_duration(getattr(record, name), name=name, units=units))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserRecipe:
    """[optimiser] A linear warm-up, then half a cosine from `lr` to `final_lr` at the last step."""

    optimiser: str = option("adamw", "adamw, sgd, or any first-order optimiser of timm by name")
    lr: float = option(1e-3, "the highest learning rate")
    weight_decay: float = option(
        0.05, "on matrices and kernels; not on norms, biases, class tokens and positions"
    )
    momentum: float = option(0.9, "of sgd and its like")
    warmup: str = option("10 %", "how long the rate rises: steps, epochs or % of the run")
    warmup_lr: float = option(0.0, "the rate that the warm-up starts from")
    final_lr: float = option(1e-5, "the rate at the last step")
    clip: float = option(1.0, "largest global gradient norm, 0 for none")
    layer_decay: float = option(
        1.0, "factor on the rate for each block further from the heads, along each branch"
    )
    branch_lr: tuple[float, ...] = option((), "factor on the rate of each branch")
    fusion_lr: float = option(1.0, "factor on the rate of the fusion")
    decay_like_authors: bool = option(
        False, "decay class tokens and positions too, as the authors' code does"
    )

    def __post_init__(self) -> None:
        _require(0 < self.lr < float("inf"), "lr", self.lr, "a positive number")
        _require_all(self, "weight_decay momentum warmup_lr final_lr clip fusion_lr")
        _require(
            0 < self.layer_decay <= 1,
            "layer_decay",
            self.layer_decay,
            "a number above 0 and at most 1",
        )
        _require(
            all(0 <= factor < float("inf") for factor in self.branch_lr),
            "branch_lr",
            self.branch_lr,
            "numbers of 0 or more",
        )
        _tidy_duration(self, "warmup", STEP_UNITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationRecipe:
    """[augmentation] How a training image is varied. Zeros (and `min_crop` 1) leave it as it is."""

    min_crop: float = option(
        1.0, "smallest share of the area that a random crop keeps; 1 keeps the whole picture"
    )
    flip: float = option(0.0, "chance of a left-right flip")
    rotate: float = option(15.0, "degrees")
    shift: float = option(0.1, "share of the side")
    zoom: float = option(0.15, "share of the side")
    colour: float = option(0.3, "brightness, contrast and saturation vary by up to this share")
    randaugment: str = option("", "timm's RandAugment, such as rand-m9-mstd0.5-inc1")
    erasing: float = option(0.0, "chance that a rectangle becomes noise")
    repeats: int = option(
        1, "how often each image of a pass is taken, varied anew; the pass stays as long"
    )

    def __post_init__(self) -> None:
        _require(0 < self.min_crop <= 1, "min_crop", self.min_crop, "a share above 0 and at most 1")
        _require(0 <= self.rotate <= 180, "rotate", self.rotate, "degrees from 0 to 180")
        _require_all(self, "flip erasing", high=1, open_high=False)
        _require_all(self, "shift zoom colour", high=1)
        _require(self.repeats >= 1, "repeats", self.repeats, "a whole number of 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingRecipe:
    """[mixing] timm's mixup and cutmix. The targets are mixed as the images are."""

    mixup: float = option(0.0, "alpha of mixup, 0 for none")
    cutmix: float = option(0.0, "alpha of cutmix, 0 for none")
    mixing_chance: float = option(1.0, "share of batches that are mixed")
    cutmix_share: float = option(0.5, "share of cutmix where both are on")

    def __post_init__(self) -> None:
        _require_all(self, "mixup cutmix")
        _require_all(self, "mixing_chance cutmix_share", high=1, open_high=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationRecipe:
    """[distillation] A teacher's answers beside the labels.

    soft: T² KL(teacher / T ‖ student / T).  hard: cross-entropy with the teacher's first class (Touvron et al., 2021).
    """

    teacher: str = option("", "timm:NAME, timm:local-dir:FOLDER, or a run; none where empty")
    distil: str = option("soft", "soft or hard")
    distil_weight: float = option(0.5, "share of the teacher in the loss")
    temperature: float = option(3.0, "of soft distillation")
    distil_branches: bool = option(False, "teach each branch's logits rather than their mean")

    def __post_init__(self) -> None:
        _require(self.distil in ("soft", "hard"), "distil", self.distil, "soft or hard")
        _require_all(self, "distil_weight", high=1, open_high=False)
        _require(
            0 < self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "a positive number",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """[checkpoints] When they are written, and which are kept."""

    every: str = option(
        "1 epochs", "how often: steps, epochs, s, min or h; the end of a run always has one"
    )
    keep: int = option(2, "how many of the newest are kept")
    patience: str = option(
        "0",
        "stop when the held-out score (top-1, or mAP of several labels) has not risen for so many epochs, or % of the run (one "
        "epoch at least), and take the best; 0 never",
    )
    select: str = option(
        "last",
        "whose weights become the run's: last or best (on the held-out images); with patience the best",
    )

    def __post_init__(self) -> None:
        _tidy_duration(self, "every", tuple(unit for unit in UNITS if unit != "%"))
        _require(
            parse_duration(self.every, name="every").amount > 0, "every", self.every, "more than 0"
        )
        _require(self.keep >= 1, "keep", self.keep, "a whole number of 1 or more")
        _tidy_duration(self, "patience", ("epochs", "%"))
        _require(self.select in ("last", "best"), "select", self.select, "last or best")

    @property
    def takes_best(self) -> bool:
        """Whether the weights of the best epoch become the run's: by `select`, or because of `patience`."""
        return self.select == "best" or self.waits(epochs=1) > 0

    def waits(self, *, epochs: int) -> int:
        """Epochs without a better score after which a run of `epochs` stops, 0 for never."""
        patience = parse_duration(self.patience, name="patience", units=("epochs", "%"))
        return max(patience.steps(per_epoch=1, total=epochs), 1) if patience.amount else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices of a training run; every field is an option of `crossvit train`."""

    data: str = option(
        "", "`digits`, a folder of class folders, a CSV, shards or a dataset (docs/data.md)"
    )
    out: str = option("", "the run folder")
    model: str | None = option(
        None,
        "a name from `crossvit models`; chosen by the size and number of the images if left out",
    )
    block: str | None = option(
        None,
        "an encoder block that a file given by --import registers; the model's own if left out",
    )
    fusion: str | None = option(
        None,
        "how the branches meet: a built-in name, or one that a file given by --import registers",
    )
    tokeniser: str | None = option(
        None, "how every branch makes patches: a built-in name, or one of a file given by --import"
    )
    weights: str | None = option(
        None,
        "what to start from: a run, a weight file, an https:// address, a released model's name or owner/name on the hub; "
        "a classifier for other classes is made anew, but for the rows of classes with the same name",
    )
    channels: int = option(
        0,
        "0: every picture as 8-bit RGB; 1 (grey), 3, 4 (RGBA) or more: so many channels with every bit that is stored",
    )
    image_size: int | None = option(
        None, "side of the model's input in pixels; the model's own if left out"
    )
    epochs: int = option(
        40, "passes over the training images; 0 takes a number that suits how many there are"
    )
    batch_size: int = option(
        64,
        "images a step, over all processes; 0 takes a number that suits how many images there are",
    )
    accumulate: int = option(
        0,
        "parts that a batch is taken in, one after the other, to save memory; 0 takes as many as suit the processor",
    )
    seed: int = option(
        0, "another number gives another split, start and order; the same one gives the same run"
    )
    held_out: float = option(
        0.2, "share of every class kept for evaluation where the data has no val/ or test/"
    )
    label_smoothing: float = option(0.1, "share of the target spread over all classes")
    drop_path: float = option(0.0, "highest rate of stochastic depth")
    class_weights: str = option("none", "none, or balanced: rare classes weigh more in the loss")
    sampling: str = option(
        "all",
        "all: every image once a pass; balanced: every class equally often (one label an image)",
    )
    freeze: tuple[str, ...] = option((), f"parts that are not trained: {', '.join(PARTS)}")
    ema: float = option(
        0.0,
        "decay of an average of the weights, which is then what is evaluated and kept; 0 for none",
    )
    precision: str = option(
        "auto", "auto, fp32, bf16 or fp16; auto is bf16 where the processor or GPU computes in it"
    )
    device: str = option("auto", "auto, cpu, cuda or mps")
    workers: int = option(0, "processes that read and augment images; 0 does it in this one")
    gradient_checkpointing: bool = option(
        False, "compute activations a second time instead of keeping them"
    )
    compile: bool = option(False, "torch.compile the model")
    channels_last: bool = option(False, "keep images and kernels channels-last")
    skip_bad: bool = option(
        False, "leave out images that cannot be decoded instead of stopping before training"
    )
    overfit_one_batch: bool = option(
        False, "train on the first batch alone, as it is, to see that the loss goes to nothing"
    )
    optimiser: OptimiserRecipe = OptimiserRecipe()
    augmentation: AugmentationRecipe = AugmentationRecipe()
    mixing: MixingRecipe = MixingRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    checkpoints: CheckpointRecipe = CheckpointRecipe()

    def __post_init__(self) -> None:
        whole, share = "a whole number of 1 or more", "a number from 0 up to (not including) 1"
        _require(self.epochs >= 0, "epochs", self.epochs, "a whole number, 0 to have it chosen")
        _require(
            self.batch_size >= 0, "batch_size", self.batch_size, f"{whole}, or 0 to have it chosen"
        )
        _require(
            0 <= self.accumulate <= (self.batch_size or self.accumulate),
            "accumulate",
            self.accumulate,
            "from 1 up to the batch size, or 0 to have it chosen",
        )
        _require(
            self.image_size is None or self.image_size >= 1,
            "image_size",
            self.image_size,
            "a number of pixels, 1 or more",
        )
        _require(
            0 <= self.channels <= 256,
            "channels",
            self.channels,
            "a number of channels up to 256, or 0 for RGB",
        )
        _require(
            0 <= self.seed < 2**32, "seed", self.seed, "a whole number of 0 or more, below 2^32"
        )
        _require(self.workers >= 0, "workers", self.workers, "a whole number of 0 or more")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share between 0 and 1")
        for name in ("model", "weights", *PARTS_BY_NAME):
            _require(getattr(self, name) != "", name, "", "a name, or left out")
        for name in ("label_smoothing", "drop_path", "ema"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), share)
        _require(
            self.class_weights in ("none", "balanced"),
            "class_weights",
            self.class_weights,
            "none or balanced",
        )
        _require(self.sampling in ("all", "balanced"), "sampling", self.sampling, "all or balanced")
        for part in self.freeze:
            _require(part in PARTS, "freeze", part, f"one of {', '.join(PARTS)}")
        _require(
            self.precision in PRECISIONS,
            "precision",
            self.precision,
            f"one of {', '.join(PRECISIONS)}",
        )
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")

    def changed(self, **changes: Any) -> Recipe:
        """This recipe with some fields changed.

        Args:
            **changes: Values by field name, whatever table the field is in (`lr` is in `optimiser`);
                None leaves a field as it is.
        """
        record = self.to_dict()
        tables = {name: table for table, name, _ in fields()}
        for name, value in changes.items():
            if value is None:
                continue
            if name in tables:
                (record[tables[name]] if tables[name] else record)[name] = value
            else:
                record[name] = value  # a whole table, or a name that is refused below
        return Recipe.from_dict(record)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of numbers, strings, lists and None, from which `from_dict` makes an equal recipe.

        The names of a model's parts are left out where they are not given, so that releases before them read the dict.
        """
        record: dict[str, Any] = dataclasses.asdict(self)
        for name in PARTS_BY_NAME:
            if record[name] is None:
                del record[name]
        return {key: _plain(value) for key, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """The recipe of a nested dict. An unknown key is an error with the nearest name, a wrong type one with the right."""
        recipe: Recipe = _build(cls, record)
        return recipe


def fields() -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """(table, name, field) of every field; the table of the recipe's own is empty."""
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(field.default):
            yield from (
                (field.name, inner.name, inner) for inner in dataclasses.fields(field.default)
            )
        else:
            yield "", field.name, field


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("crossvit") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def recipe_text(name: str) -> str:
    """The TOML text of a shipped recipe."""
    if name not in shipped_recipes():
        raise unknown_name("recipe", name, shipped_recipes())
    return (resources.files("crossvit") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str, **changes: Any) -> Recipe:
    """Load a recipe.

    Args:
        name_or_path: A shipped recipe (`crossvit recipes`), a TOML file or a run folder.
        **changes: Fields to change, as in `Recipe.changed`.

    Raises:
        UsageError: For a file that does not exist.
        ConfigError: For a file or a value that cannot work.
    """
    if Run(name_or_path).exists():
        return Recipe.from_dict(Run(name_or_path).record().recipe).changed(**changes)
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"no recipe file {path}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"recipe {path} is not UTF-8 text") from None
    else:
        text = recipe_text(name_or_path)
    try:
        record = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name_or_path} is not TOML: {error}") from None
    return Recipe.from_dict(record).changed(**changes)


def _build(kind: type[Any], record: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in record.items():
        if key not in hints:
            raise _misplaced(key)
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"recipe key {key} = {value!r}: should be a table [{key}]")
            values[key] = _build(hints[key], value)
        else:
            values[key] = _typed(key, value, hints[key])
    return kind(**values)


def _misplaced(key: str) -> UsageError:
    """The error for a key that its table has not: the table it belongs to; else the nearest fields of all tables, or where none
    is a letter or two apart those that `meant_by` finds."""
    places = {
        name: f"under [{table}]" if table else "at the top, before the tables"
        for table, name, _ in fields()
    }
    if key in places:
        return ConfigError(f"recipe key {key}: belongs {places[key]}")
    meant = (
        nearest_names(key, places, cutoff=VERY_LIKE) or meant_by(key) or nearest_names(key, places)
    )
    if not meant:
        return UnknownNameError(f"unknown recipe key {key!r}: see `crossvit train --help`")
    return UnknownNameError(
        f"unknown recipe key {key!r}: did you mean {' or '.join(f'{name} {places[name]}' for name in meant)}?"
    )


def meant_by(key: str) -> list[str]:
    """Fields that have the same words as `key` and more or fewer (`batch`, `ema_decay`), else the first whose explanation has its
    words (`learning_rate`) or words a letter or two apart from them (`lerning_rate`); none where none has."""
    words = key.lower().split("_")
    names = [name for _, name, _ in fields()]
    shared = [
        name
        for name in names
        if set(words) < set(name.split("_")) or set(words) > set(name.split("_"))
    ]
    if shared:
        return shared[:3]
    for cutoff in (1.0, VERY_LIKE):
        for _, name, field in fields():
            said = re.findall(r"[^\W_]+", field.metadata["help"].lower())
            phrases = [" ".join(said[start : start + len(words)]) for start in range(len(said))]
            if difflib.get_close_matches(" ".join(words), phrases, n=1, cutoff=cutoff):
                return [name]
    return []


def _typed(key: str, value: Any, wanted: Any) -> Any:
    """`value` as the field wants it. Runs of version 0.1.0 have a share of the run for `warmup`, as a number up to 1."""
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"recipe key {key} = {value!r}: should be a list")
        return tuple(_typed(key, one, item) for one in value)
    if key == "warmup" and type(value) is float and 0 <= value <= 1:
        return str(Duration(round(100 * value, 6), "%"))
    if key in DURATIONS and type(value) in (int, float):
        return str(value)  # a number alone: what is read as a duration says which units there are
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    value = float(value) if float in allowed and type(value) is int else value
    if type(value) not in allowed:
        names = " or ".join(PLAIN_NAMES[one] for one in allowed if one in PLAIN_NAMES)
        raise ConfigError(f"recipe key {key} = {value!r}: should be {names}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
