"""Predictions of any number of images into a file, in constant memory, resumable after a kill.

OUT.options.json beside the results holds the model and the options that made them; `resume` refuses
any others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from crossvit.errors import RunError, UsageError
from crossvit.files import write_atomically
from crossvit.prediction.predictor import Predictor
from crossvit.prediction.result_files import ResultFile, open_results
from crossvit.results import BatchPrediction, plain_name
from crossvit.run import Run

# What a model's predictions depend on, and what else its results do.
MODEL = ("weights", "classes", "preprocessing", "task", "temperature", "thresholds")
OPTIONS = ("top_k", "batch_size", "tta", "abstain_below", "engine", "precision")


def predict_to_file(
    predictor: Predictor,
    images: Iterable[str],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> BatchPrediction:
    """Write the prediction of each image, in order, to a file.

    Results are written after every batch, so a kill loses one batch at most. A resumed file is the
    same, byte for byte (Parquet: row for row), as one never interrupted, on the same machine. An
    image that cannot be read is a result with its error.

    Args:
        predictor: The model and its options.
        images: Paths of images, taken as needed.
        out: The file: .jsonl, .csv, or .parquet (a folder of parts).
        resume: Continue after the results in `out`.
        overwrite: Replace the results in `out`.
        progress: Called after every batch with the number of images done.

    Returns:
        The counts of images, failures and abstentions, and the seconds taken.

    Raises:
        UsageError: Where `out` holds something else, or results without `resume` or `overwrite`, or
            with `resume` results of another model, other options or other images, named.
        RunError: Where `out` cannot be written.
    """
    if resume and overwrite:
        raise UsageError(
            "--resume goes on with the results and --overwrite drops them: give one of them"
        )
    path = Path(out).expanduser()
    results = open_results(
        path,
        top_k=predictor.top_k,
        multi_label=predictor.multi_label,
        batch_size=predictor.batch_size,
    )
    try:
        _settle_options(path, results, predictor, resume=resume, overwrite=overwrite)
        done = _Progress()
        remaining = done.skip(path, results, iter(images), predictor.batch_size)
        skipped = done.n
        progress(done.n)
        started = time.perf_counter()
        for predictions in predictor.batches(remaining):
            results.append(predictions)
            done.n += len(predictions)
            done.failed += sum(prediction.error is not None for prediction in predictions)
            done.abstained += sum(prediction.abstained for prediction in predictions)
            progress(done.n)
        results.finish()
        seconds = time.perf_counter() - started
    finally:
        results.close()
    return BatchPrediction(
        predictor.trained.source, str(out), done.n, done.failed, done.abstained, skipped, seconds
    )


class _Progress:
    """Counts of the results on disk."""

    def __init__(self) -> None:
        self.n = self.failed = self.abstained = 0

    def skip(
        self, path: Path, results: ResultFile, images: Iterator[str], batch_size: int
    ) -> Iterator[str]:
        """Skip the images of complete batches in `results`, and cut off the rows after those.

        Returns:
            The remaining images.
        """
        rows = results.rows()
        end = 0
        while batch := list(islice(images, batch_size)):
            batch_rows = list(islice(rows, len(batch)))
            for row, image in zip(batch_rows, batch, strict=False):
                if row.image != plain_name(image):
                    raise UsageError(
                        f"{path} goes on with {row.image} where the images given now have "
                        f"{plain_name(image)}: give the same images, "
                        "or add --overwrite to start again"
                    )
            if len(batch_rows) < len(batch):
                images = chain(batch, images)
                break
            end = batch_rows[-1].end
            self.n += len(batch_rows)
            self.failed += sum(row.failed for row in batch_rows)
            self.abstained += sum(row.abstained for row in batch_rows)
        else:
            for row in rows:
                raise UsageError(
                    f"{path} goes on with {row.image} where the images given now end: "
                    "give the same images, or add --overwrite to start again"
                )
        results.cut(end)
        return images


def _settle_options(
    path: Path, results: ResultFile, predictor: Predictor, *, resume: bool, overwrite: bool
) -> None:
    """Write OUT.options.json, or where there are results compare it; see `predict_to_file`."""
    record_path = path.with_name(f"{path.name}.options.json")
    current = _options(predictor)
    occupied = not results.is_blank()
    if occupied and not record_path.is_file():
        raise UsageError(
            f"{path} was not made by `crossvit predict` (no {record_path.name}), "
            "so it is left alone: choose another"
        )
    if occupied and overwrite:
        results.clear()
    if not occupied or overwrite:
        write_atomically(record_path, f"{json.dumps(current, indent=1)}\n".encode())
        return
    if not resume:
        raise UsageError(
            f"{path} exists: add --resume to go on with it, --overwrite to replace it, "
            "or choose another --out"
        )
    try:
        recorded: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{record_path}, which says what {path} was made with, cannot be read: "
            "start again with --overwrite"
        ) from error
    for name in OPTIONS:
        if recorded.get(name) != current[name]:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--resume cannot change {option} {current[name]}: "
                f"{path} was begun with {recorded.get(name)}; give that, or choose another --out"
            )
    differing = [name for name in MODEL if recorded.get(name) != current[name]]
    if differing:
        raise UsageError(
            f"{path} was begun with another model ({recorded.get('run')}; its "
            f"{', '.join(differing)} differ from those of {current['run']}): "
            "give that one, or choose another --out"
        )


def _options(predictor: Predictor) -> dict[str, Any]:
    """What the results depend on; `run` is for the reader alone."""
    trained = predictor.trained
    return {
        "run": trained.source,
        "weights": _digest(
            Run(trained.source).weights_path if trained.weights is None else trained.weights.path
        ),
        "classes": list(trained.classes),
        "preprocessing": trained.preprocessing.to_dict(),
        "task": trained.task,
        "temperature": trained.temperature,
        "thresholds": list(trained.thresholds),
        "top_k": predictor.top_k,
        "batch_size": predictor.batch_size,
        "tta": predictor.tta,
        "abstain_below": predictor.abstain_below,
        "engine": predictor.engine.name,
        "precision": predictor.engine.precision,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
