"""The model of a run and what moves its weights, a batch at a time.

Every draw in a step follows from the seed and the step alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossvit.data.images import ImageSet
from crossvit.engines.torch import autocast, resolve_device, resolve_precision
from crossvit.errors import UsageError
from crossvit.factory import create_model
from crossvit.model.crossvit import CrossViT
from crossvit.results import MULTI_LABEL
from crossvit.train.distributed import SINGLE_PROCESS, BranchLogits, Team
from crossvit.train.epoch_meter import EpochMeter, count_correct
from crossvit.train.losses import Criterion, Mixing, Teacher, class_weights, positive_weights
from crossvit.train.optim import freeze, learning_rate, make_optimiser
from crossvit.train.reproducibility import computes_with_kernels, step_seed
from crossvit.train.setup import PreparedRun

BAD_IN_A_ROW = 10  # steps without a finite loss and gradient after which a run goes back; fp16 needs a few to find its scale


class Diverged(Exception):  # noqa: N818  # a turn in a run, not an error until it happens twice
    """BAD_IN_A_ROW steps in a row were not finite."""


class Learner:
    """Model, loss and optimiser of a prepared run, and the step they are at. `train_step` takes a batch; who calls it counts `step`."""

    def __init__(
        self,
        prepared: PreparedRun,
        *,
        precision: str,
        teacher: Teacher | None = None,
        team: Team = SINGLE_PROCESS,
    ) -> None:
        self.prepared, self.team = prepared, team
        self.recipe = recipe = prepared.recipe
        self.device = team.device(resolve_device(recipe.device))
        if recipe.batch_size < team.size:
            raise UsageError(
                f"--batch-size {recipe.batch_size} for {team.size} processes: give each at least one image"
            )
        self.precision = resolve_precision(precision, self.device)
        self.kernels = computes_with_kernels(self.device)
        torch.manual_seed(recipe.seed)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model: CrossViT = create_model(prepared.config).to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.model.set_gradient_checkpointing(recipe.gradient_checkpointing)
        freeze(self.model, prepared.config, recipe.freeze)
        self.ddp = team.wrap_ddp(BranchLogits(self.model))
        self.forward: Callable[[Tensor], Tensor] = (
            self.model.branch_logits if team.size == 1 else self.ddp
        )
        if recipe.compile:
            _refuse_without_compiler(self.device)
            self.forward = torch.compile(self.forward)
        self.optimiser = make_optimiser(self.model, prepared.config, recipe.optimiser)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = _average(self.model, recipe.ema)
        self.loader = prepared.training_loader(bounds=team.bounds)
        self.mixing = Mixing(
            recipe.mixing,
            classes=prepared.config.num_classes,
            label_smoothing=recipe.label_smoothing,
            seed=recipe.seed,
            task=prepared.train.task,
        )
        self.criterion = Criterion(
            label_smoothing=recipe.label_smoothing,
            weights=balancing(prepared.train).to(self.device)
            if recipe.class_weights == "balanced"
            else None,
            teacher=teacher,
            recipe=recipe.distillation,
            task=prepared.train.task,
        )
        self.step = 0
        self.meter = EpochMeter()  # of the epoch so far
        self.rate_factor = 1.0  # halved when a run goes back
        self.bad_in_a_row = 0

    @property
    def per_epoch(self) -> int:
        return len(self.loader)

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.per_epoch

    @property
    def evaluated(self) -> CrossViT:
        """The model that is evaluated and kept: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.module

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """(loss, images that were right) of one batch, of which these images are this process's share, after which the weights
        have moved unless something was not finite."""
        own, size = self.loader.batches.shares(self.step % self.per_epoch)
        torch.manual_seed(
            step_seed(self.recipe.seed, self.step, self.team.rank)
        )  # dropout and stochastic depth follow from the step alone
        images, targets = self.mixing(images, labels, step=self.step)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step) * group["lr_scale"]
        total, right = 0.0, 0.0
        chunks = max(1, math.ceil(len(images) / self.recipe.accumulate))
        parts = zip(images.split(chunks), targets.split(chunks), labels.split(chunks), strict=True)
        left = len(images)
        for part, wanted, label in parts:
            left -= len(part)
            with self.no_sync(left > 0), autocast(self.device, self.precision):
                logits = self.forward(part)
            loss = self.criterion(logits, wanted, part) * (len(part) / size if own else 0.0)
            with (
                self.team.exchanging(),
                self.no_sync(left > 0),
            ):  # gradients of several processes become their mean
                self.scaler.scale(self.team.size * loss).backward()
            total += loss.item()
            right += count_correct(logits.float().mean(dim=0), label) * (own > 0)
        total, right = self.team.all_reduce(total, right)
        self._update(finite=math.isfinite(total))
        return total, int(right)

    def no_sync(self, wanted: bool) -> contextlib.AbstractContextManager[object]:
        """Inside, where `wanted`, gradients add up in this process: they are exchanged with the batch's last part."""
        return self.ddp.no_sync() if wanted and self.team.size > 1 else contextlib.nullcontext()  # type: ignore[operator]

    def _update(self, *, finite: bool) -> None:
        """Move the weights by the gradients, or count the step as skipped if they or the loss are not finite."""
        self.scaler.unscale_(self.optimiser)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.recipe.optimiser.clip or math.inf)
        if finite and math.isfinite(norm.item()):
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.bad_in_a_row = 0
            if self.average is not None:
                self.average.update(self.model, step=self.step)
        else:
            if self.scaler.is_enabled():
                self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
            self.meter.skipped += 1
            self.bad_in_a_row += 1
        self.optimiser.zero_grad()
        if self.bad_in_a_row >= BAD_IN_A_ROW:
            raise Diverged

    def rate(self, step: int) -> float:
        return self.rate_factor * learning_rate(
            max(step, 0), steps=self.steps, per_epoch=self.per_epoch, recipe=self.recipe.optimiser
        )

    def finite(self) -> bool:
        """Whether the weights are all numbers. An update can end that before any loss shows it."""
        kept = [self.model] if self.average is None else [self.model, self.average.module]
        tensors = [tensor for model in kept for tensor in model.state_dict().values()]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _average(model: CrossViT, decay: float) -> Any:
    """timm's exponential moving average of the weights; None where `decay` is 0. Its decay rises to `decay` over the steps."""
    if not decay:
        return None
    from timm.utils import ModelEmaV3  # type: ignore[attr-defined]

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _refuse_without_compiler(device: torch.device) -> None:
    """UsageError where torch.compile has nothing to build its code with."""
    if device.type == "cpu" and not any(
        map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl")))
    ):
        raise UsageError(
            "--compile needs a C++ compiler and finds none: install g++, name one in CXX, or leave --compile out"
        )


def balancing(images: ImageSet) -> Tensor:
    """The weight of each class in the loss that makes up for how few images it has."""
    counts = list(images.counts().values())
    return (
        positive_weights(counts, len(images))
        if images.task == MULTI_LABEL
        else class_weights(counts)
    )
