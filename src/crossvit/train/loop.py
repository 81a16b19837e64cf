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
from crossvit.results import Rehearsal, RunRecord, TrainingResult
from crossvit.run import Run
from crossvit.train.callbacks import Watch
from crossvit.train.distributed import ALONE, Team, assembled
from crossvit.train.dry_run import checkpoints_of, described, evaluate_few, peak_bytes, time_step
from crossvit.train.losses import Teacher
from crossvit.train.recipe import Recipe
from crossvit.train.reproducibility import deterministic, same_kernels, threads
from crossvit.train.resume import as_given, gone_on_with, recorded_run, refuse_contradiction
from crossvit.train.setup import make_plan, suitable_parts
from crossvit.train.teachers import A_CALLABLE, load_teacher
from crossvit.train.trainer import Training


def fit(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
    teacher: Teacher | None = None,
) -> TrainingResult:
    """Train by `recipe` into its run folder and evaluate on the held-out images.

    resume: go on from the newest checkpoint (from the beginning if there is none; a finished run is returned as it is), to the
    same weights to the bit as if it had never stopped.  overwrite: replace a run that is there.  watch: is told what
    happens (see `Watch`).  teacher: for distillation, any function from images (B, C, H, W), normalised as the student
    gets them, to logits (B, classes); the recipe's `teacher` names others. Raises the errors of `crossvit.errors`.
    """
    watch = watch or Watch()
    refuse_contradiction(resume=resume, overwrite=overwrite)
    if teacher is not None:
        recipe = recipe.changed(teacher=A_CALLABLE)
    run = Run(recipe.out)
    with contextlib.ExitStack() as held:
        device = resolve_device(recipe.device)
        team = held.enter_context(assembled(device))
        held.enter_context(deterministic(device))
        watch = watch if team.leads else Watch()
        if team.restarts:  # torchrun has started the run anew after one of its processes died
            resume, overwrite = True, False
        recorded = team.tell(
            recorded_run(recipe, run, resume=resume, overwrite=overwrite) if team.leads else None
        )
        if recorded is not None and recorded.result:
            watch.say(f"{run.path} has finished training already")
            return TrainingResult.of_finished(str(run.path), recorded, run.entries())
        if run.exists() and team.leads:
            held.enter_context(
                run.lock()
            )  # before the images are read; a new run's folder is made only after them
        if recorded is not None:
            held.enter_context(threads(recorded.threads))
        held.enter_context(same_kernels(recorded, device, watch, team))
        training = prepare(recipe, run, watch, recorded=recorded, teacher=teacher, team=team)
        if recorded is None and team.leads:
            if not run.exists():
                held.enter_context(run.lock())
            run.prepare(training.record(result=None), overwrite=overwrite)
        held.enter_context(training.writer)
        training.start(described(training))
        while not training.ended:
            training.run_epoch()
        return training.finish()


def rehearse(
    recipe: Recipe, *, watch: Watch | None = None, teacher: Teacher | None = None
) -> Rehearsal:
    """One step of everything in a folder that is thrown away: training, evaluation of a batch, checkpoint and weights. Returns
    the time and memory that the run would take; of several processes, each takes its share of the step as in the run."""
    watch = watch or Watch()
    with contextlib.ExitStack() as held:
        team = held.enter_context(assembled(resolve_device(recipe.device)))
        watch = watch if team.leads else Watch()
        folder = held.enter_context(
            tempfile.TemporaryDirectory(prefix="crossvit-", ignore_cleanup_errors=True)
        )
        run = Run(Path(folder) / "run")
        training = prepare(recipe, run, watch, teacher=teacher, team=team)
        all_held_out = len(training.plan.held_out)
        evaluate_few(training)
        if team.leads:
            run.path.mkdir()
            run.prepare(training.record(result=None), overwrite=False)
        images, labels = next(iter(training.loader.epoch(0)))
        training.model.train()
        loss, _ = training.train_step(images.to(training.device), labels.to(training.device))
        seconds = time_step(training)
        started = time.perf_counter()
        training.evaluate()
        evaluation = (time.perf_counter() - started) * all_held_out / len(training.plan.held_out)
        started = time.perf_counter()
        with training.writer:
            training.save()
        checkpoint = time.perf_counter() - started
        training.restore_newest()
        training.finish()
        without_checkpoints = training.steps * seconds + training.recipe.epochs * evaluation
        checkpoints = checkpoints_of(training, seconds=without_checkpoints)
        return Rehearsal(
            model=training.plan.model_name,
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
    watch: Watch,
    *,
    recorded: RunRecord | None = None,
    teacher: Teacher | None = None,
    team: Team = ALONE,
) -> Training:
    """The training of `recipe` in its starting state: the newest checkpoint's, or that of the starting weights. Writes
    nothing."""
    device = resolve_device(recipe.device)  # a wrong call is said before the images are read
    given = recipe
    if recorded is not None:
        given, recipe = (
            as_given(recorded),
            gone_on_with(recipe, Recipe.from_dict(recorded.recipe)),
        )
        if recorded.device != device.type:
            watch.say(
                f"note   the run was on {recorded.device} and goes on on {device.type}: its last bits become others"
            )
    plan = make_plan(recipe, watch, recorded=recorded, team=team)
    if plan.recipe.accumulate == 0:
        share = math.ceil(plan.recipe.batch_size / team.size)
        parts = suitable_parts(plan.config, images=share, device=device.type)
        plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, accumulate=parts))
    if recorded is not None and recorded.data.fingerprint != plan.data.fingerprint:
        fix = "put them back, or train anew with --overwrite"
        raise UsageError(
            f"the files in {recipe.data} are not those {run.path} was trained on: {fix}"
        )
    if plan.recipe.overfit_one_batch:
        teacher = None
    elif teacher is None and plan.recipe.distillation.teacher:
        teacher = load_teacher(
            plan.recipe.distillation.teacher, plan, watch, device=team.device(device)
        )
    precision = recorded.precision if recorded else recipe.precision
    training = Training(
        plan, run, watch, precision=precision, given=given.to_dict(), teacher=teacher, team=team
    )
    if recorded is None or not training.restore_newest():
        training.load_starting_weights()
    elif training.step:
        epochs, batch = divmod(training.step, training.per_epoch)
        watch.say(
            f"going on after epoch {epochs} of {training.recipe.epochs}"
            + (f" and {batch} steps" if batch else "")
        )
    return training
