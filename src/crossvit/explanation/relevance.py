"""Relevance: from each branch's head back to the input tokens of every branch.

The two branches read different grids and meet in the fusions, so relevance is kept over all of them
at once. The branches' input tokens stand one after the other, X = [X_1 ‖ X_2 ‖ ...], T = Σ N_b of
them, and row i of R_b, (N_b, T), says what token i of branch b is made of. R starts as the identity
and takes the model's steps:

- a block of branch b, attention A (N_b, N_b):  R_b <- step(R_b, A, R_b).
- cross-attention: branch b reads the patches of branch a (docs/paper.md, Fusion). Its class row is
  carried to a's width, t = R_b[c]; each block reads [t ‖ P_a] with one row of weights w,
  (1, 1 + n_a):  t <- step(t, w, [t ‖ R_a[P]]);  R_b[c] <- t. All of this reads R from before the
  fusion, as the model does (a parallel update). f and g act on one token at a time and move nothing
  between tokens.
- all-attention: R <- step(R, A, R) over all rows of all branches, A (T, T).
- class-token and pairwise have no attention: tokens are added. The row of a sum is the mean of its
  terms' rows, each branch counting the same; in pairwise, rows of patches pass between grids by the
  model's bilinear interpolation, whose weights sum to one.
- none: nothing crosses.
- A model without class tokens: the mean of a branch's patch rows stands for c, and what the fusion
  adds to every patch is a sum of two terms.

Head b reads c_b (or the mean of its patches): its relevance is that row of R_b, (T,), n_a values on
the grid of each branch a. The logits' mean is the mean of the branches' rows.

Two steps are here, both with the heads' mean and both with the residual connection as an identity:

- `Rollout` (Abnar and Zuidema, 2020):  step(R, A, S) = (R + Ā S) / 2,  Ā = E_h[A].
  Rows of R sum to one: R is what was read, whatever it was read for.
- `GradientWeighted` (Chefer, Gur and Wolf, 2021, equations 5-9):  step(R, A, S) = R + Ā S,
  Ā = E_h[(∂y/∂A ⊙ A)⁺], y the logit of a class.
  What a fusion reads from another branch is normalised first, S = R⁰_a + (R_a − R⁰_a) / rowsum
  (their equations 8-9): gradients are small, so that without it the mixing within the other branch
  would count for nothing. R⁰ is R with every attention left out: the identity, as theirs, where
  fusions move nothing but by attention. Their factor (R̄_bb)ᵀ is left out: here the row of the class
  token alone reads, and no other row of b has a part in it. The head's relevance is its row of
  R − R⁰. y is branch b's logit for row b, so that the relevance of the logits' mean is again the
  mean of the branches' rows.

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
from crossvit.model.crossvit import CrossViT
from crossvit.model.fusion import Grid, interpolate_grid
from crossvit.model.layers import EncoderBlock
from crossvit.model.registry import FUSIONS

AttentionKey = tuple[str, int, int | None, int]  # kind, stage, branch, block


class Step(Protocol):
    """The update of one attention: residual `rows` (B, M, T) read `sources` (B, N, T)."""

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor: ...

    def normalised(self, rows: Tensor, baseline: Tensor) -> Tensor:
        """Another branch's `rows` as a fusion reads them; `baseline`: those without attention."""


class Rollout:
    """(R + Ā S) / 2 with Ā the heads' mean of the weights: rows still sum to one."""

    def __init__(self, weights: Mapping[AttentionKey, Tensor]) -> None:
        self.weights = weights  # (B, H, M, N) each

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor:
        return (rows + self.weights[key].mean(dim=1) @ sources) / 2

    def normalised(self, rows: Tensor, baseline: Tensor) -> Tensor:  # noqa: ARG002  # every step has one signature
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

    def normalised(self, rows: Tensor, baseline: Tensor) -> Tensor:
        mixed = (rows - baseline).clamp(min=0)  # negative by rounding alone
        total = mixed.sum(dim=-1, keepdim=True)
        return baseline + mixed / torch.where(total > 0, total, 1)


