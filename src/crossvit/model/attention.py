"""Attention, written once: self-attention over a branch, and the cross-attention of the paper with lazy keys and values.

Shapes: B batch, N tokens (the class token first), D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


def attention(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √K) v.

    query, key, value: (B, H, N, K), one floating dtype. Returns (B, H, N, K) in that dtype. `dropout` is the chance of
    dropping an attention weight. Two products and a softmax are taken where they beat the fused kernel, which is on a CPU
    in reduced precision, with a backward pass or without AMX (`make bench-attention`); the fused kernel elsewhere.
    """
    reduced = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if reduced and (query.requires_grad or not _HAS_AMX):
        with torch.autocast("cpu", enabled=False):  # autocast would widen the softmax to fp32 and lose the gain
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, H, N, N)
            weights = F.dropout(scores.softmax(dim=-1), dropout)
            return weights @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Multi-head self-attention of Vaswani et al. (2017): every token of a branch reads every other.

    (B, N, D) -> (B, N, D). `drop` is dropout after the output projection, `attention_drop` on the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, *, drop: float = 0.0, attention_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_drop = attention_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, K)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, K) each
        mixed = attention(query, key, value, dropout=self.attention_drop if self.training else 0.0)
        return self.drop(self.out(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # (B, N, D)


class CrossAttention(nn.Module):
    """Equation 6 of the paper: the class token asks, every token answers, in time linear in N.

    With x the normalised [class ‖ patches], q = x_0 W_q, k = x W_k, v = x W_v:
        softmax(q kᵀ / √K) v W_o,   x: (B, N, D) -> (B, 1, D).
    There is one query, so k and v never need to be built:
        q·(x_j W_k + b_k) = (q W_kᵀ)·x_j + q·b_k   and   Σ p_j (x_j W_v + b_v) = (Σ p_j x_j) W_v + (Σ p_j) b_v,
    which takes 2·H·N·D multiply–adds in place of 2·N·D². The term q·b_k is the same for every j, so it cancels in the
    softmax; it is kept so that the bias has a gradient (zero). Σ p_j is 1 but under attention dropout.
    """

    def __init__(self, dim: int, num_heads: int, *, drop: float = 0.0, attention_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_drop = nn.Dropout(attention_drop)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = self.query(x[:, 0]).unflatten(-1, heads)  # (B, H, K)
        query = query * query.shape[-1] ** -0.5
        probe = torch.einsum("bhk,hkd->bhd", query, self.key.weight.unflatten(0, heads))
        offset = torch.einsum("bhk,hk->bh", query, self.key.bias.unflatten(0, heads))
        scores = probe @ x.transpose(1, 2) + offset.unsqueeze(-1)  # (B, H, N)
        weights = self.attention_drop(scores.softmax(dim=-1))
        mixed = weights @ x  # (B, H, D)
        value = torch.einsum("bhd,hkd->bhk", mixed, self.value.weight.unflatten(0, heads))
        value = value + weights.sum(dim=-1, keepdim=True) * self.value.bias.unflatten(0, heads)
        return self.drop(self.out(value.flatten(1).unsqueeze(1)))  # type: ignore[no-any-return]  # (B, 1, D)
