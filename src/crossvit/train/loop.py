"""`fit`: one training run from a recipe to a finished run folder. Read it as a table of contents."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from pathlib import Path

from crossvit.engines.torch import resolve_device
from crossvit.errors import UsageError
from crossvit.results import DryRun, RunRecord, TrainingResult
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.distributed import SINGLE_PROCESS, Team, init_distributed
from crossvit.train.dry_run import checkpoints_of, described, evaluate_few, peak_bytes, time_step
from crossvit.train.losses import Teacher
from crossvit.train.recipe import Recipe
from crossvit.train.reproducibility import deterministic, same_kernels, threads
from crossvit.train.resume import (
    recorded_run,
    refuse_contradiction,
    requested_recipe,
    resumed_recipe,
)
from crossvit.train.setup import prepare_run, suitable_parts
from crossvit.train.teachers import A_CALLABLE, load_teacher
from crossvit.train.trainer import Training


def fit(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callback: Callback | None = None,
    teacher: Teacher | None = None,
) -> TrainingResult:
    """Train by `recipe` into its run folder and evaluate on the held-out images.

    Args:
        recipe: The choices of the run.
        resume: Continue from the newest checkpoint, to the same bits as if the run had never
            stopped; start where there is none; return a finished run as it is.
        overwrite: Replace an existing run.
        callback: Is told what happens (see `Callback`).
        teacher: For distillation, a function from images (B, C, H, W), normalised as the student
            gets them, to logits (B, classes). The recipe's `teacher` names one instead.

    Raises:
        CrossViTError: Of the kinds in `crossvit.errors`.
    """
    callback = callback or Callback()
    refuse_contradiction(resume=resume, overwrite=overwrite)
    if teacher is not None:
        recipe = recipe.changed(teacher=A_CALLABLE)
    run = Run(recipe.out)
    with contextlib.ExitStack() as held:
        device = resolve_device(recipe.device)
        team = held.enter_context(init_distributed(device))
        held.enter_context(deterministic(device))
        callback = callback if team.is_main else Callback()
        if team.restarts:  # torchrun has started the run anew after one of its processes died
            resume, overwrite = True, False
        recorded = team.broadcast_object(
            recorded_run(recipe, run, resume=resume, overwrite=overwrite) if team.is_main else None
        )
        if recorded is not None and recorded.result:
            callback.on_message(f"{run.path} has finished training already")
            return TrainingResult.of_finished(str(run.path), recorded, run.entries())
        if run.exists() and team.is_main:
            held.enter_context(
                run.lock()
            )  # before the images are read; a new run's folder is made only after them
        if recorded is not None:
            held.enter_context(threads(recorded.threads))
        held.enter_context(same_kernels(recorded, device, callback, team))
        training = prepare(recipe, run, callback, recorded=recorded, teacher=teacher, team=team)
        if recorded is None and team.is_main:
            if not run.exists():
                held.enter_context(run.lock())
            run.prepare(training.record(result=None), overwrite=overwrite)
        held.enter_context(training.writer)
        training.start(described(training))
        while not training.ended:
            training.run_epoch()
        return training.finish()


def dry_run(
    recipe: Recipe, *, callback: Callback | None = None, teacher: Teacher | None = None
) -> DryRun:
    """One step of everything in a folder that is thrown away: training, evaluation of a batch, checkpoint and weights. Returns
    the time and memory that the run would take; of several processes, each takes its share of the step as in the run."""
    callback = callback or Callback()
    with contextlib.ExitStack() as held:
        team = held.enter_context(init_distributed(resolve_device(recipe.device)))
        callback = callback if team.is_main else Callback()
        folder = held.enter_context(
            tempfile.TemporaryDirectory(prefix="crossvit-", ignore_cleanup_errors=True)
        )
        run = Run(Path(folder) / "run")
        training = prepare(recipe, run, callback, teacher=teacher, team=team)
        all_held_out = len(training.prepared.held_out)
        evaluate_few(training)
        if team.is_main:
            run.path.mkdir()
            run.prepare(training.record(result=None), overwrite=False)
        images, labels = next(iter(training.loader.epoch(0)))
        training.model.train()
        loss, _ = training.train_step(images.to(training.device), labels.to(training.device))
        seconds = time_step(training)
        started = time.perf_counter()
        training.evaluate()
        evaluation = (
            (time.perf_counter() - started) * all_held_out / len(training.prepared.held_out)
        )
        started = time.perf_counter()
        with training.writer:
            training.save()
        checkpoint = time.perf_counter() - started
        training.restore_newest()
        training.finish()
        without_checkpoints = training.steps * seconds + training.recipe.epochs * evaluation
        checkpoints = checkpoints_of(training, seconds=without_checkpoints)
        return DryRun(
            model=training.prepared.model_name,
            steps=training.steps,
            loss=loss,
            seconds_a_step=seconds,
            evaluation_seconds=evaluation,
            checkpoint_seconds=checkpoint,
            checkpoint_bytes=max(
                (path.stat().st_size for path in run.checkpoints.glob("*")), default=0
            ),
            total_seconds=without_checkpoints + checkpoints * checkpoint,
            peak_bytes=peak_bytes(training),
            checkpoints=checkpoints,
            processes=team.size,
        )


def prepare(
    recipe: Recipe,
    run: Run,
    callback: Callback,
    *,
    recorded: RunRecord | None = None,
    teacher: Teacher | None = None,
    team: Team = SINGLE_PROCESS,
) -> Training:
    """The training of `recipe` in its starting state: the newest checkpoint's, or that of the starting weights. Writes
    nothing."""
    device = resolve_device(recipe.device)  # a wrong call is said before the images are read
    given = recipe
    if recorded is not None:
        given, recipe = (
            requested_recipe(recorded),
            resumed_recipe(recipe, Recipe.from_dict(recorded.recipe)),
        )
        if recorded.device != device.type:
            callback.on_message(
                f"note   the run was on {recorded.device} and goes on on {device.type}: its last bits become others"
            )
    prepared = prepare_run(recipe, callback, recorded=recorded, team=team)
    if prepared.recipe.accumulate == 0:
        share = math.ceil(prepared.recipe.batch_size / team.size)
        parts = suitable_parts(prepared.config, images=share, device=device.type)
        prepared = dataclasses.replace(
            prepared, recipe=dataclasses.replace(prepared.recipe, accumulate=parts)
        )
    if recorded is not None and recorded.data.fingerprint != prepared.data.fingerprint:
        fix = "put them back, or train anew with --overwrite"
        raise UsageError(
            f"the files in {recipe.data} are not those {run.path} was trained on: {fix}"
        )
    if prepared.recipe.overfit_one_batch:
        teacher = None
    elif teacher is None and prepared.recipe.distillation.teacher:
        teacher = load_teacher(
            prepared.recipe.distillation.teacher, prepared, callback, device=team.device(device)
        )
    precision = recorded.precision if recorded else recipe.precision
    training = Training(
        prepared,
        run,
        callback,
        precision=precision,
        given=given.to_dict(),
        teacher=teacher,
        team=team,
    )
    if recorded is None or not training.restore_newest():
        training.load_starting_weights()
    elif training.step:
        epochs, batch = divmod(training.step, training.per_epoch)
        callback.on_message(
            f"resuming after epoch {epochs} of {training.recipe.epochs}"
            + (f" and {batch} steps" if batch else "")
        )
    return training
