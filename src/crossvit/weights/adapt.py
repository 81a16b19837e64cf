"""Fitting weights to a model of another image size, channel count or set of classes. Everything else must fit as it is.

Shapes: n patches on a grid of rows x columns, D width, C channels; state dicts are under our names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.tokens import resample_positions

State = dict[str, Tensor]


def adapt_positions(
    state: State, own: Mapping[str, Tensor], config: CrossViTConfig, found: CrossViTConfig | None
) -> list[str]:
    """Resample each branch's position embeddings to the model's grid (bicubic; the class token's row stays as it is).

    found: the config that the weights were made with; without one their grid is taken to be a square.
    Changes `state` and returns a line for each branch; what cannot be resampled is left as it is.
    """
    notes = []
    for index, branch in enumerate(config.branches):
        name = f"tokens.{index}.positions"
        there, here = state[name], own[name]
        grid = branch.grid(config.image_size)
        before = (
            _grid(there, branch)
            if found is None or len(found.branches) <= index
            else _grid_of(found, index)
        )
        if found is None and there.shape == here.shape:
            before = grid
        if (
            before is None
            or before == grid
            or there.shape != (1, branch.class_token + math.prod(before), branch.dim)
        ):
            continue
        state[name] = resample_positions(there, before, grid)
        notes.append(
            f"positions of branch {index} resampled from {before[0]}x{before[1]} to {grid[0]}x{grid[1]} patches"
        )
    return notes


def adapt_channels(state: State, own: Mapping[str, Tensor], config: CrossViTConfig) -> list[str]:
    """Give each branch's first convolution the model's channel count. Changes `state` and returns a line a branch.

    The response to a picture whose channels are all alike stays what it was: more channels take the file's in turn,
    each divided by how often it is taken; fewer share the sum over the file's evenly.
    """
    notes = []
    for index in range(len(config.branches)):
        for name in (f"tokens.{index}.patches.weight", f"tokens.{index}.patches.0.weight"):
            there, here = state.get(name), own.get(name)
            if there is None or here is None or there.ndim != 4 or here.ndim != 4:
                continue
            (outward, inward, *kernel), (_, wanted, *_) = there.shape, here.shape
            if inward == wanted or here.shape != (outward, wanted, *kernel):
                continue
            state[name] = spread_channels(there, wanted)
            notes.append(
                f"first convolution of branch {index} adapted from {inward} channels to {wanted}"
            )
    return notes


def spread_channels(weight: Tensor, channels: int) -> Tensor:
    """(D, C, k, k) -> (D, channels, k, k) with the same sum over the channels."""
    inward = weight.shape[1]
    if channels < inward:
        return weight.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1).clone() / channels
    taken = torch.arange(channels) % inward
    return weight[:, taken] / torch.bincount(taken)[taken].to(weight.dtype)[:, None, None]


def new_head(
    state: State,
    own: Mapping[str, Tensor],
    *,
    found: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> list[str]:
    """The model's own classifier in place of the file's, but for the rows of classes with the same name.

    found, classes: the names of the file's and the model's classes in the order of their rows, None if not known.
    """
    heads = [name for name in own if name.startswith("heads.")]
    theirs, ours = (
        next(iter(rows[name] for name in heads if name in rows)).shape[0] for rows in (state, own)
    )
    row = {label: index for index, label in enumerate(found or ()) if index < theirs}
    kept = {
        index: row[label]
        for index, label in enumerate(classes or ())
        if label in row and index < ours
    }
    for name in heads:
        there, here = state[name], own[name].clone()
        if kept and there.shape[1:] == here.shape[1:]:
            here[list(kept)] = there[list(kept.values())].to(here.dtype)
        state[name] = here
    same = f"; {len(kept)} with the same name keep their rows" if kept else ""
    return [f"new classifier: {ours} classes in place of {theirs}{same}"]


def _grid_of(config: CrossViTConfig, index: int) -> tuple[int, int]:
    return config.branches[index].grid(config.image_size)


def _grid(positions: Tensor, branch: BranchConfig) -> tuple[int, int] | None:
    """The square grid of `positions`, if it is one."""
    patches = positions.shape[1] - branch.class_token if positions.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None
