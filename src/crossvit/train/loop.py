"""`fit`: one training run from a recipe to a finished run folder. Read it as a table of contents."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

import crossvit
from crossvit.errors import TrainingError, UsageError
from crossvit.evaluation import measure, summarise
from crossvit.factory import create_model
from crossvit.results import Epoch, Evaluation, TrainingResult, to_json
from crossvit.run import Run
from crossvit.runtimes.torch import TorchEngine, autocast, resolve_device, resolve_precision
from crossvit.train.checkpoint import newest_checkpoint, save_checkpoint
from crossvit.train.optim import learning_rate, make_optimiser
from crossvit.train.plan import Plan, make_plan
from crossvit.train.recipe import Recipe
from crossvit.train.watch import Watch
from crossvit.weights.files import header, read_weights, write_weights
from crossvit.weights.load import load_weights

TIMED_STEPS, WARM_UP_STEPS = 8, 3  # steps that are run and thrown away to estimate the time; the first ones are slower
TIMED_SECONDS = 10.0  # no further step is timed after this long


def fit(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, watch: Watch | None = None) -> TrainingResult:
    """Train by `recipe` into its run folder and evaluate on the held-out images.

    resume: go on from the newest checkpoint (from the beginning if there is none; a finished run is returned as it is).
    overwrite: replace a run that is there. watch: is told what happens (see `Watch`). After each epoch a checkpoint is
    written, so a run that is stopped loses at most one epoch. Raises the errors of `crossvit.errors`.
    """
    watch = watch or Watch()
    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite replaces it: give one of them")
    run = Run(recipe.out)
    if Path(recipe.data).expanduser().resolve() in run.path.resolve().parents:
        raise UsageError(f"{run.path} lies inside the images of {recipe.data}: choose another --out")
    recorded = run.record() if resume and run.exists() else None
    if recorded is None:
        run.refuse_occupied(overwrite=overwrite)
    else:
        refuse_changes(recipe, Recipe.from_dict(recorded["recipe"]))
        if recorded["result"]:
            return finished_result(run, recorded, watch)
    with contextlib.ExitStack() as held:
        if run.exists():
            held.enter_context(run.lock())  # before the images are read; a new run's folder is made only after them
        training = prepare(recipe, run, watch, recorded)
        if recorded is None:
            if not run.exists():
                held.enter_context(run.lock())
            run.prepare(training.record(result=None), overwrite=overwrite)
        training.start()
        for epoch in range(training.epoch, recipe.epochs):
            training.one_epoch(epoch)
        return training.finish()


def prepare(recipe: Recipe, run: Run, watch: Watch, recorded: dict[str, Any] | None) -> Training:
    """The training of `recipe` in its starting state: the newest checkpoint's, or that of the starting weights. Writes
    nothing."""
    resolve_device(recipe.device)  # a wrong call is said before the images are read
    plan = make_plan(recipe, watch, recorded=recorded)
    if recorded is not None and recorded["data"]["fingerprint"] != plan.data.fingerprint:
        fix = "put them back, or train anew with --overwrite"
        raise UsageError(f"the files in {recipe.data} are not those {run.path} was trained on: {fix}")
    training = Training(recipe, plan, run, watch, precision=recorded["precision"] if recorded else recipe.precision)
    if recorded is None or not training.restore_newest():
        training.load_starting_weights()
    return training


def finished_result(run: Run, record: dict[str, Any], watch: Watch) -> TrainingResult:
    """The result of a run that has ended before; nothing is read but its record and log."""
    watch.say(f"{run.path} has finished training already")
    result = record["result"]
    epochs = tuple(Epoch(**entry) for entry in run.entries())
    return TrainingResult(str(run.path), result["top1"], result["n"], result["seconds"], record, epochs, None)


def refuse_changes(recipe: Recipe, recorded: Recipe) -> None:
    """UsageError that names every option in which a resumed run's recipe differs from the recorded one."""
    given, before = _flat(recipe.to_dict()), _flat(recorded.to_dict())
    free = {"out", "workers", "skip_bad"}  # where the run lies now, and what does not change its result
    changed = [
        f"{'DATA' if name == 'data' else '--' + name.replace('_', '-')} {given[name]} (the run has {before[name]})"
        for name in given
        if name not in free and _same_place(name, given[name]) != _same_place(name, before[name])
    ]
    if changed:
        fix = "leave it out, train anew with --overwrite, or start another run from this one's weights with --weights"
        raise UsageError(f"--resume cannot change {', '.join(changed)}: {fix}")


