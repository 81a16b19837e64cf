"""Lazy cross-attention by our kernel, with its gradient: probes read tokens once, in time linear in their number.

Shapes: B batch, N tokens, D width, H heads, one probe each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossvit.fast.native.bindings import LANES, NAMES, Fold
from crossvit.fast.native.build import kernels_here, native
from crossvit.fast.self_attention import is_eager


def takes_read(x: Tensor) -> bool:
    """Whether `read` computes it: dense fp32, or bf16 without a backward pass, whole registers, and nothing that traces or
    transforms."""
    known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not torch.is_grad_enabled())
    if not (
        known
        and is_eager(x)
        and x.ndim == 3
        and x.is_contiguous()
        and x.shape[-1] % LANES == 0
        and x.numel()
    ):
        return False
    return (kernels := native()) is not None and f"cross_read_{NAMES[x.dtype]}" in kernels.functions


def read(x: Tensor, probes: Tensor) -> Tensor:
    """Σ_j softmax_j(probe · x_j) x_j of each probe: (B, N, D), (B, H, D) -> (B, H, D) fp32. Differentiable once."""
    return _Read.apply(x, probes, 0.0)  # type: ignore[no-any-return]


def read_normalised(x: Tensor, probes: Tensor, fold: Fold) -> Tensor:
    """`read` of [first ‖ LayerNorm of x without its first token], nothing of which is made. first: (B, D)."""
    return _Read.apply(x, probes, fold.eps, fold.first, fold.weight, fold.bias)  # type: ignore[no-any-return]


def _fold(folded: list[Tensor], eps: float) -> Fold | None:
    if not folded:
        return None
    first, weight, bias = folded
    return Fold(first, weight, bias, eps)


class _Read(torch.autograd.Function):
    """cross.cpp has the equations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probes: Tensor, eps: float, *folded: Tensor) -> Tensor:
        ctx.eps, ctx.dtypes = eps, [tensor.dtype for tensor in (probes, *folded)]
        probes, *given = (tensor.float().contiguous() for tensor in (probes, *folded))
        mixed, kept = kernels_here().cross_read(x, probes, _fold(given, eps))
        ctx.save_for_backward(x, probes, *kept, *given)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, probes, shares, dots, statistics, moments, *folded = ctx.saved_tensors
        kept = (shares, dots, statistics, moments)
        found = kernels_here().cross_read_gradient(
            x, probes, _fold(folded, ctx.eps), kept, gradient.contiguous()
        )
        of_x, *others = found
        cast = [
            None if one is None else one.to(dtype)
            for one, dtype in zip(others, ctx.dtypes, strict=False)
        ]
        return of_x, cast[0], None, *cast[1:]
