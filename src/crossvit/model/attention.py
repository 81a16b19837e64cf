"""Attention: self-attention over tokens, and the paper's cross-attention by the class token.

Shapes: B batch, N tokens (the class token first), D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.errors import ConfigError

KERNELS = ("auto", "fused", "plain")
Listener = Callable[[Tensor], object]

_kernel = "auto"


class attention_kernel(contextlib.AbstractContextManager[None]):  # noqa: N801  # reads as a verb
    """Inside, `attention` computes by the kernel `name`; may be entered again, also nested.

    Args:
        name: `fused` (torch's scaled_dot_product_attention), `plain` (two products and a
            softmax, differentiable any number of times), or `auto`, the default: `fused` in the
            plain model, the fastest form known in an accelerated one.

    Raises:
        ConfigError: For another name.
    """

    def __init__(self, name: str) -> None:
        if name not in KERNELS:
            raise ConfigError(f"kernel = {name!r}: should be one of {', '.join(KERNELS)}")
        self.name = name
        self._before: list[str] = []

    def __enter__(self) -> None:
        global _kernel  # noqa: PLW0603  # one setting for the process, like torch's own
        self._before.append(_kernel)
        _kernel = self.name

    def __exit__(self, *_: object) -> None:
        global _kernel  # noqa: PLW0603
        _kernel = self._before.pop()


def chosen_kernel() -> str:
    """The kernel that `attention_kernel` has in force: `auto`, `fused` or `plain`."""
    return _kernel


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    listener: Listener | None = None,
) -> Tensor:
    """softmax(q kᵀ / √K) v.

    Args:
        query, key, value: (B, H, N, K), one floating dtype.
        dropout: Chance of dropping an attention weight.
        listener: Is given the weights (B, H, M, N), before dropout; a fused kernel has none to
            give, so with a listener the weights are computed.

    Returns:
        (B, H, M, K) in the dtype of the query.
    """
    if listener is None and _kernel != "plain":
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    weights = attention_weights(query, key)
    if listener is not None:
        listener(weights)
    return F.dropout(weights, dropout) @ value


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q kᵀ / √K): (B, H, M, K), (B, H, N, K) -> (B, H, M, N), rows that sum to one."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention of Vaswani et al. (2017): every token reads every other.

    Shape (B, N, D) -> (B, N, D). `listener` is given the weights (B, H, N, N), see
    `record_attention`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, drop: float = 0.0, attention_drop: float = 0.0
    ) -> None:
        """
        Args:
            dim: D, a multiple of `num_heads`.
            num_heads: H.
            drop: Dropout after the output projection, 0 to 1.
            attention_drop: Dropout on the attention weights, 0 to 1.
        """
        super().__init__()
        self.num_heads = num_heads
        self.attention_drop = attention_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.listener: Listener | None = None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(x), self.num_heads)  # (B, H, N, K) each
        dropout = self.attention_drop if self.training else 0.0
        context = attention(query, key, value, dropout=dropout, listener=self.listener)
        return self.drop(self.out(context.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # (B, N, D)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, 3 D), queries ‖ keys ‖ values, head after head -> three of (B, H, N, K)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Equation 6 of the paper: the first token asks, every token answers, in time linear in N.

    With x the normalised [class ‖ patches], q = x_0 W_q, k = x W_k, v = x W_v:
        softmax(q kᵀ / √K) v W_o,   x: (B, N, D) -> (B, 1, D).
    `listener` is given the weights (B, H, 1, N), see `record_attention`.
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
        """
        Args:
            dim: D, a multiple of `num_heads`.
            num_heads: H.
            drop: Dropout after the output projection, 0 to 1.
            attention_drop: Dropout on the attention weights, 0 to 1.
            keys_values: `lazy` lets `crossvit.fast` swap in the form that builds neither keys
                nor values; with `materialised` it stays as it is written here.
        """
        super().__init__()
        self.num_heads = num_heads
        self.keys_values = keys_values
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_drop = nn.Dropout(attention_drop)
        self.drop = nn.Dropout(drop)
        self.listener: Listener | None = None

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = self.query(x[:, :1]).unflatten(-1, heads).transpose(1, 2)  # (B, H, 1, K)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, N, K)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        weights = attention_weights(query, key)  # (B, H, 1, N)
        if self.listener is not None:
            self.listener(weights)
        context = self.attention_drop(weights) @ value  # (B, H, 1, K)
        return self.drop(self.out(context.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # (B, 1, D)


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Weights of one attention of one forward pass; every row sums to one.

    Attributes:
        kind: `self` (a branch's block, weights (B, H, N, N)), `cross` (a fusion's read,
            (B, H, 1, N): the reading branch's query over [itself ‖ the other branch's patches])
            or `all` (all-attention fusion, over every branch's tokens in turn).
        stage: The multi-scale encoder, counted from 0.
        branch: The branch that is written, None for `all`.
        block: The block of that branch or fusion, counted from 0.
        weights: The weights, attached to the graph.
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
        r"(^|\.)encoders\.(?P<stage>\d+)\.fusion\.reads\.(?P<branch>\d+)"
        r"\.blocks\.(?P<block>\d+)\.attention$"
    ),
    "all": re.compile(r"(^|\.)encoders\.(?P<stage>\d+)\.fusion\.attentions\.(?P<block>\d+)$"),
}


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionMap]]:
    """Inside, every forward pass of `model` appends its attention maps to the list this gives.

        with record_attention(model) as maps:
            logits = model(images)

    The maps come in the order computed. Their weights are those that made the logits, before
    dropout and attached to the graph, so they can be differentiated. Blocks that are recorded
    are not checkpointed. `model` may be compiled or part of a larger module; one may record
    within another. The T2T tokeniser's own attention is not recorded. Outside, nothing of this
    is computed.

    Raises:
        ConfigError: Where an attention stands in a place that has no name among `AttentionMap`'s
            kinds, so that its weights would be taken for another's.
    """
    maps: list[AttentionMap] = []
    listeners: list[tuple[SelfAttention | CrossAttention, Listener | None]] = []
    try:
        for path, module in model.named_modules():
            if isinstance(module, SelfAttention | CrossAttention):
                listener = _listener(path, maps, module.listener)
                listeners.append((module, module.listener))
                module.listener = listener
        yield maps
    finally:
        for module, before in listeners:
            module.listener = before


def _listener(path: str, maps: list[AttentionMap], before: Listener | None) -> Listener:
    matches = ((kind, pattern.search(path)) for kind, pattern in _PATHS.items())
    kind, match = next(((kind, match) for kind, match in matches if match), (None, None))
    if kind is None or match is None:
        raise ConfigError(
            f"{path} is an attention in a place whose maps have no name: a block has it as "
            f"`attention`, a fusion as `attentions` or in `reads`"
        )
    place = match.groupdict()
    branch = int(place["branch"]) if "branch" in place else None

    def listen(weights: Tensor) -> None:
        stage, block = int(place["stage"]), int(place["block"])
        maps.append(AttentionMap(kind, stage, branch, block, weights))
        if before is not None:
            before(weights)

    return listen
