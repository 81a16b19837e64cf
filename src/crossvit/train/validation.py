"""How good the weights are so far: the held-out images, each measured once, over all processes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.data.images import ImageSet
from crossvit.engines.protocol import EngineOutput
from crossvit.engines.torch import TorchEngine
from crossvit.evaluation.evaluator import measure, summarise
from crossvit.evaluation.metrics import best_thresholds, probabilities
from crossvit.results import MULTI_LABEL, Evaluation
from crossvit.train.distributed import Team
from crossvit.train.setup import PreparedRun


class Validator:
    """The held-out images of a plan; their pictures are kept between epochs where there is room."""

    def __init__(self, prepared: PreparedRun, *, run: str, team: Team) -> None:
        self.prepared, self.run, self.team = prepared, run, team
        self.kept: dict[int, NDArray[Any]] | None = prepared.room_for_held_out()

    def evaluate(
        self, engine: TorchEngine, *, thorough: bool = False
    ) -> tuple[Evaluation, tuple[float, ...]]:
        """(figures, thresholds): of several labels an image, the probability from which each class is said that has the best F1
        on these images; empty otherwise. thorough: as for `summarise`."""
        output, images = self._measure(engine)
        prepared = self.prepared
        with np.errstate(all="ignore"):  # weights that have run away are noticed by the loss
            thresholds = self._thresholds(output, images)
            evaluation = summarise(
                output,
                images,
                patches=[branch.patch for branch in prepared.config.branches],
                run=self.run,
                data=prepared.recipe.data,
                split=prepared.held_out_part,
                thresholds=thresholds,
                thorough=thorough,
            )
        return evaluation, thresholds

    def _thresholds(self, output: EngineOutput, images: ImageSet) -> tuple[float, ...]:
        if images.task != MULTI_LABEL:
            return ()
        chances = probabilities(output.logits, task=MULTI_LABEL)
        return tuple(best_thresholds(chances, images.targets()).round(6).tolist())

    def _measure(self, engine: TorchEngine) -> tuple[EngineOutput, ImageSet]:
        """What the model gives of the images. Each process measures its share, none twice."""
        images, team = self.prepared.held_out, self.team
        if len(images) < team.size:
            return measure(engine, images, self.prepared.preprocessing, kept=self.kept)
        own = images.take(range(*team.bounds(len(images))))
        output, _ = measure(engine, own, self.prepared.preprocessing, kept=self.kept)
        return EngineOutput.join(team.gather(output)), images


def mean_average_precision(evaluation: Evaluation) -> float | None:
    """Of several labels an image; None of one."""
    return None if evaluation.multi_label is None else evaluation.multi_label.map
