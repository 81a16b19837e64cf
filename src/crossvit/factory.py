"""Model and weights in one call."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from crossvit.errors import ConfigError, unknown_name
from crossvit.fast.accelerate import accelerate
from crossvit.model.config import CrossViTConfig
from crossvit.model.crossvit import CrossViT
from crossvit.model.presets import preset
from crossvit.weights.load import HEADS, load_weights


def create_model(
    name_or_config: str | CrossViTConfig,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | Path | None = None,
    head: str = "same",
    accelerated: bool = True,
    **changes: Any,
) -> CrossViT:
    """A CrossViT by name or from a config.

    Args:
        name_or_config: A name from `list_models`, or a `CrossViTConfig`.
        num_classes: In place of the config's own (1000 for a name).
        in_channels: In place of the config's own (3 for a name).
        image_size: In pixels, an int or (height, width), in place of the config's own.
        weights: A path, an address or a name on the hub, as `load_weights` takes it; what had to
            be adapted is logged.
        head: `same`, or `new` for classes other than the weights'.
        accelerated: Whether modules are computed by their faster forms where these hold (see
            `crossvit.fast.accelerate`). Without, it is the paper in plain PyTorch, as
            `CrossViT(config)` is. Parameters and names are the same.
        **changes: Any other field of `CrossViTConfig`.

    Raises:
        UnknownNameError: For a name or field that is not known.
        ConfigError: For a value that cannot work.
    """
    config = model_config(
        name_or_config,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        **changes,
    )
    model = accelerate(CrossViT(config)) if accelerated else CrossViT(config)
    if head not in HEADS:
        raise ConfigError(f"head = {head!r}: should be one of {', '.join(HEADS)}")
    if weights is not None:
        for note in load_weights(model, weights, head=head):
            logging.getLogger("crossvit").warning("%s", note)
    return model


def model_config(name_or_config: str | CrossViTConfig, **changes: Any) -> CrossViTConfig:
    """The config of `create_model`, without building the model. A change that is None is left out."""
    config = preset(name_or_config).config if isinstance(name_or_config, str) else name_or_config
    if not isinstance(config, CrossViTConfig):
        raise ConfigError(
            f"name_or_config = {name_or_config!r}: should be a name from list_models() or a CrossViTConfig"
        )
    fields = [field.name for field in dataclasses.fields(config)]
    for field in changes:
        if field not in fields:
            raise unknown_name("model field", field, fields)
    return dataclasses.replace(
        config, **{field: value for field, value in changes.items() if value is not None}
    )
