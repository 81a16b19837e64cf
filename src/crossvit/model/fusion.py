"""Fusion: how the branches exchange information at the end of a multi-scale encoder.

Shapes: B batch, n patches, D width; `own` is the branch that is written, `other` the branch it reads from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from crossvit.model.attention import CrossAttention
from crossvit.model.config import BranchConfig
from crossvit.model.drop_path import DropPath

NORM_EPS = 1e-6  # the released models' LayerNorm (PAPER, section 1)


class Projection(nn.Sequential):
    """f and g of the paper, from one branch's width to another's: LayerNorm → GELU → Linear, as released."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=NORM_EPS), nn.GELU(), nn.Linear(dim, out_dim))


class CrossRead(nn.Module):
    """Equations 5–7 for one branch: its class token reads the other branch's patches.

        t = f(c_own);  X' = [t ‖ P_other];  y = t + CrossAttention(LN(X'));  Z = [g(y) ‖ P_own]

    own: (B, 1 + n_own, D_own), other: (B, 1 + n_other, D_other) -> (B, 1 + n_own, D_own). The residual is in the
    projected space; there is no feed-forward.
    """

    def __init__(self, own: BranchConfig, other: BranchConfig, *, drop: float, attention_drop: float, drop_path: float) -> None:
        super().__init__()
        self.project = Projection(own.dim, other.dim)
        self.norm = nn.LayerNorm(other.dim, eps=NORM_EPS)
        self.attention = CrossAttention(other.dim, other.heads, drop=drop, attention_drop=attention_drop)
        self.drop_path = DropPath(drop_path)
        self.restore = Projection(other.dim, own.dim)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        class_token = self.project(own[:, :1])  # (B, 1, D_other)
        joined = torch.cat((class_token, other[:, 1:]), dim=1)  # (B, 1 + n_other, D_other)
        fused = class_token + self.drop_path(self.attention(self.norm(joined)))
        return torch.cat((self.restore(fused), own[:, 1:]), dim=1)  # (B, 1 + n_own, D_own)


class CrossAttentionFusion(nn.Module):
    """Every branch reads from the next one around the ring, all from the un-fused tokens (a parallel update)."""

    def __init__(self, branches: Sequence[BranchConfig], *, drop: float, attention_drop: float, drop_path: float) -> None:
        super().__init__()
        self.reads = nn.ModuleList(
            CrossRead(own, other, drop=drop, attention_drop=attention_drop, drop_path=drop_path)
            for own, other in zip(branches, _next_around(branches), strict=True)
        )

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        return [read(own, other) for read, own, other in zip(self.reads, tokens, _next_around(tokens), strict=True)]


T = TypeVar("T")


def _next_around(ring: Sequence[T]) -> list[T]:
    return [*ring[1:], *ring[:1]]
