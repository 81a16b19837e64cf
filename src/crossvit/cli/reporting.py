"""The verb `crossvit report`, and what it prints."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, TypedDict

from crossvit.cli.flag import Switch
from crossvit.text import json_line, percent

if TYPE_CHECKING:
    from crossvit.results import RunsCompared

PAGE = "compare.html"


class Measuring(TypedDict):
    """How every run is evaluated."""

    split: str | None
    batch_size: int
    device: str
    precision: str
    skip_bad: bool


def report(
    run: str,
    /,
    *others: str,
    data: str | None = None,
    split: str | None = None,
    out: str | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    device: str = "auto",
    skip_bad: Switch = False,
    json: Switch = False,
) -> int:
    """Write the page of a run anew, or compare runs side by side: scores on the same images with a paired test, curves, classes,
    branches, cost, and what differs in their recipes.

    Parameters
    ----------
    run
        A finished run.
    others
        Runs to compare with it. Without --data, all of them must have held out the same images.
    data
        Images to measure on, as for `evaluate`, where they are not the held-out images, or those have moved.
    split
        Take this part of the images, as for `evaluate`.
    out
        The page to write: by default the run's own report.html, or compare.html here for several runs.
    batch_size
        Images a step.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    skip_bad
        Leave out images that cannot be decoded instead of stopping.
    json
        Print one JSON object on stdout.
    """
    from pathlib import Path

    from crossvit.cli.evaluating import print_evaluation
    from crossvit.cli.progress import counting
    from crossvit.errors import UsageError
    from crossvit.evaluation.comparison import compare_runs
    from crossvit.evaluation.evaluator import evaluate
    from crossvit.files import write_atomically
    from crossvit.report.comparison import comparison_page
    from crossvit.report.page import run_page
    from crossvit.results import TrainingResult, to_json
    from crossvit.run import Run

    page = Path(out) if out else Path(PAGE) if others else Run(run).report_path
    if page.is_dir() or (out and not page.absolute().parent.is_dir()):
        raise UsageError(f"--out {page} cannot be a file: name one in a folder that is there")
    how = Measuring(
        split=split, batch_size=batch_size, device=device, precision=precision, skip_bad=skip_bad
    )
    if others:
        with counting("evaluating") as progress:
            compared = compare_runs([run, *others], data=data, progress=progress, **how)
        given = {"--data": data, "--split": split, "--out": out}
        options = [
            word for option, value in given.items() if value is not None for word in (option, value)
        ]
        text = comparison_page(
            compared, command=shlex.join(["crossvit", "report", run, *others, *options])
        )
    else:
        folder = Run(run)
        record = folder.finished_record()
        with counting("evaluating") as progress:
            evaluation = evaluate(
                run, data or record.recipe["data"], maps=True, progress=progress, **how
            )
        result = TrainingResult.of_finished(str(folder.path), record, folder.entries())
        text = run_page(result, evaluation)
    write_atomically(page, text.encode("utf-8", "surrogateescape"))
    if json:
        print(json_line(to_json(compared if others else evaluation)))
        return 0
    if others:
        print_comparison(compared)
    else:
        print_evaluation(evaluation)
    print(f"report {page} (open it in a browser)")
    return 0


def print_comparison(found: RunsCompared) -> None:
    """Print a line for each run and one for each test against the first; tables are in the JSON and on the page."""
    print(f"data   the same {found.n:,} {found.split} images of {found.data}")
    width = max(len(run.name) for run in found.runs)
    for run in found.runs:
        figures = run.evaluation
        interval = figures.intervals.get("top1")
        between = f" [{100 * interval.low:.1f} to {100 * interval.high:.1f}]" if interval else ""
        branches = ", ".join(
            f"branch {branch.name} {percent(branch.top1)}" for branch in figures.branches
        )
        macs = "" if run.macs is None else f"{run.macs / 1e9:.3f} GMACs, "
        cost = f"{run.parameters / 1e6:.2f} M parameters, {macs}{run.seconds:.0f} s of training"
        print(f"{run.name:{width}}  top-1 {percent(figures.top1)}{between}  {branches}  {cost}")
    first = found.runs[0].name
    for run, test in zip(found.runs[1:], found.tests, strict=True):
        interval = test.interval
        print(
            f"{run.name:{width}}  against {first}: {100 * test.difference:+.1f} points "
            f"[{100 * interval.low:+.1f} to {100 * interval.high:+.1f}], p {test.p:.2g} "
            f"(only {run.name} correct: {test.only_second:,}, only {first}: {test.only_first:,})"
        )
