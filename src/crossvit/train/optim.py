"""The optimiser's parameter groups, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from crossvit.train.recipe import OptimiserRecipe

UNDECAYED = ("class_token", "positions")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels, which are decayed; norms, biases, class tokens and positions, which are not."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in UNDECAYED
        (undecayed if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def make_optimiser(model: nn.Module, recipe: OptimiserRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, fused=True)


def learning_rate(step: int, *, steps: int, recipe: OptimiserRecipe) -> float:
    """The rate of step `step` of `steps`: linear from lr/(w+1) over the first w = warmup·steps, then half a cosine from
    `lr` to `final_lr` at the last step."""
    warm = round(recipe.warmup * steps)
    if step < warm:
        return recipe.lr * (step + 1) / (warm + 1)
    share = (step - warm) / max(steps - 1 - warm, 1)
    final = min(recipe.final_lr, recipe.lr)
    return final + 0.5 * (recipe.lr - final) * (1 + math.cos(math.pi * min(share, 1.0)))
