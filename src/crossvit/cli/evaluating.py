"""The verb `crossvit evaluate`, and what it prints."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.text import json_line, percent

if TYPE_CHECKING:
    from crossvit.results import (
        Calibration,
        Evaluation,
        Interval,
        MultiLabel,
        Robustness,
        Selective,
    )

TOP5_FROM = 10  # classes from which top-5 says something
HARDEST = 3  # classes that are named
SAME_TEMPERATURE = 0.01  # relative difference up to which two temperatures count as equal
WORKERS_AT_MOST = 8

Sizes = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())]


def evaluate(
    run: str,
    data: str,
    /,
    *,
    split: str | None = None,
    report: str | None = None,
    calibrate: Switch = False,
    target_risk: float | None = None,
    corruptions: Switch = False,
    sizes: Sizes = (),
    robustness_images: int = 1000,
    workers: int | None = None,
    batch_size: int = 64,
    engine: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    skip_bad: Switch = False,
    json: Switch = False,
) -> int:
    """Measure a trained model on labelled images: accuracy with intervals, per class and branch, calibration, and when asked
    robustness to pictures that get worse.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`, a weight file, or a name on the hub such as timm/crossvit_15_dagger_240.in1k.
    data
        As for `train`. Of data with val/ or test/ that part is taken, of the data the run was split from its held-out
        part, otherwise every image.
    split
        Take this part instead: train, val or test where the data has them, all where it has none, or held-out.
    report
        Write a page with every figure, the plots and the most confident mistakes to this file.
    calibrate
        Store the temperature that fits these images in the run, so that its confidence matches its accuracy, and measure
        with it. Only with images the run was not trained on.
    target_risk
        The share of answers that may be wrong, 0 to 1: a confidence is suggested below which to give no answer. By default
        half the share that is wrong if every image is answered.
    corruptions
        Measure on pictures with noise, blur, weather and digital faults too: 15 kinds at 5 severities.
    sizes
        Measure on pictures scaled down to these shorter sides too, in pixels: --sizes 128 64 32.
    robustness_images
        Images that --corruptions and --sizes measure, spread evenly over all.
    workers
        Processes that corrupt the pictures for --corruptions and --sizes; 0 does it in this one. By default one a processor.
    batch_size
        Images a step.
    engine
        Inference engine: torch, onnxruntime, openvino, or auto, the fastest here by trial.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    skip_bad
        Leave out images that cannot be decoded instead of stopping.
    json
        Print one JSON object on stdout.
    """
    import os
    from pathlib import Path

    import crossvit
    from crossvit.cli.progress import counting
    from crossvit.errors import UsageError
    from crossvit.evaluation.robustness import CORRUPTIONS
    from crossvit.files import write_atomically
    from crossvit.report.page import evaluation_page
    from crossvit.results import to_json
    from crossvit.run import Run

    if report is not None and (
        Path(report).is_dir() or not Path(report).absolute().parent.is_dir()
    ):
        raise UsageError(f"--report {report} cannot be a file: name one in a folder that is there")
    with counting("evaluating") as progress:
        result = crossvit.evaluate(
            run,
            data,
            split=split,
            batch_size=batch_size,
            engine=engine,
            device=device,
            precision=precision,
            skip_bad=skip_bad,
            target_risk=target_risk,
            calibrate=calibrate,
            corruptions=CORRUPTIONS if corruptions else (),
            sizes=sizes,
            robustness_images=robustness_images,
            workers=min(os.cpu_count() or 1, WORKERS_AT_MOST) if workers is None else workers,
            maps=report is not None,
            progress=progress,
        )
    if report is not None:
        given = {"--split": split, "--target-risk": target_risk}
        words = [
            word
            for option, value in given.items()
            if value is not None
            for word in (option, str(value))
        ]
        words += (
            ["--corruptions"] * corruptions
            + (["--sizes", *map(str, sizes)] if sizes else [])
            + ["--skip-bad"] * skip_bad
        )
        command = shlex.join(["crossvit", "evaluate", run, data, *words, "--report", report])
        record = Run(run).record() if Run(run).exists() else None
        page = evaluation_page(result, command=command, record=record)
        write_atomically(Path(report), page.encode("utf-8", "surrogateescape"))
    if json:
        print(json_line(to_json(result)))
    else:
        print_evaluation(result)
        if report is not None:
            print(f"page         {report}")
    return 0


def print_evaluation(result: Evaluation) -> None:
    """The figures for people, the most asked for first; what has a whole table is in the JSON and on the page."""
    correct = round(result.top1 * result.n)
    part = f"all {result.n:,}" if result.split == "all" else f"{result.n:,} {result.split}"
    of = f"({correct:,} of {part} images of {result.data})"
    print(f"top-1  {percent(result.top1)}{_between(result.intervals.get('top1'))}  {of}")
    if len(result.classes) >= TOP5_FROM:
        print(f"top-5  {percent(result.top5)}{_between(result.intervals.get('top5'))}")
    print(
        f"F1     {percent(result.macro_f1)}{_between(result.intervals.get('macro_f1'))}  (mean over the classes)"
    )
    if result.multi_label is not None:
        _print_multi_label(result.multi_label, result.intervals.get("map"))
    for branch in result.branches:
        print(f"branch {branch.name} alone  {percent(branch.top1)}  ({branch.patch}-pixel patches)")
    hardest = sorted((score for score in result.classes if score.n), key=lambda score: score.f1)[
        :HARDEST
    ]
    print(
        "hardest classes  "
        + ", ".join(f"{score.label} (F1 {percent(score.f1)})" for score in hardest)
    )
    if result.calibration is not None:
        _print_calibration(result.calibration, result.run)
    if result.selective is not None:
        _print_selective(result.selective)
    if result.robustness is not None:
        _print_robustness(result.robustness)


def _print_multi_label(scores: MultiLabel, interval: Interval | None) -> None:
    print(
        f"mAP    {percent(scores.map)}{_between(interval)}  (mean average precision of the classes)"
    )
    print(
        f"exact  {percent(scores.exact)}  of images have just their classes; F1 over all decisions {percent(scores.micro_f1)}"
    )


def _print_calibration(found: Calibration, run: str) -> None:
    was = found.replaced or found
    surplus = sum(row.n * (row.confidence - row.accuracy) for row in was.bins)
    stated = "overstated" if surplus > 0 else "understated"
    ece = f"ECE {percent(was.ece)} at temperature {was.temperature:.2f}"
    if math.isclose(was.temperature, was.suggested_temperature, rel_tol=SAME_TEMPERATURE):
        advice = ", the best for these images"
    else:
        by_hand = "" if found.stored else " (--calibrate stores it)"
        advice = f"; {percent(was.suggested_ece)} at {was.suggested_temperature:.2f}{by_hand}"
    points = round(100 * was.ece)
    print(
        f"calibration  confidence is {stated} by about {points} point{'s' * (points != 1)}: {ece}{advice}"
    )
    if found.stored:
        print(
            f"stored       temperature {found.temperature:.4g} in {run}/run.json, in place of {was.temperature:.4g}"
        )


def _print_selective(found: Selective) -> None:
    if found.suggested is None:
        print(
            f"abstention   no confidence threshold gets wrong answers down to {percent(found.target_risk)}"
        )
        return
    point = found.suggested
    print(
        f"abstention   ignore answers below a confidence of {percent(point.threshold)}: {percent(point.coverage)} of the "
        f"images get one, and {percent(point.risk)} of those are wrong (target: at most {percent(found.target_risk)})"
    )


def _print_robustness(found: Robustness) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    print(f"robustness   top-1 {percent(found.unspoilt)} of {found.n:,} unchanged images", end="")
    print("" if found.mean is None else f", {percent(found.mean)} on average over corruptions")
    if found.corruptions:
        table = Table(
            Column("corruption", no_wrap=True), box=None, pad_edge=False, header_style="bold"
        )
        for severity in range(1, len(found.corruptions[0].top1) + 1):
            table.add_column(f"{severity}", justify="right", no_wrap=True)
        for score in found.corruptions:
            table.add_row(score.name.replace("_", " "), *map(percent, score.top1))
        console.print(table)
    if found.sizes:
        table = Table(
            Column("shorter side", no_wrap=True), box=None, pad_edge=False, header_style="bold"
        )
        table.add_column("top-1", justify="right")
        for size in found.sizes:
            table.add_row(f"{size.pixels} pixels", percent(size.top1))
        console.print(table)


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" [{100 * interval.low:.1f} to {100 * interval.high:.1f}]"
