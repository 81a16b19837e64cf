"""What a model costs, in closed form: exact parameters and multiply–accumulates, per part.

Counted as the paper counts: matrix products and convolutions of one image, attention's two products included, no bias,
normalisation, activation or resize. `keys_values` says how cross-attention is computed: `materialised` is the paper's form
(its tables), `lazy` is ours (see `CrossAttention`).
"""

from __future__ import annotations

import dataclasses

from crossvit.model.config import BranchConfig, CrossViTConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """`parameters` and `macs` of one part; parts add up."""

    parameters: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


def cost(config: CrossViTConfig, *, keys_values: str = "materialised") -> dict[str, Cost]:
    """Cost per part (tokens, positions, encoders, fusion, heads) and `total`, for one image of `config.image_size`."""
    parts = dict.fromkeys(("tokens", "positions", "encoders", "fusion", "heads"), Cost(0, 0))
    ring = zip(config.branches, (*config.branches[1:], config.branches[0]), strict=True)
    for own, other in ring:
        rows, columns = own.grid(config.image_size)
        tokens = 1 + rows * columns
        other_rows, other_columns = other.grid(config.image_size)
        parts["tokens"] += _stem(own, config.in_channels, config.image_size) + Cost(own.dim, 0)
        parts["positions"] += Cost(tokens * own.dim, 0)
        for _ in range(config.stages * own.depth):
            parts["encoders"] += _block(own, tokens)
        for _ in range(config.stages):
            parts["fusion"] += _cross_read(own, other, 1 + other_rows * other_columns, lazy=keys_values == "lazy")
        parts["heads"] += _norm(own.dim) + _linear(own.dim, config.num_classes, rows=1)
    parts["total"] = sum(parts.values(), Cost(0, 0))
    return parts


def _linear(dim: int, out: int, *, rows: int) -> Cost:
    return Cost(dim * out + out, rows * dim * out)


def _norm(dim: int) -> Cost:
    return Cost(2 * dim, 0)


def _block(branch: BranchConfig, tokens: int) -> Cost:
    dim = branch.dim
    projections = _linear(dim, 3 * dim, rows=tokens) + _linear(dim, dim, rows=tokens)
    products = Cost(0, 2 * tokens * tokens * dim)
    mlp = _linear(dim, branch.mlp_dim, rows=tokens) + _linear(branch.mlp_dim, dim, rows=tokens)
    return _norm(dim) + projections + products + _norm(dim) + mlp


def _cross_read(own: BranchConfig, other: BranchConfig, tokens: int, *, lazy: bool) -> Cost:
    dim = other.dim
    project = _norm(own.dim) + _linear(own.dim, dim, rows=1)
    restore = _norm(dim) + _linear(dim, own.dim, rows=1)
    query_and_out = _linear(dim, dim, rows=1) + _linear(dim, dim, rows=1)
    key_and_value = _linear(dim, dim, rows=1 if lazy else tokens) + _linear(dim, dim, rows=1 if lazy else tokens)
    products = Cost(0, 2 * tokens * dim * (other.heads if lazy else 1))
    return project + _norm(dim) + query_and_out + key_and_value + products + restore


def _stem(branch: BranchConfig, in_channels: int, image_size: tuple[int, int]) -> Cost:
    height, width = branch.image_size(image_size)
    total = Cost(0, 0)
    for convolution in branch.stem(in_channels):
        height, width = convolution.output_side(height), convolution.output_side(width)
        total += _linear(convolution.in_channels * convolution.kernel**2, convolution.out_channels, rows=height * width)
    return total
