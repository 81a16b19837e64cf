"""What training minimises: the labels' cross-entropy, mixed targets, and a teacher's answers.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.data.augment import seeded
from crossvit.train.recipe import DistillationRecipe, MixingRecipe

Teacher = Callable[[Tensor], Tensor]  # images as the student sees them, (B, C, H, W) normalised -> logits (B, classes)
MIXING_STREAM = 1  # keeps the draws of mixing apart from those of augmentation for the same seed


class Mixing:
    """timm's mixup and cutmix of a batch, drawn from (seed, step) alone."""

    def __init__(self, recipe: MixingRecipe, *, classes: int, label_smoothing: float, seed: int) -> None:
        self.on = recipe.mixup > 0 or recipe.cutmix > 0
        self.seed = seed
        self.mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixing_chance,
            switch_prob=recipe.cutmix_share,
            label_smoothing=label_smoothing,
            num_classes=classes,
        )
        self.smoothing, self.classes = label_smoothing, classes

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """(images, targets): mixed images and their targets (B, C), smoothed; as they were, with labels (B,), when off.

        timm mixes an even number; the last image of an odd batch stays as it is.
        """
        if not self.on:
            return images, labels
        even = len(images) - len(images) % 2
        smooth = self.smoothing / self.classes + (1 - self.smoothing) * F.one_hot(labels, self.classes).float()
        if even == 0:
            return images, smooth
        with seeded(self.seed, step, 0, MIXING_STREAM):
            mixed, targets = self.mixup(images[:even].clone(), labels[:even])
        return torch.cat((mixed, images[even:])), torch.cat((targets.float(), smooth[even:]))


def class_weights(counts: Sequence[int]) -> Tensor:
    """n / (C n_c) for each class of `counts`: the mean over the images is 1. A class without images has 0."""
    counted = np.asarray(counts, dtype=np.float64)
    weights = np.divide(counted.sum(), len(counted) * counted, out=np.zeros_like(counted), where=counted > 0)
    return torch.from_numpy(weights).float()


class Criterion:
    """(branch logits, targets, images) -> the loss of a batch, in nats, as a mean over its images.

    targets: (B,) int64, or (B, C) chances. The loss is of the mean of the branches' logits, as released; with a teacher a
    share `distil_weight` of it is the teacher's (see `DistillationRecipe`), on that mean or on every branch.
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        weights: Tensor | None = None,
        teacher: Teacher | None = None,
        recipe: DistillationRecipe | None = None,
    ) -> None:
        self.label_smoothing = label_smoothing
        self.weights = weights
        self.teacher = teacher
        self.recipe = recipe or DistillationRecipe()

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """logits: (branches, B, C)."""
        fused = logits.float().mean(dim=0)
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0  # mixed targets are smoothed already
        # The mean over images rather than over their weights, so that the parts of a batch add up to the whole.
        loss = F.cross_entropy(fused, targets, weight=self.weights, label_smoothing=smoothing, reduction="none").mean()
        if self.teacher is None:
            return loss
        with torch.no_grad():
            answers = self.teacher(images).float()
        pupils = list(logits.float()) if self.recipe.distil_branches else [fused]
        taught = torch.stack([self._distance(pupil, answers) for pupil in pupils]).mean()
        return (1 - self.recipe.distil_weight) * loss + self.recipe.distil_weight * taught

    def _distance(self, pupil: Tensor, answers: Tensor) -> Tensor:
        if self.recipe.distil == "hard":
            return F.cross_entropy(pupil, answers.argmax(dim=1))
        temperature = self.recipe.temperature
        log_pupil, log_teacher = ((logits / temperature).log_softmax(dim=1) for logits in (pupil, answers))
        return temperature**2 * F.kl_div(log_pupil, log_teacher, log_target=True, reduction="batchmean")


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
            images = F.interpolate(images, size=self.image_size, mode="bicubic", align_corners=False, antialias=True)
        logits: Tensor = self.teacher(images * self.scale + self.shift)
        return logits
