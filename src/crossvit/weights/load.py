"""Putting a file's weights into a model."""

from __future__ import annotations

from pathlib import Path

from crossvit.errors import ConfigError, WeightsError
from crossvit.model.crossvit import CrossViT
from crossvit.weights.files import read_weights
from crossvit.weights.keys import layout_of, to_ours

HEADS = ("same", "new")


def classes_in(source: str | Path) -> int:
    """How many classes the classifier in a weight file has."""
    state = read_weights(source)
    head = state.get("heads.0.weight" if layout_of(state) == "ours" else "head.0.weight")
    return 0 if head is None else head.shape[0]


def load_weights(model: CrossViT, source: str | Path, *, head: str = "same") -> list[str]:
    """Fill `model` from a run folder, a safetensors file or a state dict, in our, timm's or the authors' keys.

    head: `same` takes the file's classifier too; `new` keeps the model's own.
    Returns what was adapted, a line each. Every key must fit: a missing, unused or misshapen one is a WeightsError that
    lists all of them, and the model is left as it was.
    """
    if head not in HEADS:
        raise ConfigError(f"head = {head!r}: should be one of {', '.join(HEADS)}")
    own = model.state_dict()
    state = to_ours(read_weights(source), own)
    misfits = {name: value for name, value in state.items() if value.shape != own[name].shape}
    notes = []
    if head == "new":
        theirs = state["heads.0.weight"].shape[0]
        state |= {name: own[name] for name in own if name.startswith("heads.")}
        misfits = {name: value for name, value in misfits.items() if not name.startswith("heads.")}
        notes.append(f"new classifier: {model.config.num_classes} classes in place of {theirs}")
    if misfits:
        shapes = ", ".join(f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}" for name, value in sorted(misfits.items()))
        resized = any(name.endswith("positions") for name in misfits)
        fix = "; give the image size that the weights were trained at (--image-size)" if resized else ""
        raise WeightsError(f"{source} does not fit the model: {shapes}{fix}")
    model.load_state_dict(state)
    return notes
