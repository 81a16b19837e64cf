"""A training run: its epochs, its result, and what one would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from crossvit.results.evaluation import Evaluation
from crossvit.results.run_record import RunRecord


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of a run's log.

    Attributes:
        epoch: From 1.
        step: Steps so far.
        loss: Mean training loss; None where every step was skipped.
        train_top1: Accuracy on the training images as augmented, 0 to 1; None like `loss`.
        val_top1: Accuracy on the held-out images, 0 to 1.
        val_loss: Loss on the held-out images.
        lr: Learning rate of the last step.
        seconds: Duration of training alone.
        images_per_second: Of training alone.
        skipped: Number of steps whose loss or gradient was not finite.
        val_map: Mean average precision of a multi-label run, 0 to 1; None of another.
    """

    epoch: int
    step: int
    loss: float | None
    train_top1: float | None
    val_top1: float
    val_loss: float
    lr: float
    seconds: float
    images_per_second: float
    skipped: int = 0
    val_map: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        run: Its folder.
        top1: Accuracy on the held-out images, 0 to 1.
        n: Number of held-out images.
        seconds: Duration.
        record: Its run.json.
        epochs: Its log.
        evaluation: On the held-out images; None for a run that had finished before.
    """

    run: str
    top1: float
    n: int
    seconds: float
    record: RunRecord
    epochs: tuple[Epoch, ...]
    evaluation: Evaluation | None

    @classmethod
    def of_finished(
        cls, run: str, record: RunRecord, log: Sequence[Mapping[str, Any]]
    ) -> TrainingResult:
        """The result of a run that ended before.

        Args:
            run: Its folder.
            record: Its run.json, with a result.
            log: The entries of its log.jsonl.
        """
        ended = record.result
        assert ended is not None
        epochs = tuple(Epoch(**entry) for entry in log)
        return cls(run, ended.top1, ended.n, ended.seconds, record, epochs, None)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What one step of everything shows of a run: its time in seconds and its memory in bytes (on a CPU the peaks of all its
    processes, those that load images too, added up; on a GPU torch's, of the process with the most). `loss` is of the step;
    evaluation_seconds is of all held-out images, from a batch of them; checkpoints is how many the run writes."""

    model: str
    steps: int
    loss: float
    seconds_a_step: float
    evaluation_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    total_seconds: float
    peak_bytes: int
    checkpoints: int = 0
    processes: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRun:
    """The arithmetic of a run on many GPUs.

    Attributes:
        gpus: Number of GPUs.
        batch_size: Global batch.
        batch_on_each: Images of a step on each GPU, taken in `accumulate` parts.
        accumulate: Number of these parts.
        lr: Learning rate.
        steps_an_epoch: Steps of an epoch.
        steps: Steps in all.
        warmup_steps: Steps of warm-up.
        images_per_second: Images to load, in all.
        images_per_second_on_each: Images to load, by each process.
        hours: Of training and evaluation.
    """

    gpus: int
    batch_size: int
    batch_on_each: int
    accumulate: int
    lr: float
    steps_an_epoch: int
    steps: int
    warmup_steps: int
    images_per_second: float
    images_per_second_on_each: float
    hours: float
