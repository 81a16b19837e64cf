"""Where a run can go back to: when a checkpoint is due, writing it beside the training, and which one is taken up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from crossvit.train.checkpoint import (
    Writer,
    copied,
    drop_later,
    load_best,
    load_newest,
    save_best,
    save_checkpoint,
)
from crossvit.train.durations import parse_duration
from crossvit.train.recipe import CheckpointRecipe


class CheckpointManager:
    """The checkpoints of one run in `folder`. Only the run's first process writes and reads; all ask what is `due`."""

    def __init__(self, folder: Path, recipe: CheckpointRecipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.writer = Writer()
        self.written_at = time.monotonic()
        self.returned_to: int | None = (
            None  # the step of the checkpoint gone back to, as long as no other has been written
        )
        self._best: tuple[int, dict[str, Tensor]] | None = (
            None  # step and weights that the next checkpoint takes along
        )

    def due(self, step: int, *, per_epoch: int, steps: int) -> bool:
        """Whether `every` asks for a checkpoint after `step` of `steps` steps."""
        every = parse_duration(self.recipe.every, name="every")
        if every.seconds is not None:
            return time.monotonic() - self.written_at >= every.seconds
        return step % max(1, every.steps(per_epoch=per_epoch, total=steps)) == 0

    def keep_best(self, weights: dict[str, Tensor], *, step: int) -> None:
        """These are the best weights so far, of the epoch that ended with `step`. Written with the next checkpoint: a run that
        goes back finds those that were the best then."""
        self._best = step, copied(weights)

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Write the state after `step` steps, and before it the best weights it names if they are new, beside the training."""
        if self._best is not None:
            best_step, weights = self._best
            self.writer.submit(save_best, self.folder, weights, step=best_step)
        self.writer.submit(
            save_checkpoint, self.folder, copied(state), step=step, keep=self.recipe.keep
        )
        self._best = None
        self.returned_to = None
        self.written_at = time.monotonic()

    def newest(self, *, before: int | None = None) -> tuple[dict[str, Any] | None, list[str]]:
        """As `load_newest`, once all is written."""
        self.writer.flush()
        return load_newest(self.folder, before=before)

    def best(self, step: int) -> dict[str, Tensor]:
        """The best weights, which `keep_best` was given for `step`."""
        self.writer.flush()
        return load_best(self.folder, step)

    def begin_at(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: what is later is nothing any more."""
        self._best = None
        drop_later(self.folder, step)

    def go_back_to(self, step: int) -> None:
        """As `begin_at`, for a failure: if it comes again before the next checkpoint, that of `step` may be its cause."""
        self.begin_at(step)
        self.returned_to = step
