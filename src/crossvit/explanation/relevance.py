"""What an answer was read from: relevance followed from each branch's head back to the input tokens of every branch.

The two branches read different grids and meet in the fusions, so relevance is kept over all of them at once. The branches' input
tokens stand one after the other, X = [X_1 ‖ X_2 ‖ ...], T = Σ N_b of them, and row i of R_b, (N_b, T), says what token i of
branch b is made of. R starts as the identity and takes the model's own steps:

- a block of branch b, attention A (N_b, N_b):  R_b <- step(R_b, A, R_b).
- cross-attention: branch b reads the patches of branch a (PAPER, equations 5-7). Its class row is carried to a's width,
  t = R_b[c]; each block reads [t ‖ P_a] with one row of weights w (1, 1 + n_a):  t <- step(t, w, [t ‖ R_a[P]]);  R_b[c] <- t.
  All of this reads the R of before the fusion, as the model does (a parallel update). f and g act on one token at a time and
  move nothing between tokens.
- all-attention: R <- step(R, A, R) over all rows of all branches, A (T, T).
- class-token and pairwise have no attention: tokens are added. The row of a sum is the mean of its terms' rows, each branch
  counting the same; in pairwise, rows of patches pass between grids by the model's own bilinear interpolation, whose weights
  sum to one.
- none: nothing crosses.
- A model without class tokens: the mean of a branch's patch rows stands for c, and what the fusion adds to every patch is a sum
  of two terms.

Head b reads c_b (or the mean of its patches): its relevance is that row of R_b, (T,), n_a values on the grid of each branch a.
The logits' mean is the mean of the branches' rows.

Two steps are here, both with the heads' mean and both with the residual connection as an identity:

- `Rollout` (Abnar and Zuidema, 2020):  step(R, A, S) = (R + Ā S) / 2,  Ā = E_h[A].
  Rows of R sum to one: R is what was read, whatever it was read for.
- `GradientWeighted` (Chefer, Gur and Wolf, 2021, equations 5-9):  step(R, A, S) = R + Ā S,
  Ā = E_h[(∂y/∂A ⊙ A)⁺], y one class's logit.
  What a fusion reads from another branch is normalised first, S = R⁰_a + (R_a − R⁰_a) / rowsum (their equations 8-9): gradients
  are small, so that without it the other branch's own mixing would count for nothing. R⁰ is R with every attention left out:
  the identity, as theirs, where fusions move nothing but by attention. Their factor (R̄_bb)ᵀ is left out: here one row
  alone reads, the class token's, and no other row of b has a part in it. The head's relevance is its row of R − R⁰.
  y is branch b's own logit for row b, so that the relevance of the logits' mean is again the mean of the branches' rows.

Shapes: B batch, N_b tokens of branch b, T of all, H heads, n patches.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from crossvit.errors import ConfigError
from crossvit.model.attention import AttentionMap, SelfAttention, record_attention
from crossvit.model.config import CrossViTConfig
from crossvit.model.crossvit import CrossViT, EncoderBlock
from crossvit.model.fusion import Grid, interpolate_grid
from crossvit.model.registry import FUSIONS

AttentionKey = tuple[str, int, int | None, int]  # kind, stage, branch, block


class Step(Protocol):
    """One attention: `rows` (B, M, T) that stay by the residual, and read `sources` (B, N, T)."""

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor: ...

    def crossing(self, rows: Tensor, still: Tensor) -> Tensor:
        """`rows` of another branch as a fusion reads them; `still` are what they would be without any attention."""


class Rollout:
    """(R + Ā S) / 2 with Ā the heads' mean of the weights: rows go on summing to one."""

    def __init__(self, weights: Mapping[AttentionKey, Tensor]) -> None:
        self.weights = weights  # (B, H, M, N) each

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor:
        return (rows + self.weights[key].mean(dim=1) @ sources) / 2

    def crossing(self, rows: Tensor, still: Tensor) -> Tensor:  # noqa: ARG002  # every step has one signature
        return rows


class GradientWeighted:
    """R + Ā S with Ā the heads' mean of the positive part of gradient times weight."""

    def __init__(
        self, weights: Mapping[AttentionKey, Tensor], gradients: Mapping[AttentionKey, Tensor]
    ) -> None:
        self.weighted = {
            key: (weights[key] * gradients[key]).clamp(min=0).mean(dim=1) for key in weights
        }

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor:
        return rows + self.weighted[key] @ sources

    def crossing(self, rows: Tensor, still: Tensor) -> Tensor:
        mixed = (rows - still).clamp(min=0)  # rounding aside it is nowhere negative
        total = mixed.sum(dim=-1, keepdim=True)
        return still + mixed / torch.where(total > 0, total, 1)


class Still:
    """No attention: rows stay."""

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor:  # noqa: ARG002
        return rows

    def crossing(self, rows: Tensor, still: Tensor) -> Tensor:  # noqa: ARG002
        return rows


