"""Attention, written once: self-attention over tokens, and the cross-attention of the paper with lazy keys and values.

Shapes: B batch, N tokens (the class token first), n patches, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from crossvit.errors import ConfigError
from crossvit.fast import self_attention as functions
from crossvit.fast.chunked_attention import cache_sized_attention
from crossvit.fast.cross_attention import read, read_normalised, takes_read
from crossvit.fast.native.bindings import Fold

KERNELS = ("auto", "fused", "plain")
Listener = Callable[[Tensor], object]

_CPU = torch.cpu.get_capabilities()
_HAS_AMX = bool(_CPU.get("amx_bf16"))
_HAS_BF16 = _HAS_AMX or bool(_CPU.get("avx512_bf16"))
_kernel = "auto"


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Inside, `attention` takes the kernel `name`: `fused`, `plain`, or `auto` (the default, by device and precision)."""
    global _kernel  # noqa: PLW0603  # one setting for the process, like torch's own
    if name not in KERNELS:
        raise ConfigError(f"kernel = {name!r}: should be one of {', '.join(KERNELS)}")
    before, _kernel = _kernel, name
    try:
        yield
    finally:
        _kernel = before


def kernel_is_free() -> bool:
    """Whether the kernel is chosen by device and precision, and not by `attention_kernel`."""
    return _kernel == "auto"


