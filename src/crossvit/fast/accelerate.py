"""Which class computes each module of a model: the plain one, or its fused subclass."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from crossvit.fast import (
    checkpointing,
    cross_attention,
    patch_embed,
    self_attention,
    sublayers,
    t2t,
)
from crossvit.fast.eligibility import FUSED

FORMS = (checkpointing, cross_attention, patch_embed, self_attention, sublayers, t2t)
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let every module of `model` that is exactly a plain one be computed by its fused subclass.

    The class alone is exchanged, as torch does for parametrisations: parameters, names, hooks,
    optimisers and copies hold. A fused module decides at each call whether it computes, by
    `crossvit.fast.eligibility`, and leaves the work to the plain class otherwise. Modules of
    another class, subclasses too, are left as they are.

    Args:
        model: Changed in place.

    Returns:
        `model`.
    """
    for module in model.modules():
        fused = FUSED.get(type(module))
        if fused is not None:
            module.__class__ = fused
    return model


def decelerate(model: Model) -> Model:
    """Undo `accelerate`: every module of `model` is of its plain class again, in place."""
    plain = {fused: kind for kind, fused in FUSED.items()}
    for module in model.modules():
        kind = plain.get(type(module))
        if kind is not None:
            module.__class__ = kind
    return model
