"""What a training run is: nested frozen records, read from TOML. Standard library only.

Shipped recipes are in `crossvit/recipes/`; each one's header says its command, hardware, time and result.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from crossvit.errors import ConfigError, UsageError, unknown_name
from crossvit.run import Run

PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")
PLAIN_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: should be {right}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserRecipe:
    """AdamW with linear warm-up and a cosine to `final_lr`.

    lr: the highest learning rate.  weight_decay: on weight matrices only, not on norms, biases, class tokens, positions.
    warmup: share of all steps.  clip: largest global gradient norm, 0 for none.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    final_lr: float = 1e-5
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < float("inf"), "lr", self.lr, "a positive number")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "a number from 0 up to (not including) 1")
        for name in ("weight_decay", "final_lr", "clip"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "a number of 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationRecipe:
    """How a training image is varied. Zeros (and `min_crop` 1) leave it as it is.

    min_crop: smallest share of the picture's area that a random crop keeps; 1 keeps the whole picture.
    flip: chance of a left-right flip.  rotate: degrees.  shift, zoom: share of the side.
    colour: brightness, contrast and saturation vary by up to this share.
    """

    min_crop: float = 1.0
    flip: float = 0.0
    rotate: float = 10.0
    shift: float = 0.1
    zoom: float = 0.15
    colour: float = 0.3

    def __post_init__(self) -> None:
        _require(0 < self.min_crop <= 1, "min_crop", self.min_crop, "a share above 0 and at most 1")
        _require(0 <= self.flip <= 1, "flip", self.flip, "a chance from 0 to 1")
        _require(0 <= self.rotate <= 180, "rotate", self.rotate, "degrees from 0 to 180")
        for name in ("shift", "zoom", "colour"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number from 0 up to (not including) 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    data: `digits` or a folder of class folders.  out: the run folder.  model: a name; None chooses one from the data.
    weights: a run folder or weight file to start from.  image_size: None takes the model's own.
    batch_size: the global batch.  held_out: share of every class kept for evaluation where the data has no val/ or test/.
    skip_bad: leave out images that cannot be decoded instead of stopping.
    """

    data: str = ""
    out: str = ""
    model: str | None = None
    weights: str | None = None
    image_size: int | None = None
    epochs: int = 40
    batch_size: int = 64
    seed: int = 0
    held_out: float = 0.2
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    precision: str = "auto"
    device: str = "auto"
    workers: int = 0
    skip_bad: bool = False
    optimiser: OptimiserRecipe = OptimiserRecipe()
    augmentation: AugmentationRecipe = AugmentationRecipe()

    def __post_init__(self) -> None:
        whole, share = "a whole number of 1 or more", "a number from 0 up to (not including) 1"
        _require(self.epochs >= 1, "epochs", self.epochs, whole)
        _require(self.batch_size >= 1, "batch_size", self.batch_size, whole)
        _require(self.image_size is None or self.image_size >= 1, "image_size", self.image_size, "a number of pixels, 1 or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number of 0 or more, below 2^32")
        _require(self.workers >= 0, "workers", self.workers, "a whole number of 0 or more")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share between 0 and 1")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, share)
        _require(0 <= self.drop_path < 1, "drop_path", self.drop_path, share)
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")

    def changed(self, **changes: Any) -> Recipe:
        """This recipe with `changes` laid over it; None leaves a field as it is. `lr` is the optimiser's."""
        record = self.to_dict()
        given = {key: value for key, value in changes.items() if value is not None}
        if "lr" in given:
            record["optimiser"]["lr"] = given.pop("lr")
        return Recipe.from_dict(record | given)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """The recipe of a nested dict. An unknown key is an error with the nearest name, a wrong type one with the right."""
        recipe: Recipe = _build(cls, record)
        return recipe


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("crossvit") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, **changes: Any) -> Recipe:
    """A shipped recipe by name, a TOML file by path, or the recipe of a run folder, with `changes` laid over it as in
    `Recipe.changed`."""
    if Run(name_or_path).exists():
        return Recipe.from_dict(Run(name_or_path).record()["recipe"]).changed(**changes)
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"no recipe file {path}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"recipe {path} is not UTF-8 text") from None
    elif name_or_path in shipped_recipes():
        text = (resources.files("crossvit") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe", name_or_path, shipped_recipes())
    try:
        record = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name_or_path} is not TOML: {error}") from None
    return Recipe.from_dict(record).changed(**changes)


def _build(kind: type[Any], record: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in record.items():
        if key not in types:
            raise unknown_name("recipe key", key, types)
        wanted = types[key]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise ConfigError(f"recipe key {key} = {value!r}: should be a table [{key}]")
            values[key] = _build(wanted, value)  # type: ignore[arg-type]
            continue
        allowed = typing.get_args(wanted) or (wanted,)
        values[key] = float(value) if float in allowed and type(value) is int else value
        if type(values[key]) not in allowed:
            names = " or ".join(PLAIN_NAMES[one] for one in allowed if one in PLAIN_NAMES)
            raise ConfigError(f"recipe key {key} = {value!r}: should be {names}")
    return kind(**values)
