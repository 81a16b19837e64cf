"""From one layout of weights to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crossvit.errors import ConfigError, UsageError
from crossvit.model.config import CrossViTConfig
from crossvit.weights.files import SUFFIXES, header, read_weights, write_weights
from crossvit.weights.identify import blank_state, identify
from crossvit.weights.keys import LAYOUTS, layout_of, renamed, to_ours
from crossvit.weights.timm_folder import timm_arguments


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written: the preset's name if it has one, the layouts, the number of tensors and of parameters."""

    source: str
    destination: str
    model: str | None
    layout: str
    to: str
    tensors: int
    parameters: int


def convert_weights(
    source: str | Path, destination: str | Path, *, to: str, overwrite: bool = False
) -> Conversion:
    """Write the weights of `source` to the file `destination` under the keys of `to`: ours, timm or authors.

    The tensors keep every bit, so that there and back gives the same ones. `.safetensors` files say in their header
    which model they are of; a `.pth` file is a flat state dict, as the authors'.
    Raises WeightsError for weights of a model that the other layout cannot hold, UsageError if the file exists.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"to = {to!r}: should be one of {', '.join(LAYOUTS)}")
    path = Path(destination).expanduser()
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: the file to write should end in {' or '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: add --overwrite to replace it, or choose another name")
    weights = read_weights(source)
    name, config = identify(weights)
    if to != "ours":
        timm_arguments(config)  # refuses what timm and the authors cannot hold
    tensors = in_layout(weights.tensors, config, to)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path.parent} cannot be a folder ({error.strerror or error}): choose another name"
        ) from None
    write_weights(
        path,
        tensors,
        header(
            model=name, config=config, classes=weights.classes, preprocessing=weights.preprocessing
        ),
    )
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Conversion(
        str(source), str(path), name, layout_of(weights.tensors), to, len(tensors), parameters
    )


def in_layout(
    tensors: Mapping[str, Tensor], config: CrossViTConfig, layout: str
) -> dict[str, Tensor]:
    """`tensors`, of a model of `config` and in any layout, under the keys of `layout`."""
    state = to_ours(tensors, blank_state(config))
    theirs = renamed(state, layout)
    return {theirs[name]: tensor for name, tensor in state.items()}
