"""Which model weights are of: what their file says, or the preset whose keys and shapes they have."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from crossvit.errors import ConfigError, WeightsError
from crossvit.model.config import CrossViTConfig
from crossvit.model.crossvit import CrossViT
from crossvit.model.presets import PRESETS
from crossvit.weights.files import Weights
from crossvit.weights.keys import layout_of, to_ours

POSITIONS = {"ours": "tokens.{}.positions", "timm": "pos_embed_{}", "authors": "pos_embed.{}"}
# timm arguments that change nothing here, or that the tensors themselves show
HARMLESS_TIMM_ARGUMENTS = {
    "num_classes", "in_chans", "img_size", "global_pool",
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip


def identify(weights: Weights) -> tuple[str | None, CrossViTConfig]:
    """(name of the preset, config) of the model that `weights` fill without any adaptation.

    The name is None for a config that is not a preset's. Raises WeightsError if they are of no model known here.
    """
    if weights.config is not None:
        _refuse_misfits(to_ours(weights.tensors, blank_state(weights.config)), weights.config)
        return weights.model if _is_of(weights.model, weights.config) else None, weights.config
    layout = layout_of(weights.tensors)
    _refuse_unusual_timm(weights)
    widths: list[int] = []
    while (positions := weights.tensors.get(POSITIONS[layout].format(len(widths)))) is not None:
        widths.append(positions.shape[-1] if positions.ndim else 0)
    candidates = [
        name
        for name, preset in PRESETS.items()
        if [branch.dim for branch in preset.config.branches] == widths
    ]
    fitting, misfit = [], ""
    for name in candidates:
        try:
            fitting.append((name, _fitted(weights, PRESETS[name].config)))
        except (WeightsError, ConfigError) as error:
            misfit = misfit or f" (it is not {name}: {error})"
    if not fitting:
        fix = "give the run folder, or a file written by `crossvit weights convert`, which say what they are"
        raise WeightsError(
            f"{weights.source} has the weights of no model known here{misfit}: {fix}"
        )
    return next(
        (found for found in fitting if PRESETS[found[0]].config.image_size == found[1].image_size),
        fitting[0],
    )


def blank_state(config: CrossViTConfig) -> dict[str, Tensor]:
    """The state dict of a model of `config`, with names and shapes and no numbers."""
    with torch.device("meta"):
        return CrossViT(config).state_dict()


def _fitted(weights: Weights, config: CrossViTConfig) -> CrossViTConfig:
    """`config` at the class count, channel count and image size of `weights`. WeightsError if anything else differs."""
    state = to_ours(weights.tensors, blank_state(config))
    stem = state.get("tokens.0.patches.weight", state.get("tokens.0.patches.0.weight"))
    config = dataclasses.replace(
        config,
        num_classes=state["heads.0.weight"].shape[0],
        in_channels=config.in_channels if stem is None or stem.ndim != 4 else stem.shape[1],
        image_size=_image_size(state, config, weights),
    )
    _refuse_misfits(state, config)
    return config


def _is_of(model: str | None, config: CrossViTConfig) -> bool:
    """Whether `model` names the preset that `config` is of, whatever its sizes."""
    if model not in PRESETS:
        return False
    own = PRESETS[model].config
    shapes = [
        [(branch.dim, branch.depth, branch.patch, branch.heads) for branch in one.branches]
        for one in (own, config)
    ]
    return shapes[0] == shapes[1] and own.stages == config.stages


def _refuse_misfits(state: dict[str, Tensor], config: CrossViTConfig) -> None:
    own = blank_state(config)
    misfits = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if state[name].shape != own[name].shape
    ]
    if misfits:
        raise WeightsError(f"the weights do not fit what they are said to be: {', '.join(misfits)}")


def _image_size(
    state: dict[str, Tensor], config: CrossViTConfig, weights: Weights
) -> tuple[int, int]:
    """The config's own size where the number of positions is its own; timm's where its config.json says one; else the
    square that has as many patches."""
    counts = [
        state[f"tokens.{index}.positions"].shape[1] - branch.class_token
        for index, branch in enumerate(config.branches)
    ]
    first = config.branches[0]
    side = round(math.isqrt(max(counts[0], 0)) * first.patch / first.image_scale)
    said = (weights.timm or {}).get("pretrained_cfg", {}).get("input_size")
    sizes = [config.image_size, (int(said[-2]), int(said[-1])) if said else None, (side, side)]
    if said and any(
        tuple(int(side * branch.image_scale) for side in sizes[1] or ())
        != branch.image_size(sizes[1] or (1, 1))
        for branch in config.branches
    ):
        raise WeightsError(
            f"timm gives the branches other image sizes at {sizes[1]} pixels than they have here"
        )
    for size in sizes:
        if (
            size
            and min(size) > 0
            and [math.prod(branch.grid(size)) for branch in config.branches] == counts
        ):
            return size
    raise WeightsError(f"{', '.join(map(str, counts))} positions are no square grids of patches")


def _refuse_unusual_timm(weights: Weights) -> None:
    """A timm folder whose model was built with arguments that the tensors do not show, such as other heads."""
    arguments = (weights.timm or {}).get("model_args", {})
    unusual = sorted(set(arguments) - HARMLESS_TIMM_ARGUMENTS)
    if unusual or arguments.get("global_pool", "token") != "token":
        given = ", ".join(f"{name}={arguments[name]!r}" for name in unusual or ["global_pool"])
        raise WeightsError(
            f"{weights.source} was built in timm with {given}, which does not say which preset it is"
        )
