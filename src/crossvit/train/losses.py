"""What training minimises: the labels' cross-entropy, mixed targets, and a teacher's answers.

Shapes: B batch, C classes. Targets of one label an image are (B,) int64 or, mixed, chances (B, C); those of several labels
are (B, C) from 0 to 1, each class a question of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.data.augment import seeded
from crossvit.results import MULTI_LABEL, SINGLE_LABEL
from crossvit.train.recipe import DistillationRecipe, MixingRecipe

Teacher = Callable[
    [Tensor], Tensor
]  # images as the student sees them, (B, C, H, W) normalised -> logits (B, classes)
MIXING_STREAM = (
    0,
    0,
    1,
)  # behind (seed, step): a fifth number, which no key of augmentation has (four at the most)


class Mixing:
    """timm's mixup and cutmix of a batch, drawn from (seed, step) alone."""

    def __init__(
        self,
        recipe: MixingRecipe,
        *,
        classes: int,
        label_smoothing: float,
        seed: int,
        task: str = SINGLE_LABEL,
    ) -> None:
        self.on = recipe.mixup > 0 or recipe.cutmix > 0
        self.seed = seed
        self.mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixing_chance,
            switch_prob=recipe.cutmix_share,
            label_smoothing=label_smoothing,
            num_classes=classes,
            multi_label=task == MULTI_LABEL,
        )
        self.smoothing, self.classes, self.task = label_smoothing, classes, task

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """(images, targets): mixed images and their targets (B, C), smoothed. When off the images are as they were, and of one
        label an image the labels too.

        timm mixes an even number; the last image of an odd batch stays as it is.
        """
        if not self.on:
            return images, smoothed(labels, self.smoothing) if self.task == MULTI_LABEL else labels
        even = len(images) - len(images) % 2
        if self.task == MULTI_LABEL:
            smooth = smoothed(labels, self.smoothing)
        else:
            smooth = (
                self.smoothing / self.classes
                + (1 - self.smoothing) * F.one_hot(labels, self.classes).float()
            )
        if even == 0:
            return images, smooth
        with seeded(self.seed, step, *MIXING_STREAM):
            mixed, targets = self.mixup(images[:even].clone(), labels[:even])
        return torch.cat((mixed, images[even:])), torch.cat((targets.float(), smooth[even:]))


def class_weights(counts: Sequence[int]) -> Tensor:
    """n / (C n_c) for each class of `counts`: the mean over the images is 1. A class without images has 0."""
    counted = np.asarray(counts, dtype=np.float64)
    weights = np.divide(
        counted.sum(), len(counted) * counted, out=np.zeros_like(counted), where=counted > 0
    )
    return torch.from_numpy(weights).float()


def positive_weights(counts: Sequence[int], images: int) -> Tensor:
    """(n - n_c) / n_c for each class of `counts` of n images: with it, having a class weighs as much in all as not having it.
    1 for a class without images."""
    counted = np.asarray(counts, dtype=np.float64)
    weights = np.divide(images - counted, counted, out=np.ones_like(counted), where=counted > 0)
    return torch.from_numpy(weights).float()


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """(1 - s) y + s / 2: smoothed labels of a yes-or-no question."""
    return targets * (1 - smoothing) + smoothing / 2


class Criterion:
    """(branch logits, targets, images) -> the loss of a batch, in nats, as a mean over its images.

    targets: (B,) int64, or (B, C) chances: cross-entropy; with `task` multi-label (B, C): binary cross-entropy, as a mean over
    the classes too. weights: (C,), of each class, or of having it where there may be several. The loss is of the mean of the
    branches' logits, as released; with a teacher a share `distil_weight` of it is the teacher's (see `DistillationRecipe`), on
    that mean or on every branch.
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        weights: Tensor | None = None,
        teacher: Teacher | None = None,
        recipe: DistillationRecipe | None = None,
        task: str = SINGLE_LABEL,
    ) -> None:
        self.task = task
        self.label_smoothing = label_smoothing
        self.weights = weights
        self.teacher = teacher
        self.recipe = recipe or DistillationRecipe()

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """logits: (branches, B, C). Targets (B, C) come from `Mixing`, smoothed already."""
        fused = logits.float().mean(dim=0)
        loss = self._loss(fused, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            answers = self.teacher(images).float()
        pupils = list(logits.float()) if self.recipe.distil_branches else [fused]
        taught = torch.stack([self._distance(pupil, answers) for pupil in pupils]).mean()
        return (1 - self.recipe.distil_weight) * loss + self.recipe.distil_weight * taught

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.task == MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weights)
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        # The mean over images rather than over their weights, so that the parts of a batch add up to the whole.
        return F.cross_entropy(
            logits, targets, weight=self.weights, label_smoothing=smoothing, reduction="none"
        ).mean()

    def _distance(self, pupil: Tensor, answers: Tensor) -> Tensor:
        hard, temperature = self.recipe.distil == "hard", self.recipe.temperature
        if self.task == MULTI_LABEL:
            if hard:
                return F.binary_cross_entropy_with_logits(pupil, (answers > 0).float())
            chances = (answers / temperature).sigmoid()
            cross, own = (
                F.binary_cross_entropy_with_logits(one / temperature, chances)
                for one in (pupil, answers)
            )
            return temperature**2 * (cross - own)  # Kullback-Leibler: 0 for the teacher's equal
        if hard:
            return F.cross_entropy(pupil, answers.argmax(dim=1))
        log_pupil, log_teacher = (
            (logits / temperature).log_softmax(dim=1) for logits in (pupil, answers)
        )
        return temperature**2 * F.kl_div(
            log_pupil, log_teacher, log_target=True, reduction="batchmean"
        )


class NormalisedAnew(nn.Module):
    """A teacher behind its own normalisation and input size: takes images normalised for the student."""

    def __init__(
        self,
        teacher: nn.Module,
        *,
        student: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.image_size = image_size
        (mean, std), (own_mean, own_std) = student, own
        scale = torch.tensor(std) / torch.tensor(own_std)
        shift = (torch.tensor(mean) - torch.tensor(own_mean)) / torch.tensor(own_std)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(
                images, size=self.image_size, mode="bicubic", align_corners=False, antialias=True
            )
        logits: Tensor = self.teacher(images * self.scale + self.shift)
        return logits
