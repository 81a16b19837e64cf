"""Self-attention a few images at a time, so that the scores of a part stay in the cache.

In reduced precision on a CPU two products and a softmax beat torch's fused kernel
(benchmarks/attention.py), as long as the scores do not leave the cache. So the batch is cut into
parts, forward and backward, and the backward pass keeps the attention weights and qkv alone.

Shapes: B batch, b images of a part, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crossvit.fast.recompute import gradients_with_graph

# Of scores: the fastest of 1, 2, 4, 16 images at (4 heads, 401 tokens) and at 197; see dev/LOG.md.
PART_BYTES = 2_600_000


def chunked_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √K) v of every head, side by side, a few images at a time.

    Args:
        qkv: (B, N, 3 D), queries ‖ keys ‖ values, each of them head after head.
        num_heads: H.

    Returns:
        (B, N, D), in the dtype of `qkv`.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _ChunkedAttention.apply(qkv, num_heads)  # type: ignore[no-any-return]
    context, _ = _forward(qkv, num_heads, saves_weights=False)
    return context


class _ChunkedAttention(torch.autograd.Function):
    """With P = softmax(S), S = q kᵀ / √K and O = P v, by the chain rule:

    dv = Pᵀ dO;  dP = dO vᵀ;  dS = P ∘ (dP − rowsum(P ∘ dP));  dq = dS k / √K;  dk = dSᵀ q / √K.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        context, weights = _forward(qkv, num_heads, saves_weights=True)
        ctx.save_for_backward(qkv, weights)
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights = ctx.saved_tensors
        heads = weights.shape[1]
        if torch.is_grad_enabled():
            return *gradients_with_graph(lambda x: _plain(x, heads), (qkv,), grad_context), None
        grad_qkv = torch.empty_like(qkv)
        for part in _parts(qkv, heads):
            query, key, value = _by_head(qkv[part], heads)  # (b H, N, K)
            scale = 1 / math.sqrt(query.shape[-1])
            (grad_rows,) = _by_head(grad_context[part], heads, count=1)
            rows = weights[part].flatten(0, 1)  # (b H, N, N)
            grad_value = rows.transpose(1, 2) @ grad_rows
            grad_weights = grad_rows @ value.transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, rows, -1, rows.dtype)
            grads = (
                grad_scores @ key.mul_(scale),
                grad_scores.transpose(1, 2) @ query.mul_(scale),
                grad_value,
            )
            for target, grad in zip(_split(grad_qkv[part], heads), grads, strict=True):
                target.copy_(grad.view(target.shape))
        return grad_qkv, None


def _plain(qkv: Tensor, heads: int) -> Tensor:
    """The same in one piece, differentiable any number of times."""
    query, key, value = _split(qkv, heads)  # (B, H, N, K) each
    weights = (query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def _forward(qkv: Tensor, heads: int, *, saves_weights: bool) -> tuple[Tensor, Tensor]:
    """(context (B, N, D), the attention weights (B, H, N, N), or none of them)."""
    batch, tokens, width = qkv.shape
    context = qkv.new_empty(batch, tokens, width // 3)
    weights = qkv.new_empty(batch if saves_weights else 0, heads, tokens, tokens)
    for part in _parts(qkv, heads):
        query, key, value = _by_head(qkv[part], heads)  # (b H, N, K)
        scores = torch.bmm(query.mul_(1 / math.sqrt(query.shape[-1])), key.transpose(1, 2))
        rows = weights[part].flatten(0, 1) if saves_weights else scores
        torch.softmax(scores, dim=-1, out=rows)
        (target,) = _split(context[part], heads, count=1)
        target.copy_((rows @ value).view(target.shape))
    return context, weights


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
