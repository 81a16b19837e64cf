"""Reading and writing weight files. Nothing in a file is ever run: safetensors, or a pickle with `weights_only=True`.

What a file is beyond its tensors (the model's config, its classes, its preprocessing) is in the header of the safetensors
files written here, in a run's `run.json`, or in part in the `config.json` of a timm folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from crossvit.errors import ConfigError, UnknownPartError, UsageError, WeightsError
from crossvit.files import write_atomically
from crossvit.model.config import CrossViTConfig
from crossvit.weights.hub import locate
from crossvit.weights.sniff import kind_of

WEIGHTS_NAME = "model.safetensors"  # in a run folder, and in a folder of timm's
TIMM_NAME = "pytorch_model.bin"  # in a folder that timm saved without safetensors
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
        return 0 if head is None else head.shape[0]  # no tensor of a file is 0-dimensional


def weight_file(source: str | Path) -> Path:
    """The file meant by a run folder, a timm folder, a path, a URL or a name on the hub (which are fetched).

    UsageError if there is none.
    """
    path = locate(source)
    if (path / "run.json").is_file() and not (path / WEIGHTS_NAME).is_file():
        raise UsageError(f"the run {path} has no weights yet: let it finish with --resume")
    if path.is_dir():
        path = next(
            (path / name for name in (WEIGHTS_NAME, TIMM_NAME) if (path / name).is_file()),
            path / WEIGHTS_NAME,
        )
    if not path.is_file():
        raise UsageError(f"no weights at {path}: give a run folder, a .safetensors or a .pth file")
    return path


def read_weights(source: str | Path) -> Weights:
    """The weights of a run folder, a timm folder, a `.safetensors` file or a `.pth`/`.pt` state dict (flat, or under
    `model`), from here, a URL or the hub.

    UsageError if there is no such file; WeightsError if it is damaged or holds something other than tensors.
    """
    path = weight_file(source)
    if kind_of(path) == "safetensors":
        tensors, described = _read_safetensors(path)
    else:
        tensors, described = _read_torch(path), {}
    _refuse_odd_tensors(path, tensors)
    return _described(
        Weights(str(source), path, tensors), described or _read_beside(path, "run.json")
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
            described = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise WeightsError(
            f"{path} cannot be read as weights ({error}): fetch or save it again"
        ) from error
    return tensors, described if isinstance(described, dict) else {}


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file, flat or under `model`. Of what is not tensors only the options of a training script
    are let in (an argparse.Namespace, as the authors' checkpoints have); nothing is run."""
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
            path.open("rb") as file,
        ):
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make the unpickler fail in any way
        refused = (
            re.search(r"GLOBAL ([\w.]+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        why = (
            f"it holds {refused[1]}, which is not plain tensors; nothing of it was run"
            if refused
            else "not a file of tensors"
        )
        raise WeightsError(
            f"{path} cannot be read as weights ({why}): fetch or save it again"
        ) from error
    state = found.get("model", found) if isinstance(found, dict) else found
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise WeightsError(
            f"{path} is not a state dict: it should map names to tensors, flat or under 'model'"
        )
    return state


def _refuse_odd_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """WeightsError for what no parameter is: names that are not text, and tensors without numbers of their own."""
    for name, value in tensors.items():
        plain = (
            isinstance(name, str)
            and value.layout == torch.strided
            and not value.is_nested
            and value.device.type == "cpu"
        )
        own = (
            plain
            and not value.is_quantized
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        )
        if not own or value.numel() == 0 or value.ndim == 0:
            raise WeightsError(
                f"{path} cannot be read as weights ({name!r} is not a plain tensor): fetch or save it again"
            )


def header(
    *,
    model: str | None,
    config: CrossViTConfig,
    classes: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
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
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if path.suffix == ".safetensors":
        content = to_safetensors(
            plain, metadata={"format": "pt", HEADER: json.dumps(described, allow_nan=False)}
        )
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
            model=record["model"] if isinstance(record.get("model"), str) else None,
            config=_config(record["config"], len(weights.tensors)) if "config" in record else None,
            classes=_classes(record["classes"], weights.num_classes)
            if record.get("classes")
            else None,
            preprocessing=_preprocessing(record["preprocessing"])
            if record.get("preprocessing")
            else None,
        )
    except UnknownPartError:
        raise
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = error if isinstance(error, ConfigError | ValueError) else type(error).__name__
        raise WeightsError(
            f"what {weights.path} says of its model is damaged ({reason}): fetch or save it again"
        ) from error


def _config(record: Any, tensors: int) -> CrossViTConfig:
    """The config of a header; a model of more blocks than there are tensors is not even begun."""
    config = CrossViTConfig.from_dict(record)
    if (
        config.stages * max(1, *(branch.depth for branch in config.branches)) * config.fusion_depth
        > tensors
    ):
        raise ConfigError(f"stages = {config.stages}: there are {tensors} tensors")
    return config


def _classes(labels: Any, rows: int) -> tuple[str, ...]:
    if (
        not isinstance(labels, list)
        or not all(isinstance(label, str) for label in labels)
        or len(labels) != rows
    ):
        raise ConfigError(f"classes: should be {rows} names")
    return tuple(labels)


def _preprocessing(record: Any) -> dict[str, Any]:
    return {
        "image_size": [int(side) for side in record["image_size"]],
        "crop": None if record["crop"] is None else float(record["crop"]),
        "mean": [float(value) for value in record["mean"]],
        "std": [float(value) for value in record["std"]],
        "channels": int(record.get("channels", 0)),
    }


def _described_by_timm(weights: Weights) -> Weights:
    """`weights` with the class names and preprocessing of the config.json of a timm folder, if they lie in one."""
    record = _read_beside(weights.path, "config.json")
    if "architecture" not in record:
        return weights
    labels, said = record.get("label_names"), record.get("pretrained_cfg")
    try:
        preprocessing = None
        if isinstance(said, dict):
            crop = None if said.get("crop_mode") == "squash" else said["crop_pct"]
            preprocessing = _preprocessing(
                {**said, "image_size": said["input_size"][-2:], "crop": crop}
            )
        classes = (
            _classes(labels, weights.num_classes) if labels and isinstance(labels, list) else None
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        beside = weights.path.with_name("config.json")
        raise WeightsError(
            f"{beside} is damaged ({type(error).__name__}: {error}): fetch or save it again"
        ) from None
    return dataclasses.replace(weights, timm=record, classes=classes, preprocessing=preprocessing)


def _read_beside(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `path`; empty if there is none."""
    beside = path.with_name(name)
    if path.name not in (WEIGHTS_NAME, TIMM_NAME) or not beside.is_file():
        return {}
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{beside} is damaged ({error}): fetch or save it again") from None
    return record if isinstance(record, dict) else {}