class NoAttention:
    """Leaves rows unchanged."""

    def __call__(self, rows: Tensor, key: AttentionKey, sources: Tensor) -> Tensor:  # noqa: ARG002
        return rows

    def normalised(self, rows: Tensor, baseline: Tensor) -> Tensor:  # noqa: ARG002
        return rows


@dataclasses.dataclass(frozen=True)
class Flow:
    """The steps of the module's docstring, for a model of `config` and patches on `grids`."""

    config: CrossViTConfig
    grids: Sequence[Grid]
    step: Step

    def follow(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """R and R⁰ after the last encoder; R⁰ is R with every attention left out.

        Args:
            like: A tensor whose batch size, dtype and device they take.

        Returns:
            (R, R⁰), each with one (B, N_b, T) a branch.
        """
        sizes = token_counts(self.config, self.grids)
        identity = torch.eye(sum(sizes), dtype=like.dtype, device=like.device).expand(
            like.shape[0], -1, -1
        )
        rows = baseline = list(identity.split(sizes, dim=1))
        without = dataclasses.replace(self, step=NoAttention())
        for stage in range(self.config.stages):
            encoded = []
            for index, branch in enumerate(self.config.branches):
                relevance = rows[index]
                for block in range(branch.depth):
                    relevance = self.step(relevance, ("self", stage, index, block), relevance)
                encoded.append(relevance)
            rows = self._fuse(stage, encoded, baseline)
            baseline = without._fuse(stage, baseline, baseline)
        return rows, baseline

    def _fuse(self, stage: int, rows: list[Tensor], baseline: list[Tensor]) -> list[Tensor]:
        match self.config.fusion:
            case "all-attention":
                joined = torch.cat(rows, dim=1)  # (B, T, T)
                for block in range(self.config.fusion_depth):
                    joined = self.step(joined, ("all", stage, None, block), joined)
                return list(joined.split([relevance.shape[1] for relevance in rows], dim=1))
            case "cross-attention":
                sources = [
                    self.step.normalised(row, before)
                    for row, before in zip(rows, baseline, strict=True)
                ]
                # each branch reads the next around the ring
                pairs = zip(rows, [*sources[1:], *sources[:1]], strict=True)
                return [
                    self._cross_read(target, source, (stage, index))
                    for index, (target, source) in enumerate(pairs)
                ]
            case "class-token":
                has_class = self.has_class_token
                shared = torch.stack([summary_row(branch, has_class) for branch in rows]).mean(
                    dim=0
                )
                return [_with_summary_row(branch, shared, has_class) for branch in rows]
            case "pairwise":
                return self._pairwise(rows)
            case _:
                return rows

    def _cross_read(self, target: Tensor, source: Tensor, key: tuple[int, int]) -> Tensor:
        """Branch b reads the patches of branch a.

        Args:
            target: Rows of b, (B, N_b, T).
            source: Rows of a, (B, N_a, T).
            key: Stage and branch.

        Returns:
            New rows of b, (B, N_b, T).
        """
        row = summary_row(target, self.has_class_token)  # (B, 1, T)
        patches = source[:, self.has_class_token :]
        for block in range(self.config.fusion_depth):
            class_token_only = self.config.as_released and block > 0
            sources = row if class_token_only else torch.cat((row, patches), dim=1)
            row = self.step(row, ("cross", *key, block), sources)
        return _with_summary_row(target, row, self.has_class_token)

    def _pairwise(self, rows: list[Tensor]) -> list[Tensor]:
        widest = max(range(len(rows)), key=lambda index: (self.config.branches[index].dim, index))
        common = self.grids[widest]
        patches = [branch[:, self.has_class_token :] for branch in rows]
        pairs = zip(patches, self.grids, strict=True)
        resampled = [interpolate_grid(part, grid, common) for part, grid in pairs]
        shared = torch.stack(resampled).mean(dim=0)
        class_rows = torch.stack([branch[:, :1] for branch in rows]).mean(dim=0)
        classes = [class_rows] * self.has_class_token
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
    """The row that a branch's head reads: (B, N, T) -> (B, 1, T)."""
    return rows[:, :1] if has_class_token else rows.mean(dim=1, keepdim=True)


def _with_summary_row(rows: Tensor, new: Tensor, has_class_token: bool) -> Tensor:
    return torch.cat((new, rows[:, 1:]), dim=1) if has_class_token else (rows + new) / 2


@dataclasses.dataclass(frozen=True)
class Reading:
    """One pass over a batch and what it was read from; everything detached, float32.

    Attributes:
        grids: Rows and columns of patches of each branch.
        has_class_token: Whether branches have one.
        logits: Of each branch, (branches, B, classes).
        targets: The class that `gradient` is for, (B,).
        rollout: Row of R that each head reads, (branches, B, T); rows sum to one.
        gradient: Row of R − R⁰ that each head reads, (branches, B, T).
        attention: Every map of the pass.
        features: Input of each branch's head, (B, N_b, D_b) a branch.
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
    """Run `model` over images and follow each branch's answer back to the input tokens.

    The model's mode and gradients stay as they were. Time: one forward pass, and one backward pass
    a branch.

    Args:
        model: Of built-in parts.
        images: (B, C, H, W), normalised.
        targets: Class indices (B,); by default the model's predictions.

    Raises:
        ConfigError: For a model whose parts are not built in.
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
    weights = {(item.kind, item.stage, item.branch, item.block): item.weights for item in recorded}
    detached = {key: value.detach() for key, value in weights.items()}
    rolled, _ = Flow(config, grids, Rollout(detached)).follow(images)
    gradient = []
    for index, branch_logits in enumerate(logits):
        # images do not mix, so the gradient of the sum is each image's own
        scores = branch_logits.gather(1, targets[:, None]).sum()
        more = index + 1 < len(logits)
        step = GradientWeighted(detached, _gradients(scores, weights, retain_graph=more))
        weighted, baseline = Flow(config, grids, step).follow(images)
        gradient.append(
            summary_row(weighted[index] - baseline[index], has_class)[:, 0].clamp(min=0)
        )
    return Reading(
        grids=grids,
        has_class_token=has_class,
        logits=logits.detach(),
        targets=targets,
        rollout=torch.stack([summary_row(rows, has_class)[:, 0] for rows in rolled]),
        gradient=torch.stack(gradient),
        attention=tuple(
            dataclasses.replace(item, weights=item.weights.detach()) for item in recorded
        ),
        features=tuple(feature.detach() for feature in features),
    )


def _require_known(model: CrossViT) -> None:
    """ConfigError for a model with parts that the equations of this module do not describe."""
    if model.config.fusion not in FUSIONS.built_in:
        raise ConfigError(
            f"fusion {model.config.fusion!r} is not built in: "
            "relevance cannot be followed through it"
        )
    for path, module in model.named_modules():
        if (
            re.search(r"blocks\.\d+\.\d+$", path)
            and "fusion" not in path
            and not isinstance(module, EncoderBlock)
        ):
            raise ConfigError(
                f"{path} is a {type(module).__name__}: relevance is followed through an "
                "EncoderBlock, or a subclass of it"
            )
        if isinstance(module, EncoderBlock) and not isinstance(module.attention, SelfAttention):
            raise ConfigError(
                f"{path}.attention is a {type(module.attention).__name__}: relevance is followed "
                "through a SelfAttention"
            )


def _gradients(
    scores: Tensor, weights: Mapping[AttentionKey, Tensor], *, retain_graph: bool
) -> dict[AttentionKey, Tensor]:
    """∂scores/∂weights; zero where only another branch's logit depends on them."""
    if not weights:  # branches without blocks
        return {}
    gradients = torch.autograd.grad(
        scores,
        list(weights.values()),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(weights, gradients, strict=True))


def density(parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """Relevance on several grids as one map with a mean of one.

    The mass of a patch is spread evenly over its area, so mass x n_a is a density; densities are
    resampled bilinearly, added, and scaled.

    Args:
        parts: Relevance on the grid of each branch, (..., rows_a, columns_a).
        grid: Rows and columns of the result.

    Returns:
        (..., rows, columns), in multiples of the average; 1 everywhere where all is zero.
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
