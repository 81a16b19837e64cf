"""What a run that is gone on with may be given anew, and what would make another run of it. Knows recipes and records alone, so
that a wrong call is refused before torch is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crossvit.errors import UsageError
from crossvit.results.run_record import RunRecord
from crossvit.run import Run
from crossvit.train.recipe import Recipe

# What a resumed run may be given anew: no step hangs on it, and on `every` and `keep` only how far a run goes back.
CHANGEABLE_ON_RESUME = ("out", "workers", "skip_bad", "every", "keep")
CHOSEN = ("epochs", "batch_size", "accumulate")  # at 0 by the images, when the run began


def refuse_contradiction(*, resume: bool, overwrite: bool) -> None:
    """UsageError where both are asked for."""
    if resume and overwrite:
        raise UsageError(
            "--resume goes on with a run and --overwrite replaces it: give one of them"
        )


def recorded_run(recipe: Recipe, run: Run, *, resume: bool, overwrite: bool) -> RunRecord | None:
    """run.json of the run that is gone on with, None for a new one; without its result where its weights are lost, so that they
    are made again from the last checkpoint. UsageError for a place or a change that cannot be."""
    if Path(recipe.data).expanduser().resolve() in run.path.resolve().parents:
        raise UsageError(
            f"{run.path} lies inside the images of {recipe.data}: choose another --out"
        )
    if not (resume and run.exists()):
        run.refuse_occupied(overwrite=overwrite)
        return None
    recorded = run.record()
    refuse_changes(recipe, Recipe.from_dict(recorded.recipe), requested_recipe(recorded))
    has_weights = run.weights_path.is_file()
    return recorded if has_weights else dataclasses.replace(recorded, result=None)


def requested_recipe(recorded: RunRecord) -> Recipe:
    """The recipe that a run was begun with, before the images decided what it leaves open. Older runs have the latter alone."""
    return Recipe.from_dict(recorded.recipe if recorded.given is None else recorded.given)


def refuse_changes(recipe: Recipe, recorded: Recipe, given: Recipe) -> None:
    """UsageError that names every option of `recipe` that is neither as the run has it recorded nor as it was given then."""
    now, before, first = (_flat(one.to_dict()) for one in (recipe, recorded, given))
    changed = [
        f"{'DATA' if name == 'data' else '--' + name.replace('_', '-')} {now[name]} (the run has {before[name]})"
        for name in now
        if name not in CHANGEABLE_ON_RESUME
        and _same(name, now[name]) not in (_same(name, before[name]), _same(name, first[name]))
        if not (name in CHOSEN and now[name] == 0)
        # Patience takes the best whatever `select` is; older runs have it recorded as `select` too.
        if not (
            name == "select" and recipe.checkpoints.takes_best and recorded.checkpoints.takes_best
        )
    ]
    if changed:
        fix = "leave it out, train anew with --overwrite, or start another run from this one's weights with --weights"
        raise UsageError(f"--resume cannot change {', '.join(changed)}: {fix}")


def resumed_recipe(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recorded recipe, with what may change as `recipe` has it."""
    given = _flat(recipe.to_dict())
    return recorded.changed(
        data=recipe.data, **{name: given[name] for name in CHANGEABLE_ON_RESUME}
    )


def _same(name: str, value: Any) -> Any:
    """A folder is the same however its path is written."""
    return (
        Path(value).expanduser().resolve()
        if name in ("data", "weights", "teacher") and value
        else value
    )


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
