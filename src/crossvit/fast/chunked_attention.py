"""Self-attention a few images at a time: what a processor without a fused kernel worth its name does best.

In reduced precision on a CPU two products and a softmax beat the fused kernel (`make bench-attention`), as long as the scores of
what is worked on stay in the cache. So the batch is cut into parts whose scores do, forward and backward, and the backward
pass keeps the probabilities and the joint (query, key, value) tokens alone.

Shapes: B batch, b images of a part, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PART_BYTES = 2_600_000  # of scores: the fastest of 1, 2, 4, 16 images at (4 heads, 401 tokens) and at 197; see dev/LOG.md


def cache_sized_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √K) v of every head, side by side: (B, N, 3 D) -> (B, N, D), in the dtype of `qkv`.

    The last axis of `qkv` is [queries ‖ keys ‖ values], each of them head after head. Differentiable once.
    """
    mixed: Tensor
    if torch.is_grad_enabled() and qkv.requires_grad:
        mixed = _CacheSized.apply(qkv, num_heads)
    else:
        mixed, _ = _forward(qkv, num_heads, keep=False)
    return mixed


class _CacheSized(torch.autograd.Function):
    """With P = softmax(S), S = q kᵀ / √K and O = P v:
    dv = Pᵀ dO;  dP = dO vᵀ;  dS = P ∘ (dP − rowsum(P ∘ dP));  dq = dS k / √K;  dk = dSᵀ q / √K."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        mixed, weights = _forward(qkv, num_heads, keep=True)
        ctx.save_for_backward(qkv, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        qkv, weights = ctx.saved_tensors
        heads = weights.shape[1]
        qkv_gradient = torch.empty_like(qkv)
        for part in _parts(qkv, heads):
            query, key, value = _by_head(qkv[part], heads)  # (b H, N, K)
            scale = 1 / math.sqrt(query.shape[-1])
            (mixed_gradient,) = _by_head(gradient[part], heads, count=1)
            rows = weights[part].flatten(0, 1)  # (b H, N, N)
            value_gradient = rows.transpose(1, 2) @ mixed_gradient
            rows_gradient = mixed_gradient @ value.transpose(1, 2)
            scores_gradient = torch._softmax_backward_data(rows_gradient, rows, -1, rows.dtype)
            gradients = (
                scores_gradient @ key.mul_(scale),
                scores_gradient.transpose(1, 2) @ query.mul_(scale),
                value_gradient,
            )
            for target, own in zip(_split(qkv_gradient[part], heads), gradients, strict=True):
                target.copy_(own.view(target.shape))
        return qkv_gradient, None


def _forward(qkv: Tensor, heads: int, *, keep: bool) -> tuple[Tensor, Tensor]:
    """(mixed values (B, N, D), the weights (B, H, N, N) if they are kept, else none of them)."""
    batch, tokens, width = qkv.shape
    mixed = qkv.new_empty(batch, tokens, width // 3)
    weights = qkv.new_empty(batch if keep else 0, heads, tokens, tokens)
    for part in _parts(qkv, heads):
        query, key, value = _by_head(qkv[part], heads)  # (b H, N, K)
        scores = torch.bmm(query.mul_(1 / math.sqrt(query.shape[-1])), key.transpose(1, 2))
        rows = weights[part].flatten(0, 1) if keep else scores
        torch.softmax(scores, dim=-1, out=rows)
        (target,) = _split(mixed[part], heads, count=1)
        target.copy_((rows @ value).view(target.shape))
    return mixed, weights


def _parts(qkv: Tensor, heads: int) -> Iterator[slice]:
    """The batch in parts of equal size whose scores take up to PART_BYTES, an image at least."""
    batch, tokens = qkv.shape[:2]
    most = max(1, PART_BYTES // (heads * tokens * tokens * qkv.element_size()))
    size = -(-batch // -(-batch // most)) if batch else 1
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _split(x: Tensor, heads: int, *, count: int = 3) -> tuple[Tensor, ...]:
    """Views of (b, N, count D) by head: `count` times (b, H, N, K)."""
    return x.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]


def _by_head(x: Tensor, heads: int, *, count: int = 3) -> tuple[Tensor, ...]:
    """Copies of (b, N, count D) by head: `count` times (b H, N, K), contiguous."""
    by_head = x.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
    return by_head.flatten(1, 2).unbind(0)  # type: ignore[no-any-return]
