"""Reading and writing weight files. Nothing in a file is ever run: safetensors, or a pickle with `weights_only=True`.

What a file is beyond its tensors (the model's config, its classes, its preprocessing) is in the header of the safetensors
files written here, in a run's `run.json`, or in part in the `config.json` of a timm folder.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from crossvit.errors import ConfigError, UsageError, WeightsError
from crossvit.model.config import CrossViTConfig
from crossvit.run import write_atomically
from crossvit.weights.hub import locate

WEIGHTS_NAME = "model.safetensors"  # in a run folder, and in a folder of timm's
HEADER = "crossvit"  # the entry of a safetensors file's metadata
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file, under the file's own names, and what is known of them.

    source: what was asked for.  path: the file.  model: the name of a preset.  preprocessing: as in run.json.
    timm: a timm folder's config.json, as it is.  Whatever is not known is None.
    """

    source: str
    path: Path
    tensors: dict[str, Tensor]
    model: str | None = None
    config: CrossViTConfig | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: dict[str, Any] | None = None
    timm: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """Rows of the classifier; 0 if there is none."""
        head = self.tensors.get("heads.0.weight", self.tensors.get("head.0.weight"))
        return 0 if head is None else head.shape[0]


def weight_file(source: str | Path) -> Path:
    """The file meant by a run folder, a timm folder, a path, a URL or a name on the hub (which are fetched).

    UsageError if there is none.
    """
    path = locate(source)
    if (path / "run.json").is_file() and not (path / WEIGHTS_NAME).is_file():
        raise UsageError(f"the run {path} has no weights yet: let it finish with --resume")
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise UsageError(f"no weights at {path}: give a run folder, a .safetensors or a .pth file")
    return path


def read_weights(source: str | Path) -> Weights:
    """The weights of a run folder, a timm folder, a `.safetensors` file or a `.pth`/`.pt` state dict (flat, or under
    `model`), from here, a URL or the hub.

    UsageError if there is no such file; WeightsError if it is damaged or holds something other than tensors.
    """
    path = weight_file(source)
    described: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
                described = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make the unpickler fail in any way
        known = isinstance(error, SafetensorError | pickle.UnpicklingError | RuntimeError | OSError)
        reason = str(error).strip().splitlines()[0] if known and str(error).strip() else "not a file of tensors"
        raise WeightsError(f"{path} cannot be read as weights ({reason}): fetch or save it again") from error
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} is not a state dict: it should map names to tensors, flat or under 'model'")
    return _described(Weights(str(source), path, tensors), described or _read_beside(path, "run.json"))


def header(
    *, model: str | None, config: CrossViTConfig, classes: Sequence[str] | None, preprocessing: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is written into a safetensors file beside its tensors, as JSON takes it."""
    record = {
        "model": model,
        "config": config.to_dict(),
        "classes": list(classes) if classes else None,
        "preprocessing": dict(preprocessing) if preprocessing else None,
    }
    return {key: value for key, value in record.items() if value is not None}


def write_weights(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write `tensors`, whole or not at all: a safetensors file with `described` in it, or a flat state dict for `.pth`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        content = to_safetensors(plain, metadata={"format": "pt", HEADER: json.dumps(described, allow_nan=False)})
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        content = buffer.getvalue()
    write_atomically(path, content)


def _described(weights: Weights, record: dict[str, Any]) -> Weights:
    if not record:
        return _described_by_timm(weights)
    try:
        return dataclasses.replace(
            weights,
            model=record.get("model"),
            config=CrossViTConfig.from_dict(record["config"]) if "config" in record else None,
            classes=tuple(map(str, record["classes"])) if record.get("classes") else None,
            preprocessing=record.get("preprocessing"),
        )
    except (ConfigError, TypeError, AttributeError) as error:
        raise WeightsError(f"what {weights.path} says of its model is damaged ({error}): fetch or save it again") from error


def _described_by_timm(weights: Weights) -> Weights:
    """`weights` with the class names and preprocessing of the config.json of a timm folder, if they lie in one."""
    record = _read_beside(weights.path, "config.json")
    if "architecture" not in record:
        return weights
    labels, said = record.get("label_names"), record.get("pretrained_cfg")
    try:
        preprocessing = None
        if isinstance(said, dict):
            preprocessing = {
                "image_size": [int(side) for side in said["input_size"][-2:]],
                "crop": None if said.get("crop_mode") == "squash" else float(said["crop_pct"]),
                "mean": [float(value) for value in said["mean"]],
                "std": [float(value) for value in said["std"]],
            }
        classes = tuple(map(str, labels)) if isinstance(labels, list) else None
    except (KeyError, TypeError, ValueError) as error:
        beside = weights.path.with_name("config.json")
        raise WeightsError(f"{beside} is damaged ({type(error).__name__}: {error}): fetch or save it again") from None
    return dataclasses.replace(weights, timm=record, classes=classes, preprocessing=preprocessing)


def _read_beside(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `path`; empty if there is none."""
    beside = path.with_name(name)
    if path.name != WEIGHTS_NAME or not beside.is_file():
        return {}
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{beside} is damaged ({error}): fetch or save it again") from None
    return record if isinstance(record, dict) else {}
