"""The cost of a model in closed form: exact parameters and multiply–accumulates, part by part.

Counted as the paper counts (docs/paper.md, Models): matrix products and convolutions of one image,
the two products of attention included; no bias, normalisation, activation or interpolation.
`keys_values` says how cross-attention is computed: `materialised` is the form of the paper and its
tables, `lazy` the one of `crossvit.fast.cross_attention`.
"""

from __future__ import annotations

import dataclasses

from crossvit.errors import ConfigError
from crossvit.model.config import KEYS_VALUES, T2T_DIM, BranchConfig, CrossViTConfig
from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS

PARTS = ("tokens", "positions", "encoders", "fusion", "heads")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters and multiply–accumulates of one part; costs of parts can be added."""

    parameters: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.parameters * times, self.macs * times)


NOTHING = Cost()


def cost(config: CrossViTConfig, *, keys_values: str | None = None) -> dict[str, Cost]:
    """Parameters and multiply–accumulates of a model for one image of `config.image_size`.

    Args:
        config: The model.
        keys_values: `lazy` or `materialised` counts that form of cross-attention; None the one
            that the config names.

    Returns:
        The cost of each part (tokens, positions, encoders, fusion, heads) and `total`.

    Raises:
        ConfigError: For a block, fusion or tokeniser that is not built in: its cost is unknown.
    """
    for registry, names in (
        (BLOCKS, [config.block]),
        (FUSIONS, [config.fusion]),
        (TOKENISERS, [branch.tokeniser for branch in config.branches]),
    ):
        for name in names:
            if name not in registry.built_in:
                raise ConfigError(
                    f"{registry.kind} {name!r} is not built in: its cost is not known"
                )
    parts = dict.fromkeys(PARTS, NOTHING)
    for branch in config.branches:
        tokens = _tokens(branch, config)
        parts["tokens"] += _stem(branch, config) + Cost(branch.class_token * branch.dim)
        parts["positions"] += Cost(tokens * branch.dim)
        parts["encoders"] += _block(branch, tokens) * (config.stages * branch.depth)
        parts["heads"] += _norm(branch.dim) + _linear(branch.dim, config.num_classes, rows=1)
    if keys_values not in (None, *KEYS_VALUES):
        raise ConfigError(
            f"keys_values = {keys_values!r}: should be one of {', '.join(KEYS_VALUES)}"
        )
    parts["fusion"] = _fusion(config, keys_values or config.keys_values) * config.stages
    parts["total"] = sum(parts.values(), NOTHING)
    return parts


def _tokens(branch: BranchConfig, config: CrossViTConfig) -> int:
    rows, columns = branch.grid(config.image_size)
    return branch.class_token + rows * columns


def _linear(dim: int, out: int, *, rows: int) -> Cost:
    return Cost(dim * out + out, rows * dim * out)


def _norm(dim: int) -> Cost:
    return Cost(2 * dim)


def _self_attention(dim: int, tokens: int) -> Cost:
    """Query, key, value and output projections, q kᵀ and its product with v."""
    products = Cost(0, 2 * tokens * tokens * dim)
    return _linear(dim, 3 * dim, rows=tokens) + products + _linear(dim, dim, rows=tokens)


def _block(branch: BranchConfig, tokens: int) -> Cost:
    mlp = _linear(branch.dim, branch.mlp_dim, rows=tokens) + _linear(
        branch.mlp_dim, branch.dim, rows=tokens
    )
    return _norm(branch.dim) * 2 + _self_attention(branch.dim, tokens) + mlp


def _stem(branch: BranchConfig, config: CrossViTConfig) -> Cost:
    height, width = branch.image_size(config.image_size)
    total = NOTHING
    for convolution in branch.stem(config.in_channels):
        height, width = convolution.output_side(height), convolution.output_side(width)
        total += _linear(
            convolution.in_channels * convolution.kernel**2,
            convolution.out_channels,
            rows=height * width,
        )
    channels = config.in_channels
    splits = branch.soft_splits()
    for index, (kernel, stride, padding) in enumerate(splits):
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        window, rows = channels * kernel**2, height * width
        if index == len(splits) - 1:
            return total + _linear(window, branch.dim, rows=rows)
        attention = _linear(window, 3 * T2T_DIM, rows=rows) + Cost(0, 2 * rows * rows * T2T_DIM)
        total += (
            _norm(window) + attention + _linear(T2T_DIM, T2T_DIM, rows=rows) * 3 + _norm(T2T_DIM)
        )  # output, two of the MLP
        channels = T2T_DIM
    return total


# ---------------------------------------------------------------- one fusion, as in fusion.py


def _projection(dim: int, out: int, config: CrossViTConfig, *, rows: int) -> Cost:
    if dim == out and config.projection_identity:
        return NOTHING
    return _norm(dim) * config.projection_norm + _linear(dim, out, rows=rows)


def _token_projection(
    dim: int, out: int, config: CrossViTConfig, *, class_rows: int, patches: int
) -> Cost:
    if class_rows and not config.projection_shared:
        return _projection(dim, out, config, rows=class_rows) + _projection(
            dim, out, config, rows=patches
        )
    return _projection(dim, out, config, rows=class_rows + patches)


def _fusion(config: CrossViTConfig, keys_values: str) -> Cost:
    """One fusion of all branches."""
    widest = max(reversed(config.branches), key=lambda branch: branch.dim)
    ring = list(zip(config.branches, (*config.branches[1:], config.branches[0]), strict=True))
    if config.fusion == "none":
        return NOTHING
    if config.fusion == "cross-attention":
        return sum((_cross_read(own, other, config, keys_values) for own, other in ring), NOTHING)
    total = NOTHING
    for branch in config.branches:
        for dim, out in ((branch.dim, widest.dim), (widest.dim, branch.dim)):  # f, then g
            if config.fusion == "class-token":
                total += _projection(dim, out, config, rows=1)
            else:
                patches = _tokens(branch, config) - branch.class_token
                total += _token_projection(
                    dim, out, config, class_rows=int(branch.class_token), patches=patches
                )
    if config.fusion == "all-attention":
        tokens = sum(_tokens(branch, config) for branch in config.branches)
        total += (_norm(widest.dim) + _self_attention(widest.dim, tokens)) * config.fusion_depth
    return total


def _cross_read(
    own: BranchConfig, other: BranchConfig, config: CrossViTConfig, keys_values: str
) -> Cost:
    patches = _tokens(other, config) - other.class_token
    total = _projection(own.dim, other.dim, config, rows=1) + _projection(
        other.dim, own.dim, config, rows=1
    )
    for index in range(config.fusion_depth):
        tokens = 1 + (0 if config.as_released and index else patches)
        total += _norm(other.dim) + _cross_attention(
            other.dim, other.heads, tokens, lazy=keys_values == "lazy"
        )
    return total


def _cross_attention(dim: int, heads: int, tokens: int, *, lazy: bool) -> Cost:
    """Query and output for one token; keys and values for every token.

    In the lazy form these two are products with the query and with the weighted mean instead.
    """
    key_and_value = _linear(dim, dim, rows=1 if lazy else tokens) * 2
    products = Cost(0, 2 * tokens * dim * (heads if lazy else 1))
    return _linear(dim, dim, rows=1) * 2 + key_and_value + products
