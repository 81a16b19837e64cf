"""The layers of an encoder: MLP, stochastic depth, and the block of equation 1.

Shapes: B batch, N = 1 + n tokens (the class token first), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossvit.model.attention import SelfAttention
from crossvit.model.config import BranchConfig

NORM_EPS = 1e-6  # the released models' LayerNorm (docs/paper.md, Architecture)


class MLP(nn.Sequential):
    """Linear → GELU → Linear, dropout after each. (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, *, drop: float) -> None:
        super().__init__(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Linear(hidden, dim),
            nn.Dropout(drop),
        )


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): a residual branch is dropped for whole samples.

    x ↦ x·m/(1 − rate), m one Bernoulli(1 − rate) draw a sample; the identity in evaluation.
    Shape (B, ...), any floating dtype.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else (x * scale).to(x.dtype)

    def scale(self, x: Tensor) -> Tensor | None:
        """m / (1 − rate) of a new draw for `x`, (B, 1, ...) in fp32, or None for the identity."""
        if not self.training or self.rate == 0.0:
            return None
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        keep = 1.0 - self.rate
        mask = torch.empty(shape, device=x.device, dtype=torch.float32).bernoulli_(keep)
        return mask / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_rates(highest: float, steps: int) -> list[float]:
    """`steps` rates that grow linearly from 0 to `highest` (the paper's, over all K·M blocks)."""
    return [highest * step / max(steps - 1, 1) for step in range(steps)]


class EncoderBlock(nn.Module):
    """Equation 1, pre-norm: y = x + MSA(LN(x)); z = y + MLP(LN(y)). (B, N, D) -> (B, N, D)."""

    def __init__(
        self, branch: BranchConfig, *, drop: float, attention_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(branch.dim, eps=NORM_EPS)
        self.attention = SelfAttention(
            branch.dim, branch.heads, drop=drop, attention_drop=attention_drop
        )
        self.mlp_norm = nn.LayerNorm(branch.dim, eps=NORM_EPS)
        self.mlp = MLP(branch.dim, branch.mlp_dim, drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]
