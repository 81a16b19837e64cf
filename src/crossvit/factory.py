"""Model and weights in one call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crossvit.errors import unknown_name
from crossvit.model.config import CrossViTConfig
from crossvit.model.crossvit import CrossViT
from crossvit.model.presets import preset
from crossvit.weights.load import load_weights


def create_model(
    name_or_config: str | CrossViTConfig,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | Path | None = None,
    head: str = "same",
    **changes: Any,
) -> CrossViT:
    """A CrossViT by name (see `list_models`) or from a config.

    num_classes, in_channels, image_size (pixels, an int or (height, width)) and any other field of `CrossViTConfig`
    replace the config's own (1000 classes and 3 channels for a name). `weights` and `head` are as `load_weights` takes them: a
    path, an address or a name on the hub, and `head="new"` for classes other than the weights'.
    Raises UnknownNameError for a name or field that is not known, ConfigError for a value that cannot work.
    """
    config = model_config(name_or_config, num_classes=num_classes, in_channels=in_channels, image_size=image_size, **changes)
    model = CrossViT(config)
    if weights is not None:
        load_weights(model, weights, head=head)
    return model


def model_config(name_or_config: str | CrossViTConfig, **changes: Any) -> CrossViTConfig:
    """The config of `create_model`, without building the model. A change that is None is left out."""
    config = preset(name_or_config).config if isinstance(name_or_config, str) else name_or_config
    fields = [field.name for field in dataclasses.fields(config)]
    for field in changes:
        if field not in fields:
            raise unknown_name("model field", field, fields)
    return dataclasses.replace(config, **{field: value for field, value in changes.items() if value is not None})
