"""Stochastic depth (Huang et al., 2016): a residual branch is dropped for whole samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """x ↦ x·m/(1 − rate), m one Bernoulli(1 − rate) draw a sample; the identity in evaluation. Shape (B, ...)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else (x * factor).to(x.dtype)

    def factor(self, x: Tensor) -> Tensor | None:
        """m / (1 − rate) of a new draw for `x`, (B, 1, ...) in fp32, or None for the identity."""
        if not self.training or self.rate == 0.0:
            return None
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        return torch.empty(shape, device=x.device, dtype=torch.float32).bernoulli_(
            1.0 - self.rate
        ) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_rates(highest: float, steps: int) -> list[float]:
    """`steps` rates growing linearly from 0 to `highest` (the paper's schedule over all K·M blocks)."""
    return [highest * step / max(steps - 1, 1) for step in range(steps)]
