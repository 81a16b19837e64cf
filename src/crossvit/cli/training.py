"""The verb `crossvit train`: its options are the fields of a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.cli.options import TrainingOptions
from crossvit.errors import UsageError
from crossvit.run import Run
from crossvit.text import json_line

if TYPE_CHECKING:
    from crossvit.results import Evaluation, TrainingResult
    from crossvit.train.recipe import Recipe


def train(
    data: str,
    /,
    *,
    out: str,
    recipe: str | None = None,
    options: Annotated[TrainingOptions | None, Parameter(name="*")] = None,
    dry_run: Switch = False,
    resume: Switch = False,
    overwrite: Switch = False,
    json: Switch = False,
) -> int:
    """Train a classifier on a folder of images and evaluate it.

    Parameters
    ----------
    data
        `digits` (real scans, built in), a folder of class folders, or one with train/ and val/ or test/ that hold them, a CSV
        with the columns path and label (or labels), a folder of tar shards, a parquet file, or a dataset of Hugging Face.
    out
        The run folder to make: weights, log, checkpoints and report.html.
    recipe
        A shipped recipe (see `crossvit recipes`), a TOML file, or a run folder to take everything from. Default: small.
    dry_run
        One step of everything, then the time and memory that the run would take. Writes nothing to --out.
    resume
        Go on with the run in --out from its last checkpoint.
    overwrite
        Replace the run in --out.
    json
        Print one JSON object on stdout; everything else goes to stderr.
    """
    from crossvit.train.recipe import load_recipe

    if dry_run and (resume or overwrite):
        raise UsageError(
            "--dry-run starts no run and writes nothing to --out: leave out --resume and --overwrite"
        )
    given = {} if options is None else vars(options)
    going_on = resume and Run(out).exists()
    chosen = load_recipe(recipe or (out if going_on else "small"), data=data, out=out, **given)
    _refuse_early(chosen, dry_run=dry_run, resume=resume, overwrite=overwrite)

    from crossvit.cli.terminal import TerminalCallback, print_dry_run, print_training
    from crossvit.files import write_atomically
    from crossvit.report.page import run_page
    from crossvit.results import to_json
    from crossvit.train import loop
    from crossvit.train.distributed import leading

    with TerminalCallback() as callback:
        try:
            if dry_run:
                outlook = loop.dry_run(chosen, callback=callback)
            else:
                result = loop.fit(chosen, resume=resume, overwrite=overwrite, callback=callback)
        except KeyboardInterrupt:
            callback.stop()
            again = shlex.join(["crossvit", "train", data, "--out", out, "--resume"])
            print(
                f"crossvit: stopped; go on with `{again}`"
                if callback.training
                else "crossvit: stopped",
                file=sys.stderr,
            )
            return 130
    if not leading():
        return 0
    if dry_run:
        if json:
            print(json_line(to_json(outlook)))
        else:
            print_dry_run(outlook)
        return 0
    evaluation = result.evaluation or _evaluated_anew(result)
    if evaluation is not None:
        write_atomically(
            Run(out).report_path, run_page(result, evaluation).encode("utf-8", "surrogateescape")
        )
    if json:
        print(json_line(to_json(result)))
    else:
        print_training(result)
    return 0


def _refuse_early(chosen: Recipe, *, dry_run: bool, resume: bool, overwrite: bool) -> None:
    """UsageError for what needs no torch to be seen. `fit` says the same, after the seconds that loading torch takes."""
    from pathlib import Path

    from crossvit.data.sources import is_elsewhere, open_data
    from crossvit.model.presets import preset
    from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS
    from crossvit.train.resume import recorded_run, refuse_contradiction
    from crossvit.weights.hub import locate

    refuse_contradiction(resume=resume, overwrite=overwrite)
    several = "RANK" in os.environ  # the first of them looks, in `fit`, before any makes the folder
    if (
        not (dry_run or several)
        and recorded_run(chosen, Run(chosen.out), resume=resume, overwrite=overwrite) is not None
    ):
        return
    for registry in (BLOCKS, FUSIONS, TOKENISERS):
        if (name := getattr(chosen, registry.kind)) is not None:
            registry.check(name)
    if chosen.model:
        preset(chosen.model)
    if not (is_elsewhere(chosen.data) or Path(chosen.data).expanduser().exists()):
        open_data(chosen.data)
    if chosen.weights and not several:
        locate(chosen.weights)


def _evaluated_anew(result: TrainingResult) -> Evaluation | None:
    """The evaluation of a run that had ended before, where it was killed before it had a report; None where it has one, or the
    images are not there any more, which is said."""
    from crossvit.errors import CrossViTError
    from crossvit.evaluation.evaluator import evaluate

    if Run(result.run).report_path.is_file():
        return None
    recipe = result.record.recipe
    try:
        return evaluate(
            result.run,
            recipe["data"],
            device=recipe["device"],
            skip_bad=recipe["skip_bad"],
            maps=True,
        )
    except CrossViTError as error:
        print(f"crossvit: no report.html: {error}", file=sys.stderr)
        return None