def attention(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √K) v.

    query, key, value: (B, H, N, K), one floating dtype. Returns (B, H, N, K) in that dtype. `dropout` is the chance of
    dropping an attention weight. Two products and a softmax are taken where they beat the fused kernel (see `_beats_fused`),
    the fused kernel elsewhere. `attention_kernel` overrides the choice.
    """
    plain = _beats_fused(query) if _kernel == "auto" else _kernel == "plain"
    if plain:
        with _as_given(query):
            return F.dropout(attention_weights(query, key), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def _beats_fused(tokens: Tensor) -> bool:
    """Whether two products and a softmax are faster than the fused kernel (`make bench-attention`): in reduced precision on a
    CPU that computes in it, with a backward pass or without AMX."""
    reduced = tokens.device.type == "cpu" and tokens.dtype in (torch.bfloat16, torch.float16)
    return reduced and _HAS_BF16 and (tokens.requires_grad or not _HAS_AMX)


def _as_given(tokens: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which tokens in reduced precision stay so: autocast would widen the softmax and lose the gain."""
    reduced = tokens.dtype in (torch.bfloat16, torch.float16)
    return (
        torch.autocast(tokens.device.type, enabled=False) if reduced else contextlib.nullcontext()
    )


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q kᵀ / √K): (B, H, M, K), (B, H, N, K) -> (B, H, M, N), rows that sum to one."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention of Vaswani et al. (2017): every token reads every other.

    (B, N, D) -> (B, N, D). `drop` is dropout after the output projection, `attention_drop` on the attention weights.
    """

    def __init__(
        self, dim: int, num_heads: int, *, drop: float = 0.0, attention_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_drop = attention_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.listener: Listener | None = (
            None  # is given the weights (B, H, N, N); see `record_attention`
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # (B, N, 3 D)
        dropout = self.attention_drop if self.training else 0.0
        if self.listener is None and dropout == 0 and kernel_is_free():
            if functions.takes_attention(qkv, self.num_heads):
                return self.drop(self.out(functions.attention(qkv, self.num_heads)))  # type: ignore[no-any-return]
            if _beats_fused(qkv):
                with _as_given(qkv):
                    mixed = cache_sized_attention(qkv, self.num_heads)
                return self.drop(self.out(mixed))  # type: ignore[no-any-return]
        query, key, value = (
            qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (B, H, N, K) each
        if self.listener is None:
            mixed = attention(query, key, value, dropout=dropout)
        else:
            weights = attention_weights(query, key)
            self.listener(weights)
            mixed = F.dropout(weights, dropout) @ value
        return self.drop(self.out(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # (B, N, D)


class CrossAttention(nn.Module):
    """Equation 6 of the paper: the first token asks, every token answers, in time linear in N.

    With x the normalised [class ‖ patches], q = x_0 W_q, k = x W_k, v = x W_v:
        softmax(q kᵀ / √K) v W_o,   x: (B, N, D) -> (B, 1, D).
    There is one query, so k and v never need to be built (`keys_values="lazy"`, the default):
        q·(x_j W_k + b_k) = (q W_kᵀ)·x_j + q·b_k   and   Σ p_j (x_j W_v + b_v) = (Σ p_j x_j) W_v + (Σ p_j) b_v,
    which takes 2·H·N·D multiply–adds in place of 2·N·D². The heads' probes q W_kᵀ are so many queries over the same keys
    and values x, which one fused kernel reads once. q·b_k is the same for every j and cancels in the softmax, so b_k has a
    gradient of zero. Σ p_j is 1 but under attention dropout.
    `keys_values="materialised"` computes the paper's form with the same parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        drop: float = 0.0,
        attention_drop: float = 0.0,
        keys_values: str = "lazy",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keys_values = keys_values
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_drop = nn.Dropout(attention_drop)
        self.drop = nn.Dropout(drop)
        self.listener: Listener | None = (
            None  # is given the weights (B, H, 1, N); see `record_attention`
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = self._lazy(x) if self.keys_values == "lazy" else self._materialised(x)  # (B, D)
        return self.drop(self.out(mixed.unsqueeze(1)))  # type: ignore[no-any-return]  # (B, 1, D)

    def of_normalised(self, first: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`forward` of [first ‖ LN(x_1), LN(x_2), ...] where `folds` says so: (B, 1, D), (B, N, D) -> (B, 1, D). Nothing of
        size N x D is made for it."""
        fold = Fold(first[:, 0], norm.weight, norm.bias, norm.eps)
        mixed = self._value(read_normalised(x, self._scaled_probe(first[:, 0]), fold))
        return self.drop(self.out(mixed.unsqueeze(1)))  # type: ignore[no-any-return]

    def folds(self, first: Tensor, x: Tensor, norm: nn.LayerNorm) -> bool:
        """Whether `of_normalised` computes it: our kernel takes x, and no hook, other `forward` or other shape is passed over."""
        if not self._by_kernel(x) or _has_any_global_hook():
            return False
        if not (
            functions.is_as_written(norm, nn.LayerNorm)
            and functions.is_as_written(self, CrossAttention)
        ):
            return False
        affine = isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor)
        batch, _, width = x.shape
        return affine and norm.normalized_shape == (width,) and first.shape == (batch, 1, width)

    def _lazy(self, x: Tensor) -> Tensor:
        if self._by_kernel(x):
            return self._value(read(x, self._scaled_probe(x[:, 0])))
        if (
            x.dtype != torch.float64
            and x.device.type != "meta"
            and torch.is_autocast_enabled(x.device.type)
        ):
            # which would cast it at each of its uses, but never doubles
            x = x.to(torch.get_autocast_dtype(x.device.type))
        fused = _kernel == "fused" or (_kernel == "auto" and not _beats_fused(x))
        if fused and self.listener is None and not self._dropping:
            probe, x = (
                self._scaled_probe(x[:, 0]).unsqueeze(1),
                x.unsqueeze(1),
            )  # one head of H queries
            return self._value(F.scaled_dot_product_attention(probe, x, x, scale=1.0).squeeze(1))
        weights = self._weights(
            (self._scaled_probe(x[:, 0]) @ x.transpose(1, 2)).softmax(dim=-1)
        )  # (B, H, N)
        # Σ p_j is one, but its gradient is not zero: what listens is given that of the paper's form
        told = self._dropping or self.listener is not None
        return self._value(weights @ x, weights.sum(dim=-1, keepdim=True) if told else None)

    def _scaled_probe(self, first: Tensor) -> Tensor:
        """q W_kᵀ / √K of each head: (B, D) -> (B, H, D)."""
        heads = (self.num_heads, -1)
        query = self.query(first).unflatten(-1, heads).transpose(0, 1)  # (H, B, K)
        probe = (query @ self.key.weight.unflatten(0, heads)).transpose(0, 1)
        return probe / math.sqrt(query.shape[-1])  # type: ignore[no-any-return]

    def _value(self, mixed: Tensor, total: Tensor | None = None) -> Tensor:
        """Each head's mixture of tokens times its W_v, and b_v: (B, H, D) -> (B, D). total: Σ p_j (B, H, 1), 1 if not given."""
        heads = (self.num_heads, -1)
        bias: Tensor = self.value.bias
        if torch.is_grad_enabled():
            bias = (
                bias + 0 * self.key.bias
            )  # so that b_k has its gradient, which distributed training insists on
        if total is not None:
            bias = (total * bias.unflatten(0, heads)).flatten(1)
        mixed = mixed.to(self.value.weight.dtype)  # our kernel gives fp32
        value = mixed.transpose(0, 1) @ self.value.weight.unflatten(0, heads).transpose(
            1, 2
        )  # (H, B, K)
        return value.transpose(0, 1).flatten(1) + bias  # type: ignore[no-any-return]

    def _by_kernel(self, x: Tensor) -> bool:
        lazy = self.keys_values == "lazy" and self.listener is None and not self._dropping
        return lazy and kernel_is_free() and takes_read(x)

    def _materialised(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = self.query(x[:, :1]).unflatten(-1, heads).transpose(1, 2)  # (B, H, 1, K)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, N, K)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        weights = self._weights(attention_weights(query, key).squeeze(2))
        mixed: Tensor = (weights.unsqueeze(2) @ value).squeeze(2)  # (B, H, K)
        return mixed.flatten(1)

    @property
    def _dropping(self) -> bool:
        return self.training and self.attention_drop.p > 0

    def _weights(self, weights: Tensor) -> Tensor:
        """(B, H, N) weights, shown to whoever records them, with attention dropout."""
        if self.listener is not None:
            shown = weights.unsqueeze(2)
            self.listener(shown)
            weights = shown.squeeze(
                2
            )  # of what was shown, so that it is on the way to the logits and can be differentiated
        return self.attention_drop(weights)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Weights of one attention of one forward pass; every row sums to one.

    kind: `self` (a branch's block, (B, H, N, N)), `cross` (a fusion's read, (B, H, 1, N): the reading branch's query over
    [itself ‖ the other branch's patches]) or `all` (all-attention fusion, over every branch's tokens in turn).
    stage, block: counted from 0. branch: the one that is written, None for `all`.
    """

    kind: str
    stage: int
    branch: int | None
    block: int
    weights: Tensor


_PATHS = {
    "self": re.compile(
        r"(^|\.)encoders\.(?P<stage>\d+)\.blocks\.(?P<branch>\d+)\.(?P<block>\d+)\.attention$"
    ),
    "cross": re.compile(
        r"(^|\.)encoders\.(?P<stage>\d+)\.fusion\.reads\.(?P<branch>\d+)\.blocks\.(?P<block>\d+)\.attention$"
    ),
    "all": re.compile(r"(^|\.)encoders\.(?P<stage>\d+)\.fusion\.attentions\.(?P<block>\d+)$"),
}


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionMap]]:
    """Inside, every forward pass of `model` appends its attention maps to the list this gives, in the order computed.

        with record_attention(model) as maps:
            logits = model(images)

    The weights are those that made the logits, before dropout and attached to the graph, so they can be differentiated.
    Blocks that are recorded are not checkpointed. `model` may be compiled or part of a larger module; one may record within
    another. The T2T tokeniser's own attention is not recorded. Outside, nothing of this is computed and fused kernels are
    used.
    """
    maps: list[AttentionMap] = []
    heard: list[tuple[SelfAttention | CrossAttention, Listener | None]] = []
    for path, module in model.named_modules():
        if isinstance(module, SelfAttention | CrossAttention):
            heard.append((module, module.listener))
            module.listener = _listener(path, maps, module.listener)
    try:
        yield maps
    finally:
        for module, before in heard:
            module.listener = before


def _listener(path: str, maps: list[AttentionMap], before: Listener | None) -> Listener:
    kind, match = next(
        (kind, match) for kind, pattern in _PATHS.items() if (match := pattern.search(path))
    )
    found = match.groupdict()
    branch = None if "branch" not in found else int(found["branch"])

    def listen(weights: Tensor) -> None:
        maps.append(AttentionMap(kind, int(found["stage"]), branch, int(found["block"]), weights))
        if before is not None:
            before(weights)

    return listen
