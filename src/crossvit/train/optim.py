"""The optimiser's parameter groups, and its learning rate as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from crossvit.errors import ConfigError, nearest_names
from crossvit.model.config import CrossViTConfig
from crossvit.train.durations import STEP_UNITS, parse_duration
from crossvit.train.recipe import OptimiserRecipe

UNDECAYED = ("class_token", "positions")
_PLACES = (
    re.compile(r"tokens\.(?P<branch>\d+)\."),
    re.compile(r"encoders\.(?P<stage>\d+)\.blocks\.(?P<branch>\d+)\.(?P<block>\d+)\."),
    re.compile(r"encoders\.(?P<stage>\d+)\.fusion\.(?:reads|project|restore)\.(?P<branch>\d+)\."),
    re.compile(
        r"encoders\.(?P<stage>\d+)\.fusion\."
    ),  # what the branches share: all-attention's own blocks
    re.compile(r"(?:norms|heads)\.(?P<branch>\d+)\."),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter is. branch: the one that is written, the widest for what the branches share.  above: blocks of that
    branch from the parameter's own up to its final norm (0 for the norm and the head).
    part: tokens, blocks, fusion, norms or heads."""

    branch: int
    above: int
    part: str


def place_of(name: str, config: CrossViTConfig) -> Place:
    """The place of parameter `name` in a model of `config`."""
    match = next(found for pattern in _PLACES if (found := pattern.match(name)))
    at = {key: int(value) for key, value in match.groupdict().items()}
    widths = [branch.dim for branch in config.branches]
    branch = at.get("branch", len(widths) - 1 - widths[::-1].index(max(widths)))
    depth = config.branches[branch].depth
    part = "fusion" if ".fusion." in name else "blocks" if "block" in at else name.split(".", 1)[0]
    if part == "tokens":
        return Place(branch, config.stages * depth + 1, part)
    if "stage" not in at:
        return Place(branch, 0, part)
    # a fusion stands with the last block of its encoder
    return Place(
        branch,
        config.stages * depth - (at["stage"] * depth + at.get("block", max(depth - 1, 0))),
        part,
    )


def freeze(model: nn.Module, config: CrossViTConfig, parts: Sequence[str]) -> None:
    """Take `parts` (see recipe.PARTS) out of training. `branchN` is its tokens, blocks and norm; `backbone` all but the heads.

    ConfigError if nothing would be left, or for a branch that the model has not."""
    for part in parts:
        if part.startswith("branch") and int(part.removeprefix("branch")) >= len(config.branches):
            raise ConfigError(
                f"freeze = {part!r}: the model has {len(config.branches)} branches, counted from branch0"
            )
    for name, parameter in model.named_parameters():
        place = place_of(name, config)
        own = {place.part}
        own |= {"backbone"} if place.part != "heads" else set()
        own |= {f"branch{place.branch}"} if place.part in ("tokens", "blocks", "norms") else set()
        parameter.requires_grad_(not own & set(parts))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze = {', '.join(parts)}: nothing would be left to train")


def parameter_groups(
    model: nn.Module, config: CrossViTConfig, recipe: OptimiserRecipe
) -> list[dict[str, Any]]:
    """Groups of trained parameters that share a weight decay and a factor on the rate, `lr_scale`.

    Matrices and kernels are decayed; norms, biases, class tokens and positions are not (`decay_like_authors` decays the
    last two). The factor is layer_decay^above x the branch's x the fusion's (see `Place`).
    """
    if recipe.branch_lr and len(recipe.branch_lr) != len(config.branches):
        raise ConfigError(
            f"branch_lr = {recipe.branch_lr}: should have one factor for each of {len(config.branches)} branches"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        place = place_of(name, config)
        scale = recipe.layer_decay**place.above
        if place.part == "fusion":
            scale *= recipe.fusion_lr
        elif recipe.branch_lr:
            scale *= recipe.branch_lr[place.branch]
        embedding = name.rsplit(".", 1)[-1] in UNDECAYED
        plain = parameter.ndim <= 1 or (embedding and not recipe.decay_like_authors)
        groups.setdefault((0.0 if plain else recipe.weight_decay, scale), []).append(parameter)
    if groups and not any(scale for _, scale in groups):
        raise ConfigError(
            f"branch_lr = {recipe.branch_lr}, fusion_lr = {recipe.fusion_lr:g}: nothing would be left to train with a rate of 0"
        )
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), params in groups.items()
    ]


def make_optimiser(
    model: nn.Module, config: CrossViTConfig, recipe: OptimiserRecipe
) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`: torch's fused AdamW and SGD, any other from timm.

    ConfigError for a name that timm has not, one that needs second derivatives, which a step here does not take, and one whose
    GPU or package is not here.
    """
    groups = parameter_groups(model, config, recipe)
    match recipe.optimiser.lower():
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers  # type: ignore[attr-defined]

    name = recipe.optimiser.lower()
    known = [str(one) for one in list_optimizers()]
    if name not in known:
        nearest = nearest_names(name, known) or ["adamw", "sgd", "lamb", "lion", "muon"]
        raise ConfigError(
            f"optimiser = {recipe.optimiser!r}: timm has none of that name; did you mean {' or '.join(nearest)}?"
        )
    if get_optimizer_info(name).second_order:
        raise ConfigError(
            f"optimiser = {recipe.optimiser!r}: needs second derivatives, which are not computed: take adamw"
        )
    try:
        optimiser: torch.optim.Optimizer = create_optimizer_v2(
            groups,
            opt=name,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
    except (
        AssertionError,
        ImportError,
        RuntimeError,
    ) as error:  # timm asserts what an optimiser needs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"optimiser = {recipe.optimiser!r}: cannot be used here ({reason}): take adamw"
        ) from error
    return optimiser


def learning_rate(step: int, *, steps: int, per_epoch: int, recipe: OptimiserRecipe) -> float:
    """The rate of step `step` of `steps`, before the groups' factors: linear from `warmup_lr` over the first w steps, with
    lr reached at step w, then half a cosine from `lr` to `final_lr` at the last step.

    At step s < w it is warmup_lr + (lr − warmup_lr)·(s + 1)/(w + 1).
    """
    warm = min(
        parse_duration(recipe.warmup, name="warmup", units=STEP_UNITS).steps(
            per_epoch=per_epoch, total=steps
        ),
        steps,
    )
    if step < warm:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * (step + 1) / (warm + 1)
    share = (step - warm) / max(steps - 1 - warm, 1)
    final = min(recipe.final_lr, recipe.lr)
    return final + 0.5 * (recipe.lr - final) * (1 + math.cos(math.pi * min(share, 1.0)))
