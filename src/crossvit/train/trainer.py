"""A run in progress: its epochs, its checkpoints, going back where it diverges, and what it leaves behind.

The order of images, their augmentation, mixing and every draw in a step follow from the seed and the step alone, so the whole
state is the step, the weights, the optimiser and the few sums below: what a checkpoint holds is all there is.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import crossvit
from crossvit.engines.torch import TorchEngine
from crossvit.errors import TrainingError
from crossvit.evaluation.evaluator import with_pictures
from crossvit.results import Epoch, Evaluation, ResultRecord, RunRecord, TrainingResult, to_json
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.checkpoint import Writer
from crossvit.train.checkpoint_manager import CheckpointManager
from crossvit.train.distributed import SINGLE_PROCESS, Team
from crossvit.train.epoch_meter import EpochMeter
from crossvit.train.losses import Teacher
from crossvit.train.setup import PreparedRun
from crossvit.train.step import BAD_IN_A_ROW, Diverged, Learner
from crossvit.train.validation import Validator, mean_average_precision
from crossvit.weights.files import header, read_weights, write_weights
from crossvit.weights.load import load_weights


class Training(Learner):
    """One prepared run: its epochs, its checkpoints and what it leaves behind. `run_epoch` until `ended`, then `finish`."""

    def __init__(
        self,
        prepared: PreparedRun,
        run: Run,
        callback: Callback,
        *,
        precision: str,
        given: dict[str, Any],
        teacher: Teacher | None = None,
        team: Team = SINGLE_PROCESS,
    ) -> None:
        """given: the recipe as it was asked for, before the images decided what it leaves open."""
        super().__init__(prepared, precision=precision, teacher=teacher, team=team)
        self.run, self.callback, self.given = run, callback, given
        self.held_out = Validator(prepared, run=str(run.path), team=team)
        self.epochs: list[Epoch] = []
        self.best: tuple[float, float, int] | None = (
            None  # top-1 or mAP, minus the loss, and the epoch that had them
        )
        self.checkpoints = CheckpointManager(run.checkpoints, prepared.recipe.checkpoints)

    @property
    def writer(self) -> Writer:
        """Writes the checkpoints: enter it for as long as there may be any."""
        return self.checkpoints.writer

    @property
    def ended(self) -> bool:
        """Whether every epoch is done and evaluated, or the score has stopped rising."""
        patience = self.recipe.checkpoints.waits(epochs=self.recipe.epochs)
        waited = len(self.epochs) - self.best[2] if self.best else 0
        return len(self.epochs) == self.recipe.epochs or bool(patience and waited >= patience)

    # ---- beginning

    def load_starting_weights(self) -> None:
        """The recipe's `weights`, if it has any. The classifier comes along if it is for the same classes, as far as the file
        says: by their names, or by their number. Of other classes, those with the same name keep their rows."""
        if not self.recipe.weights:
            return
        classes = self.prepared.train.classes
        weights = read_weights(self.recipe.weights)
        same = (
            weights.classes == classes if weights.classes else weights.num_classes == len(classes)
        )
        for note in load_weights(
            self.model, weights, head="same" if same else "new", classes=classes
        ):
            self.callback.on_message(f"note   {note}")
        if self.average is not None:
            self.average.set(self.model)

    def restore_newest(self, *, before: int | None = None) -> bool:
        """Take up the newest whole checkpoint, of those before step `before`; False if there is none. The first process reads it
        for all."""
        state, passed_over = self.team.broadcast_object(
            self.checkpoints.newest(before=before) if self.team.is_main else (None, [])
        )
        for line in passed_over:
            self.callback.on_message(f"{line}; using the one before it")
        if state is not None:
            self.restore(state)
        return state is not None

    def start(self, lines: Sequence[str]) -> None:
        """Say `lines`, which are about the run, and have a checkpoint to go back to."""
        if self.team.is_main:
            self.run.make_ready()
            self.checkpoints.begin_at(self.step)
            self.run.rewrite_log([to_json(epoch) for epoch in self.epochs])
        self.callback.on_train_start(
            lines, epochs=self.recipe.epochs, done=self.step / self.per_epoch, steps=self.per_epoch
        )
        if self.step == 0:
            self.save()

    # ---- going on

    def run_epoch(self) -> None:
        """The rest of the epoch: its images, then the held-out ones, the log and a checkpoint."""
        epoch = len(self.epochs)
        try:
            self._train_epoch(epoch)
        except Diverged:
            self._go_back(
                f"the loss or its gradient was not finite for {BAD_IN_A_ROW} steps in a row in epoch {epoch + 1}"
            )
            return
        evaluation, _ = self.evaluate()
        if not (math.isfinite(evaluation.loss) and self.finite()):
            self._go_back(f"the held-out loss or a weight was not finite after epoch {epoch + 1}")
            return
        meter = self.meter
        loss, top1 = meter.means() or (None, None)
        entry = Epoch(
            epoch + 1, self.step, loss, top1, evaluation.top1, evaluation.loss, self.rate(self.step - 1), meter.seconds,
            meter.seen / max(meter.seconds, 1e-9), meter.skipped, mean_average_precision(evaluation),
        )  # fmt: skip
        self.epochs.append(entry)
        self.meter = EpochMeter()
        score = (
            evaluation.top1 if entry.val_map is None else entry.val_map,
            -evaluation.loss,
            epoch + 1,
        )
        if self.best is None or score[:2] > self.best[:2]:
            self.best = score
            if self._keeps_best and self.team.is_main:
                self.checkpoints.keep_best(self.evaluated.state_dict(), step=self.step)
        if self.ended or self._due():
            self.save()
        if self.team.is_main:
            self.run.log(to_json(entry))
        self.callback.on_epoch_end(entry)

    def _train_epoch(self, epoch: int) -> None:
        self.model.train()
        done = self.step - epoch * self.per_epoch
        started = time.perf_counter() - self.meter.seconds
        for images, labels in self.loader.epoch(epoch, start=done) if done < self.per_epoch else ():
            size = self.loader.batches.shares(self.step % self.per_epoch)[1]
            loss, right = self.train_step(images.to(self.device), labels.to(self.device))
            self.step += 1
            meter = self.meter
            if math.isfinite(loss):
                meter.loss, meter.right, meter.seen = (
                    meter.loss + loss * size,
                    meter.right + right,
                    meter.seen + size,
                )
            meter.seconds = time.perf_counter() - started
            loss, top1 = meter.means() or (math.nan, math.nan)
            self.callback.on_step_end(epoch, loss, top1, meter.seen / meter.seconds)
            if self.step < (epoch + 1) * self.per_epoch and self._due():
                self.save()
                started += time.perf_counter() - started - meter.seconds  # writing is not training

    def _go_back(self, problem: str) -> None:
        """To the newest checkpoint with half the rate, and if that fails before another is written, to the one before it. A
        failure after that ends training."""
        again = self.team.broadcast_object(self.checkpoints.returned_to)
        rate = f"train anew with a lower --lr (now {self.recipe.optimiser.lr:g})"
        if self.rate_factor < 1 and (again is None or not self.restore_newest(before=again)):
            raise TrainingError(f"{problem}, at half the rate too: {rate}")
        if again is None and not self.restore_newest():
            raise TrainingError(f"{problem}, and there is no checkpoint to go back to: {rate}")
        if self.team.is_main:
            self.checkpoints.go_back_to(self.step)
            self.run.rewrite_log([to_json(entry) for entry in self.epochs])
        self.rate_factor = 0.5
        further = "" if again is None else " again"
        self.callback.on_message(
            f"{problem}{further}: going back to step {self.step} of {self.steps} with half the rate"
        )

    # ---- keeping

    @property
    def _keeps_best(self) -> bool:
        return self.recipe.checkpoints.takes_best

    @property
    def _best_step(self) -> int | None:
        """The step after which the weights were the best, where those are kept."""
        return (
            self.epochs[self.best[2] - 1].step
            if self._keeps_best and self.best is not None
            else None
        )

    def _due(self) -> bool:
        """Whether a checkpoint is, at this step: never in the middle of steps that fail, so that the newest is a good one."""
        return not self.bad_in_a_row and self.checkpoints.due(
            self.step, per_epoch=self.per_epoch, steps=self.steps
        )

    def save(self) -> None:
        """A checkpoint of this step, written beside the training by the first process; none of weights that are not numbers."""
        if self.team.is_main and self.finite():
            self.checkpoints.save(self.state(), step=self.step)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": dataclasses.astuple(self.meter),
            "epochs": [dataclasses.astuple(entry) for entry in self.epochs],
            "best": self.best,
            "best_step": self._best_step,
            "rate_factor": self.rate_factor,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.meter = EpochMeter(*state["tally"])
        self.epochs = [Epoch(*entry) for entry in state["epochs"]]
        self.best = None if state["best"] is None else tuple(state["best"])
        if self._keeps_best and self.best is not None and state.get("best_step") is None:
            self.callback.on_message(
                "note   the best weights so far cannot be read: the best is chosen from what follows"
            )
            self.best = None
        self.step, self.rate_factor, self.bad_in_a_row = (
            state["step"],
            state["rate_factor"],
            state["bad_in_a_row"],
        )

    def finish(self) -> TrainingResult:
        """Write the weights, then the record with the result: a run with a result has its weights."""
        self.writer.flush()
        if self._best_step is not None:
            self.evaluated.load_state_dict(
                self.team.broadcast_object(
                    self.checkpoints.best(self._best_step) if self.team.is_main else {}
                )
            )
        evaluation, thresholds = self.evaluate(thorough=True)
        prepared = self.prepared
        described = header(
            model=prepared.model_name,
            config=prepared.config,
            classes=prepared.train.classes,
            preprocessing=prepared.preprocessing.to_dict(),
        )
        if self.team.is_main:
            write_weights(self.run.weights_path, self.evaluated.state_dict(), described)
        seconds = sum(entry.seconds for entry in self.epochs)
        several = evaluation.multi_label
        result = ResultRecord(
            top1=evaluation.top1,
            n=evaluation.n,
            loss=evaluation.loss,
            seconds=seconds,
            map=None if several is None else several.map,
            selected_epoch=self.best[2] if self._keeps_best and self.best is not None else None,
        )
        record = self.record(result=result, thresholds=thresholds)
        if self.team.is_main:
            self.run.write_record(record)
        return TrainingResult(
            run=str(self.run.path),
            top1=evaluation.top1,
            n=evaluation.n,
            seconds=seconds,
            record=self.team.broadcast_object(self.run.record() if self.team.is_main else record),
            epochs=tuple(self.epochs),
            evaluation=with_pictures(
                evaluation, prepared.held_out, prepared.preprocessing, model=self.evaluated
            )
            if self.team.is_main
            else evaluation,
        )

    def evaluate(self, *, thorough: bool = False) -> tuple[Evaluation, tuple[float, ...]]:
        """(figures, thresholds) on the held-out images."""
        return self.held_out.evaluate(
            TorchEngine(self.evaluated, device=self.device), thorough=thorough
        )

    def record(
        self, *, result: ResultRecord | None, thresholds: tuple[float, ...] = ()
    ) -> RunRecord:
        """What run.json holds."""
        return RunRecord(
            crossvit=crossvit.__version__,
            model=self.prepared.model_name,
            result=result,
            task=self.prepared.train.task,
            classes=tuple(self.prepared.train.classes),
            preprocessing=self.prepared.preprocessing.to_dict(),
            precision=self.precision,
            device=self.device.type,
            threads=torch.get_num_threads(),
            kernels=self.kernels,
            processes=self.team.size,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            recipe=self.recipe.to_dict(),
            given=self.given,
            config=self.prepared.config.to_dict(),
            data=self.prepared.data_record(),
            thresholds=thresholds or None,
        )
