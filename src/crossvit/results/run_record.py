"""`RunRecord`: what run.json holds, checked once when it is read. Standard library only.

What a room defines (`recipe`, `given`, `config`, `preprocessing`) stays a mapping here, which that
room parses. Keys that this version does not know are kept and written back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crossvit.errors import RunError

SCHEMA = 1  # of run.json; raised when a field changes its meaning
SINGLE_LABEL, MULTI_LABEL = (  # tasks: one class an image, or any number of them
    "single-label",
    "multi-label",
)
UNKNOWN_SIZE = -1  # bytes of a held-out image, in runs that recorded names alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What a run was trained on.

    Attributes:
        location: DATA as it was given.
        fingerprint: Hash of the names and sizes of all images.
        train: Number of training images.
        held_out_part: val, test or held-out.
        held_out_n: Number of held-out images.
        held_out: Size in bytes of each held-out image by name; empty where the data has a part
            for them.
        notes: What was left out or skipped.
        warnings: What makes the score look better than it is.
        extra: Keys that this version does not know.
    """

    location: str
    fingerprint: str
    train: int
    held_out_part: str
    held_out_n: int
    held_out: Mapping[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """How a run ended.

    Attributes:
        top1: Accuracy on the held-out images, 0 to 1.
        n: Number of held-out images.
        loss: Mean cross-entropy on them, in nats.
        seconds: Time of training, without evaluation.
        map: Mean average precision, 0 to 1; None for single-label runs.
        selected_epoch: Epoch whose weights were taken as the best; None where the last ones were.
        extra: Keys that this version does not know.
    """

    top1: float
    n: int
    loss: float
    seconds: float
    map: float | None = None
    selected_epoch: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json: what was trained, how, on what, and what came of it.

    Attributes:
        schema: Version of the format.
        crossvit: Version of the package.
        model: Name of the preset, or `custom`.
        result: How the run ended; None while it has not.
        task: `single-label` or `multi-label`.
        classes: Name of each output.
        preprocessing: `Preprocessing.to_dict()`.
        precision: fp32, bf16 or fp16.
        device: cpu, cuda or mps.
        threads: Number of torch's threads.
        kernels: Whether native kernels computed; runs of before they were recorded did without.
        processes: Number of processes.
        versions: Versions of python, torch and numpy.
        recipe: `Recipe.to_dict()`, with what the images decided filled in.
        given: The recipe as it was requested; None in older runs.
        config: `CrossViTConfig.to_dict()`.
        data: What the run was trained on.
        temperature: Divisor of the logits that `evaluate --calibrate` stored; None before that.
        thresholds: Decision threshold of each class; None for single-label runs.
        extra: Keys that this version does not know.
    """

    schema: int = SCHEMA
    crossvit: str
    model: str
    result: ResultRecord | None
    task: str = SINGLE_LABEL
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    precision: str
    device: str
    threads: int
    kernels: bool = False
    processes: int = 1
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    given: Mapping[str, Any] | None = None
    config: Mapping[str, Any]
    data: DataRecord
    temperature: float | None = None
    thresholds: tuple[float, ...] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: object, *, path: str | Path = "run.json") -> RunRecord:
        """Check and convert what a run.json of this version or an older one holds.

        Args:
            values: The parsed JSON.
            path: The file, for the error.

        Returns:
            The record. What older versions did not write has its default.

        Raises:
            RunError: For a newer schema, missing keys and values of another kind.
        """
        try:
            if not isinstance(values, Mapping) or not isinstance(values.get("schema"), int):
                raise ValueError("no schema")
            if values["schema"] > SCHEMA:
                version = values.get("crossvit", "unknown")
                raise RunError(
                    f"{Path(path).parent} was made by a newer crossvit ({version}): "
                    "upgrade crossvit"
                )
            return cls(**_checked(cls, values))
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}): train again with --overwrite") from error

    def to_dict(self) -> dict[str, Any]:
        """What run.json holds, in its order; `from_dict` undoes it."""
        return _plain(self)


def _checked(kind: type[Any], values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Fields of the dataclass `kind` from JSON.

    Raises:
        ValueError: Names what is missing or of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "extra"}
    missing = [
        prefix + name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    checked: dict[str, Any] = {
        name: _CONVERTERS[str(field.type)](values[name], prefix + name)
        for name, field in fields.items()
        if name in values
    }
    return checked | {"extra": {name: values[name] for name in values if name not in fields}}


def _plain(record: Any) -> dict[str, Any]:
    """A record as JSON has it: without optional fields that are not set, unknown keys last."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = _plain(value)
        elif field.name == "result" or (field.name != "extra" and value is not None):
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain | dict(record.extra)


def _of_type(*types: type, item: type | tuple[type, ...] | None = None) -> Callable[..., Any]:
    """A converter that accepts values of `types`; in a list or object, items of type `item`."""

    def convert(value: Any, name: str) -> Any:
        items = value.values() if isinstance(value, Mapping) else value
        whole = type(value) in types and (item is None or all(isinstance(x, item) for x in items))
        if not whole:
            raise ValueError(f"{name} is {str(value)[:40]!r}")
        return tuple(value) if isinstance(value, list) else value

    return convert


def _held_out(value: Any, name: str) -> Mapping[str, int]:
    """Sizes by name; the first runs recorded a list of names."""
    names_alone = isinstance(value, list) and all(isinstance(image, str) for image in value)
    return (
        dict.fromkeys(value, UNKNOWN_SIZE) if names_alone else _of_type(dict, item=int)(value, name)
    )


def _nested(kind: type[Any]) -> Callable[..., Any]:
    def convert(value: Any, name: str) -> Any:
        return kind(**_checked(kind, _of_type(dict)(value, name), prefix=f"{name}."))

    return convert


def _optional(convert: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, name: None if value is None else convert(value, name)


_CONVERTERS: dict[str, Callable[..., Any]] = {  # by the annotation of a field
    "str": _of_type(str),
    "bool": _of_type(bool),
    "int": _of_type(int),
    "float": _of_type(float, int),
    "int | None": _optional(_of_type(int)),
    "float | None": _optional(_of_type(float, int)),
    "tuple[str, ...]": _of_type(list, item=str),
    "tuple[float, ...] | None": _optional(_of_type(list, item=(float, int))),
    "Mapping[str, str]": _of_type(dict, item=str),
    "Mapping[str, int]": _held_out,
    "Mapping[str, Any]": _of_type(dict),
    "Mapping[str, Any] | None": _optional(_of_type(dict)),
    "DataRecord": _nested(DataRecord),
    "ResultRecord | None": _optional(_nested(ResultRecord)),
}
