"""The verb `crossvit predict`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.cli.gc_control import leave_out_what_is_there, uncollected
from crossvit.text import duration, json_line, percent

if TYPE_CHECKING:
    from crossvit.prediction.predictor import Predictor
    from crossvit.results import Label, Prediction

WORTH_SAYING = 0.0005  # what would not be printed as 0.0 %
SECONDS_A_LINE = 30.0  # of progress, where stderr is a file


def predict(
    run: str,
    /,
    *paths: str,
    from_: Annotated[str | None, Parameter(name="--from", allow_leading_hyphen=True)] = None,
    out: str | None = None,
    resume: Switch = False,
    overwrite: Switch = False,
    top_k: int = 5,
    abstain_below: float | None = None,
    tta: str = "none",
    batch_size: int = 32,
    workers: int | None = None,
    engine: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    json: Switch = False,
) -> int:
    """Classify images. Exits with 1 if one of them could not be read; the others are classified all the same.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`, a weight file, or a name on the hub.
    paths
        Image files, folders (searched through) or globs.
    from_
        A file with the names of the images, one a line, or - for standard input.
    out
        Write the results to this file, in constant memory, for any number of images: .jsonl, .csv or .parquet.
    resume
        Go on with the results in --out.
    overwrite
        Replace the results in --out.
    top_k
        Classes to name for each image, the surest first.
    abstain_below
        Give no answer where the surest class has a lower probability, 0 to 1.
    tta
        Test-time augmentation: none, flip (2 passes; wrong where classes are mirror images), zoom (3) or flip-zoom (6).
    batch_size
        Images in one pass.
    workers
        Threads that decode images. Default: one a processor and four more.
    engine
        Inference engine: torch, onnxruntime, openvino, or auto, the fastest here by trial.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    json
        Print one JSON object on stdout.
    """
    from crossvit.errors import UsageError

    with uncollected():
        from crossvit.prediction.image_paths import listed_images, scan_images
        from crossvit.prediction.predictor import Predictor
    if paths and from_ is not None:
        raise UsageError("images are given as paths and with --from: give one of them")
    if not paths and from_ is None:
        raise UsageError(
            "no image given: `crossvit predict RUN photo.jpg`, a folder, a glob, or --from list.txt"
        )
    if out is None and (resume or overwrite):
        raise UsageError(
            "--resume and --overwrite are for results in a file: add --out results.jsonl"
        )

    def images() -> Iterator[str]:
        return scan_images(paths) if from_ is None else listed_images(from_)

    given = images()
    first = next(given, None)
    if first is None:
        raise UsageError(f"no image in {from_}: it should have names, one a line")
    found = chain([first], given)
    with uncollected():
        predictor = Predictor(
            run,
            top_k=top_k,
            batch_size=batch_size,
            tta=tta,
            abstain_below=abstain_below,
            workers=workers,
            engine=engine,
            device=device,
            precision=precision,
        )
        leave_out_what_is_there()
    if out is None:
        return _print(predictor, found, json=json)
    count = None if from_ == "-" else images
    return _write(predictor, found, out, count, resume=resume, overwrite=overwrite, json=json)


def _print(predictor: Predictor, images: Iterator[str], *, json: bool) -> int:
    from crossvit.results import plain_name, to_json

    failed = 0
    found = []
    for prediction in predictor.stream(images):
        failed += prediction.error is not None
        error = None if prediction.error is None else plain_name(prediction.error)
        shown = dataclasses.replace(prediction, image=plain_name(prediction.image), error=error)
        if json:
            found.append(to_json(shown))
        else:
            print(_line(shown, multi_label=predictor.multi_label))
    if json:
        record = {
            "run": predictor.trained.source,
            "n": len(found),
            "failed": failed,
            "predictions": found,
        }
        print(json_line(record))
    return 1 if failed else 0


def _line(prediction: Prediction, *, multi_label: bool) -> str:
    """The answer, and in brackets what else it might be."""
    name = "".join(
        letter if letter.isprintable() else "?" for letter in prediction.image
    )  # names come from files
    if prediction.error is not None:
        return f"{name}  error: {prediction.error.removeprefix(prediction.image + ': ')}"
    others = prediction.top
    if multi_label:
        answer = ", ".join(map(_said, prediction.labels)) or "no label"
        others = tuple(label for label in prediction.top if label not in prediction.labels)
    elif prediction.abstained:
        answer = "no answer"
    else:
        answer = f"{prediction.top[0].label}  {percent(prediction.top[0].probability)}"
        others = prediction.top[1:]
    rest = ", ".join(_said(label) for label in others if label.probability >= WORTH_SAYING)
    return f"{name}  {answer}" + (f"  ({rest})" if rest else "")


def _said(label: Label) -> str:
    return f"{label.label} {percent(label.probability)}"


def _write(
    predictor: Predictor,
    images: Iterator[str],
    out: str,
    count: Callable[[], Iterator[str]] | None,
    *,
    resume: bool,
    overwrite: bool,
    json: bool,
) -> int:
    from crossvit.prediction.to_file import predict_to_file
    from crossvit.results import to_json

    try:
        with _counting(count) as progress:
            result = predict_to_file(
                predictor, images, out, resume=resume, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt:
        print(
            f"crossvit: stopped; go on with the same command and --resume ({shlex.quote(out)} is kept)",
            file=sys.stderr,
        )
        return 130
    if json:
        print(json_line(to_json(result)))
        return 1 if result.failed else 0
    earlier = f", {result.skipped:,} of them earlier" if result.skipped else ""
    speed = (
        f" ({result.seconds:.0f} s, {result.images_per_second:,.1f} images/s)"
        if result.n > result.skipped
        else ""
    )
    print(f"images  {result.n:,}{earlier}{speed}")
    if result.failed:
        print(f"failed  {result.failed:,} could not be read: the results say why under `error`")
    if result.abstained:
        print(f"unsure  {result.abstained:,} without an answer")
    print(f"results {out}")
    return 1 if result.failed else 0


@contextlib.contextmanager
def _counting(images: Callable[[], Iterator[str]] | None) -> Iterator[Callable[[int], None]]:
    """Progress on stderr, called with the images done: a bar in a terminal, elsewhere a line now and then.

    How many there are, which the time left needs, is counted beside the work; it stays unknown for standard input (None).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total: int | None = None
    before: int | None = None  # images done when this process began
    started = said = time.monotonic()

    def count() -> None:
        nonlocal total
        with contextlib.suppress(
            Exception
        ):  # of a folder that vanishes meanwhile, the work itself tells
            total = sum(1 for _ in images()) if images is not None else None

    def show(done: int) -> None:
        nonlocal before, started, said
        now = time.monotonic()
        if before is None:
            before, started, said = done, now, now
        rate = (done - before) / max(now - started, 1e-9)
        progress.update(
            task,
            completed=done,
            total=total,
            figures=f"{rate:,.1f} images/s" if done > before else "",
        )
        if not console.is_terminal and now - said >= SECONDS_A_LINE:
            said = now
            left = (
                f" of {total:,}, {duration((total - done) / rate)} left"
                if total is not None and rate
                else ""
            )
            print(f"{done:,}{left} ({rate:,.1f} images/s)", file=sys.stderr)

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    threading.Thread(target=count, daemon=True).start()
    with Progress(
        *columns, *times, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("predicting", total=None, figures="")
        yield show