@dataclasses.dataclass(frozen=True)
class Flow:
    """The steps that the module's docstring derives, for a model of `config` on inputs whose patches lie on `grids`."""

    config: CrossViTConfig
    grids: Sequence[Grid]
    step: Step

    def follow(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(R, R⁰) after the last encoder, one (B, N_b, T) a branch each; R⁰ is R with every attention left out.

        like: a tensor whose B, type and device they take.
        """
        sizes = token_counts(self.config, self.grids)
        identity = torch.eye(sum(sizes), dtype=like.dtype, device=like.device).expand(
            like.shape[0], -1, -1
        )
        rows = still = list(identity.split(sizes, dim=1))
        without = dataclasses.replace(self, step=Still())
        for stage in range(self.config.stages):
            encoded = []
            for index, (branch, own) in enumerate(zip(self.config.branches, rows, strict=True)):
                for block in range(branch.depth):
                    own = self.step(own, ("self", stage, index, block), own)  # noqa: PLW2901  # block after block
                encoded.append(own)
            rows, still = self._fuse(stage, encoded, still), without._fuse(stage, still, still)
        return rows, still

    def _fuse(self, stage: int, rows: list[Tensor], still: list[Tensor]) -> list[Tensor]:
        match self.config.fusion:
            case "all-attention":
                joined = torch.cat(rows, dim=1)  # (B, T, T)
                for block in range(self.config.fusion_depth):
                    joined = self.step(joined, ("all", stage, None, block), joined)
                return list(joined.split([own.shape[1] for own in rows], dim=1))
            case "cross-attention":
                crossing = [
                    self.step.crossing(own, bare) for own, bare in zip(rows, still, strict=True)
                ]
                others = [
                    *crossing[1:],
                    *crossing[:1],
                ]  # each branch reads the next around the ring
                pairs = zip(rows, others, strict=True)
                return [
                    self._cross_read(own, other, (stage, index))
                    for index, (own, other) in enumerate(pairs)
                ]
            case "class-token":
                shared = torch.stack([summary_row(own, self.has_class_token) for own in rows]).mean(
                    dim=0
                )
                return [_with_summary_row(own, shared, self.has_class_token) for own in rows]
            case "pairwise":
                return self._pairwise(rows)
            case _:
                return rows

    def _cross_read(self, own: Tensor, other: Tensor, place: tuple[int, int]) -> Tensor:
        """A branch reads another's patches: own (B, N_own, T), other (B, N_other, T) -> (B, N_own, T). place: stage, branch."""
        row = summary_row(own, self.has_class_token)  # (B, 1, T)
        patches = other[:, self.has_class_token :]
        for block in range(self.config.fusion_depth):
            alone = (
                self.config.as_released and block > 0
            )  # the class token is all that such a block sees
            row = self.step(
                row, ("cross", *place, block), row if alone else torch.cat((row, patches), dim=1)
            )
        return _with_summary_row(own, row, self.has_class_token)

    def _pairwise(self, rows: list[Tensor]) -> list[Tensor]:
        widest = max(range(len(rows)), key=lambda index: (self.config.branches[index].dim, index))
        common = self.grids[widest]
        patches = [own[:, self.has_class_token :] for own in rows]
        pairs = zip(patches, self.grids, strict=True)
        shared = torch.stack([interpolate_grid(own, grid, common) for own, grid in pairs]).mean(
            dim=0
        )
        classes = [torch.stack([own[:, :1] for own in rows]).mean(dim=0)] * self.has_class_token
        return [
            torch.cat((*classes, interpolate_grid(shared, common, grid)), dim=1)
            for grid in self.grids
        ]

    @property
    def has_class_token(self) -> bool:
        return self.config.branches[0].class_token


def token_counts(config: CrossViTConfig, grids: Sequence[Grid]) -> list[int]:
    """N_b of each branch: its patches, and its class token if it has one."""
    return [
        branch.class_token + rows * columns
        for branch, (rows, columns) in zip(config.branches, grids, strict=True)
    ]


def summary_row(rows: Tensor, has_class_token: bool) -> Tensor:
    """The row that stands for a branch, and that its head reads: (B, N, T) -> (B, 1, T)."""
    return rows[:, :1] if has_class_token else rows.mean(dim=1, keepdim=True)


def _with_summary_row(rows: Tensor, new: Tensor, has_class_token: bool) -> Tensor:
    return torch.cat((new, rows[:, 1:]), dim=1) if has_class_token else (rows + new) / 2


@dataclasses.dataclass(frozen=True)
class Reading:
    """One pass over a batch and what it was read from; everything detached, float32.

    logits: (branches, B, classes), each branch's own. targets: (B,), the class that `gradient` is for.
    rollout, gradient: (branches, B, T), the row of R (of R − R⁰) that each head reads; rows of `rollout` sum to one.
    attention: every map of the pass. features: (B, N_b, D_b) a branch, as its head is given them.
    """

    grids: tuple[Grid, ...]
    has_class_token: bool
    logits: Tensor
    targets: Tensor
    rollout: Tensor
    gradient: Tensor
    attention: tuple[AttentionMap, ...]
    features: tuple[Tensor, ...]

    def on_grids(self, relevance: Tensor) -> list[Tensor]:
        """(..., T) -> one (..., rows, columns) a branch, the class tokens left out."""
        sizes = [self.has_class_token + rows * columns for rows, columns in self.grids]
        parts = relevance.split(sizes, dim=-1)
        return [
            part[..., self.has_class_token :].unflatten(-1, grid)
            for part, grid in zip(parts, self.grids, strict=True)
        ]


@torch.inference_mode(False)
@torch.enable_grad()
def read(model: CrossViT, images: Tensor, targets: Tensor | None = None) -> Reading:
    """Run `model` over images (B, C, H, W) and follow each branch's answer back. targets: (B,) class indices, by default the
    model's own answers. The model's mode and gradients are left as they were. Time: a forward pass, and a backward one a branch.
    """
    config = model.config
    _require_known(model)
    training = model.training
    model.eval()
    try:
        with record_attention(model) as recorded:
            features = model.forward_features(images.detach().clone().requires_grad_())
            logits = model.branch_logits_of(features)  # (branches, B, classes)
    finally:
        model.train(training)
    targets = logits.mean(dim=0).argmax(dim=1) if targets is None else targets.to(logits.device)
    grids = tuple(branch.grid((images.shape[-2], images.shape[-1])) for branch in config.branches)
    has_class = config.branches[0].class_token
    weights = {(seen.kind, seen.stage, seen.branch, seen.block): seen.weights for seen in recorded}
    detached = {key: value.detach() for key, value in weights.items()}
    rolled, _ = Flow(config, grids, Rollout(detached)).follow(images)
    gradient = []
    for index, own in enumerate(logits):
        scores = own.gather(
            1, targets[:, None]
        ).sum()  # images do not mix, so each gets the gradient of its own
        more = index + 1 < len(logits)
        step = GradientWeighted(detached, _gradients(scores, weights, retain_graph=more))
        weighted, still = Flow(config, grids, step).follow(images)
        gradient.append(summary_row(weighted[index] - still[index], has_class)[:, 0].clamp(min=0))
    return Reading(
        grids=grids,
        has_class_token=has_class,
        logits=logits.detach(),
        targets=targets,
        rollout=torch.stack([summary_row(own, has_class)[:, 0] for own in rolled]),
        gradient=torch.stack(gradient),
        attention=tuple(
            dataclasses.replace(seen, weights=seen.weights.detach()) for seen in recorded
        ),
        features=tuple(own.detach() for own in features),
    )


def _require_known(model: CrossViT) -> None:
    """ConfigError for a model whose steps are not those of the module's docstring, as far as can be seen: relevance would be
    followed through something else."""
    if model.config.fusion not in FUSIONS.built_in:
        raise ConfigError(
            f"fusion {model.config.fusion!r} is not built in: what its tokens are read from is not known"
        )
    for path, module in model.named_modules():
        if (
            re.search(r"blocks\.\d+\.\d+$", path)
            and "fusion" not in path
            and not isinstance(module, EncoderBlock)
        ):
            raise ConfigError(
                f"{path} is a {type(module).__name__}: relevance is followed through an EncoderBlock, or a subclass of it"
            )
        if isinstance(module, EncoderBlock) and not isinstance(module.attention, SelfAttention):
            raise ConfigError(
                f"{path}.attention is a {type(module.attention).__name__}: relevance is followed through a SelfAttention"
            )


def _gradients(
    scores: Tensor, weights: Mapping[AttentionKey, Tensor], *, retain_graph: bool
) -> dict[AttentionKey, Tensor]:
    """∂scores/∂weights; zero for what only another branch's logit hangs on."""
    if not weights:  # branches without blocks
        return {}
    slopes = torch.autograd.grad(
        scores,
        list(weights.values()),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(weights, slopes, strict=True))


def density(parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """Relevance on several grids as one on `grid`: [(..., rows_a, columns_a)] -> (..., *grid), how many times the even share.

    A patch's mass is spread evenly over its area, so mass x n_a is a density; densities are resampled bilinearly (patch centres
    in between are mixed) and added, and the sum is scaled to a mean of one. All zero, it is one everywhere.
    """
    total = torch.zeros(*parts[0].shape[:-2], *grid, dtype=parts[0].dtype, device=parts[0].device)
    for part in parts:
        flat = part.flatten(0, -3) if part.dim() > 2 else part[None]
        spread = torch.nn.functional.interpolate(
            flat[:, None], size=grid, mode="bilinear", align_corners=False
        )[:, 0]
        total = total + (spread * (part.shape[-2] * part.shape[-1])).reshape(total.shape)
    mean = total.mean(dim=(-2, -1), keepdim=True)
    return torch.where(mean > 0, total / torch.where(mean > 0, mean, 1), 1)
