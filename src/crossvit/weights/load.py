"""Putting a file's weights into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from crossvit.errors import ConfigError, WeightsError
from crossvit.model.config import CrossViTConfig
from crossvit.model.crossvit import CrossViT
from crossvit.weights.adapt import adapt_channels, adapt_positions, new_head
from crossvit.weights.files import Weights, read_weights
from crossvit.weights.identify import identify
from crossvit.weights.keys import to_ours

HEADS = ("same", "new")


def load_weights(
    model: CrossViT,
    source: str | Path | Weights,
    *,
    head: str = "same",
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Fill `model` from weights in our, timm's or the authors' keys, told apart by the keys.

    Position embeddings are resampled to the model's grid, first convolutions adapted to its number
    of channels; everything else must fit. A model on the meta device is moved to the CPU.

    Args:
        model: Is changed in place; left as it was where the weights do not fit.
        source: A run folder, a safetensors file, a state dict (`.pth`, flat or under `model`), an
            https:// address, a released model's name or `owner/name` on the hub (see `weights.hub`).
        head: `same` takes the file's classifier, which must have the model's number of classes;
            `new` keeps the model's, but for the rows of classes with the same name.
        classes: Names of the model's classes, for `new`.

    Returns:
        What was adapted, a line each.

    Raises:
        ConfigError: For another `head`.
        WeightsError: Lists every missing, unused or misshapen key.
    """
    if head not in HEADS:
        raise ConfigError(f"head = {head!r}: should be one of {', '.join(HEADS)}")
    weights = source if isinstance(source, Weights) else read_weights(source)
    own = model.state_dict()
    try:
        state = to_ours(weights.tensors, own)
    except WeightsError as error:
        raise WeightsError(f"{weights.source}: {error}") from None
    found = weights.config
    if found is not None:
        _refuse_other_function(found, model.config, weights.source)
    elif weights.timm is not None:
        _, found = identify(weights)
    notes = adapt_positions(state, own, model.config, found)
    notes += adapt_channels(state, own, model.config)
    if head == "new":
        notes += new_head(state, own, found=weights.classes, classes=classes)
    elif classes is not None and weights.classes is not None and tuple(classes) != weights.classes:
        raise WeightsError(f"{weights.source} has a classifier for other classes: add head='new'")
    _refuse_misfits(state, own, weights.source)
    notes += sorted(
        {
            f"{value.dtype} weights loaded as {own[name].dtype}"
            for name, value in state.items()
            if value.dtype != own[name].dtype
        }
    )
    if not all(bool(value.isfinite().all()) for value in state.values()):
        notes.append(f"{weights.source} has numbers that are not finite")
    if any(value.is_meta for value in own.values()):
        # Copies, since tensors read from a safetensors file lie in the file. `to_empty` would import sympy, 0.4 s.
        copies = {name: value.to(own[name].dtype, copy=True) for name, value in state.items()}
        model.load_state_dict(copies, assign=True)
    else:
        model.load_state_dict(state)
    return notes


def _refuse_other_function(found: CrossViTConfig, own: CrossViTConfig, source: str) -> None:
    """WeightsError for weights whose shapes fit and which were made for another function: other heads, other f and g."""
    unlike = [
        f"{name} {there!r} for {here!r}"
        for name in ("as_released", "projection_norm", "projection_gelu")
        if (there := getattr(found, name)) != (here := getattr(own, name))
        if name != "as_released" or own.fusion_depth > 1
    ]
    for index, (there, here) in enumerate(zip(found.branches, own.branches, strict=False)):
        unlike += [f"branches[{index}].heads {there.heads} for {here.heads}"] * (
            there.heads != here.heads
        )
    if unlike:
        raise WeightsError(f"{source} was made for another model: {', '.join(unlike)}")


def _refuse_misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    misfits = {
        name: value
        for name, value in state.items()
        if value.shape != own[name].shape
        or not (value.is_floating_point() and own[name].is_floating_point())
    }
    if not misfits:
        return
    shapes = ", ".join(
        f"{name} {_kind(value)} for {_kind(own[name])}" for name, value in sorted(misfits.items())
    )
    fixes = []
    if any(name.startswith("heads.") for name in misfits):
        fixes.append("head='new' makes a classifier for other classes")
    if any(name.endswith(".positions") for name in misfits):
        fixes.append(
            "positions are resampled from a square grid, or from any grid where the file comes with its config"
        )
    raise WeightsError(
        f"{source} does not fit the model: {shapes}{''.join(f'; {fix}' for fix in fixes)}"
    )


def _kind(value: Tensor) -> str:
    return (
        str(tuple(value.shape))
        if value.is_floating_point()
        else f"{value.dtype} {tuple(value.shape)}"
    )