def _same_place(name: str, value: Any) -> Any:
    """A folder is the same however its path is written."""
    return Path(value).expanduser().resolve() if name in ("data", "weights") and value else value


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


class Training:
    """The state of a run in progress and the steps that change it."""

    def __init__(self, recipe: Recipe, plan: Plan, run: Run, watch: Watch, *, precision: str) -> None:
        self.recipe = recipe
        self.plan = plan
        self.run = run
        self.watch = watch
        self.device = resolve_device(recipe.device)
        self.precision = resolve_precision(precision, self.device)
        torch.manual_seed(recipe.seed)
        self.model = create_model(plan.config).to(self.device)
        self.optimiser = make_optimiser(self.model, recipe.optimiser)
        self.loader = plan.training_loader()
        self.epoch = 0
        self.epochs: list[Epoch] = []
        self.seconds = 0.0
        self.kept: dict[int, NDArray[np.uint8]] | None = plan.room_for_held_out()

    @property
    def steps(self) -> int:
        return self.recipe.epochs * len(self.loader)

    def load_starting_weights(self) -> None:
        """The recipe's `weights`, if it has any. The classifier comes along if it is for the same classes, as far as the file
        says: by their names, or by their number. Of other classes, those with the same name keep their rows."""
        if not self.recipe.weights:
            return
        classes = self.plan.train.classes
        weights = read_weights(self.recipe.weights)
        same = weights.classes == classes if weights.classes else weights.num_classes == len(classes)
        for note in load_weights(self.model, weights, head="same" if same else "new", classes=classes):
            self.watch.say(f"note   {note}")

    def restore_newest(self) -> bool:
        """Take up the newest whole checkpoint; False if there is none yet."""
        state, passed_over = newest_checkpoint(self.run.checkpoints)
        for line in passed_over:
            self.watch.say(f"{line}; using the one before it")
        if state is not None:
            self._restore(state)
            self.watch.say(f"going on after epoch {self.epoch} of {self.recipe.epochs}")
        return state is not None

    def start(self) -> None:
        """Say what is trained and how long it will take."""
        self.run.rewrite_log([to_json(epoch) for epoch in self.epochs])
        self.watch.started(self._describe(), epochs=self.recipe.epochs, done=self.epoch, steps=len(self.loader))

    def one_epoch(self, epoch: int) -> None:
        """Every training image once, then the held-out images, the log and the checkpoint."""
        started = time.perf_counter()
        losses, right, seen, rate = 0.0, 0, 0, 0.0
        self.model.train()
        for index, (images, labels) in enumerate(self.loader.epoch(epoch)):
            step = epoch * len(self.loader) + index
            rate = learning_rate(step, steps=self.steps, recipe=self.recipe.optimiser)
            loss, correct = self._step(images.to(self.device), labels.to(self.device), step=step, rate=rate)
            losses, right, seen = losses + loss * len(labels), right + correct, seen + len(labels)
            self.watch.stepped(epoch, losses / seen, right / seen, seen / (time.perf_counter() - started))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        evaluation = self._evaluate()
        entry = Epoch(
            epoch + 1, (epoch + 1) * len(self.loader), losses / seen, right / seen, evaluation.top1, evaluation.loss,
            rate, seconds, seen / seconds,
        )  # fmt: skip
        self.epoch = epoch + 1
        self.epochs.append(entry)
        save_checkpoint(self.run.checkpoints, self._state(), epoch=self.epoch)
        self.run.log(to_json(entry))
        self.watch.epoch_done(entry)

    def finish(self) -> TrainingResult:
        """Write the weights, then the record with the result: a run with a result has its weights."""
        evaluation = self._evaluate()
        plan = self.plan
        described = header(
            model=plan.model_name, config=plan.config, classes=plan.train.classes, preprocessing=plan.preprocessing.to_dict()
        )
        write_weights(self.run.weights_path, self.model.state_dict(), described)
        result = {"top1": evaluation.top1, "n": evaluation.n, "loss": evaluation.loss, "seconds": self.seconds}
        self.run.write_record(self.record(result=result))
        return self._result(evaluation)

    def _step(self, images: torch.Tensor, labels: torch.Tensor, *, step: int, rate: float) -> tuple[float, int]:
        torch.manual_seed(step_seed(self.recipe.seed, step))  # dropout and stochastic depth follow from the step alone
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with autocast(self.device, self.precision):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            where = f"epoch {step // len(self.loader) + 1}"
            raise TrainingError(f"the loss is {value} in {where}: lower --lr (now {self.recipe.optimiser.lr:g}) and train anew")
        self.optimiser.zero_grad()
        loss.backward()
        if self.recipe.optimiser.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip)
        self.optimiser.step()
        return value, int((logits.argmax(dim=1) == labels).sum())

    def _evaluate(self) -> Evaluation:
        engine = TorchEngine(self.model, device=self.device)
        logits, images = measure(engine, self.plan.held_out, self.plan.preprocessing, kept=self.kept)
        patches = [branch.patch for branch in self.plan.config.branches]
        return summarise(
            logits, images, patches=patches, run=str(self.run.path), data=self.recipe.data, split=self.plan.held_out_part
        )

    def _describe(self) -> list[str]:
        plan, recipe = self.plan, self.recipe
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        height, width = plan.config.image_size
        left = self._estimate() * (recipe.epochs - self.epoch)
        return [
            f"model  {plan.model_name}: {parameters / 1e6:.2f} M parameters at {height}x{width}{plan.why_model}",
            f"train  {recipe.epochs} x {len(self.loader)} steps, batch {recipe.batch_size}, "
            f"{self.precision} on {self.device.type} with {torch.get_num_threads()} threads, about {duration(left)}",
        ]

    def _estimate(self) -> float:
        """Seconds an epoch, from a few steps on the first images whose gradients are thrown away."""
        batches = self.loader.epoch(self.epoch)
        times = []
        self.model.train()
        started = time.perf_counter()
        for _, (images, labels) in zip(range(TIMED_STEPS), batches, strict=False):
            with autocast(self.device, self.precision):
                logits = self.model(images.to(self.device))
            loss = F.cross_entropy(logits.float(), labels.to(self.device))
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - started)
            started = time.perf_counter()
            if sum(times) > TIMED_SECONDS:
                break
        self.optimiser.zero_grad()
        step = statistics.median(times[WARM_UP_STEPS:] or times[-1:])
        evaluation = len(self.plan.held_out) / self.recipe.batch_size / 3  # in steps: forward alone is about a third of one
        return step * (len(self.loader) + evaluation)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "epochs": [dataclasses.astuple(entry) for entry in self.epochs],
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epochs = [Epoch(*entry) for entry in state["epochs"]]
        self.epoch, self.seconds = state["epoch"], state["seconds"]

    def record(self, *, result: dict[str, Any] | None) -> dict[str, Any]:
        """What run.json holds."""
        return {
            "crossvit": crossvit.__version__,
            "model": self.plan.model_name,
            "result": result,
            "classes": list(self.plan.train.classes),
            "preprocessing": self.plan.preprocessing.to_dict(),
            "precision": self.precision,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "recipe": self.recipe.to_dict(),
            "config": self.plan.config.to_dict(),
            "data": self.plan.data_record(),
        }

    def _result(self, evaluation: Evaluation) -> TrainingResult:
        return TrainingResult(
            run=str(self.run.path),
            top1=evaluation.top1,
            n=evaluation.n,
            seconds=self.seconds,
            record=self.run.record(),
            epochs=tuple(self.epochs),
            evaluation=evaluation,
        )


def step_seed(seed: int, step: int) -> int:
    """The seed of the generators in step `step`: follows from the two numbers alone, so a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
