"""What people see of training in the terminal, progress on stderr, and tables of results on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from crossvit.text import duration, percent
from crossvit.train.callbacks import Callback

if TYPE_CHECKING:
    from crossvit.fast.explain import FormUsed
    from crossvit.model.paper_tables import Row
    from crossvit.results import DataCheck, DryRun, Epoch, ImagePair, TrainingResult


PAIRS_PRINTED = 8  # of each kind of finding; the rest are counted
TABLE_WIDTH = 100  # columns that the widest table takes


class TerminalCallback(Callback):
    """Draws a training run on stderr: a bar while it goes on, one line an epoch."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.epochs = 0
        self.training = False  # whether there is a run to go on with

    def __enter__(self) -> TerminalCallback:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.progress.stop()

    def on_message(self, line: str) -> None:
        self.console.print(line, markup=False)

    def on_check_start(self, total: int) -> None:
        self._show("checking images", total)

    def on_image_checked(self) -> None:
        assert self.task is not None
        self.progress.advance(self.task)

    def on_train_start(self, lines: Sequence[str], *, epochs: int, done: float, steps: int) -> None:
        for line in lines:
            self.on_message(line)
        self.epochs = epochs
        self.training = True
        self._show("training", epochs * steps, completed=round(done * steps))

    def on_step_end(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        assert self.task is not None
        figures = f"loss {loss:.3f}  top-1 {100 * top1:5.1f} %  {images_per_second:,.0f} img/s"
        self.progress.update(
            self.task, advance=1, description=f"epoch {epoch + 1}/{self.epochs}", figures=figures
        )

    def on_epoch_end(self, entry: Epoch) -> None:
        epoch = f"epoch {entry.epoch:>{len(str(self.epochs))}}/{self.epochs}"
        held_out = (
            f"{100 * entry.val_top1:5.1f} %"
            if entry.val_map is None
            else f"mAP {100 * entry.val_map:5.1f} %"
        )
        train = "-" if entry.train_top1 is None else f"{100 * entry.train_top1:5.1f} %"
        loss = "-" if entry.loss is None else f"{entry.loss:.3f}"
        skipped = f"  {entry.skipped} steps skipped (not finite)" if entry.skipped else ""
        pace = f"{entry.images_per_second:,.0f} img/s  {entry.seconds:.1f} s"
        self.on_message(
            f"{epoch}  loss {loss}  train {train}  held out {held_out}  {pace}{skipped}"
        )

    def _show(self, description: str, total: int, *, completed: int = 0) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(
            description, total=total, completed=completed, figures=""
        )


def print_training(result: TrainingResult) -> None:
    part, outcome = result.record.data.held_out_part, result.record.result
    epoch = outcome.selected_epoch if outcome else None
    precision = outcome.map if outcome else None  # of several labels an image
    score = (
        f"top-1  {percent(result.top1)} of"
        if precision is None
        else f"mAP    {percent(precision)} on"
    )
    print(f"{score} {result.n:,} {part} images ({result.seconds:.0f} s of training)")
    if epoch is not None:
        print(
            f"note   of epoch {epoch}, the best on these very images: expect a little less on new ones"
        )
    print(f"run    {result.run}")
    print(f"report {result.run}/report.html (open it in a browser)")


def print_dry_run(result: DryRun) -> None:
    steps = f"{result.steps:,} steps of {1000 * result.seconds_a_step:,.0f} ms"
    evaluation = f"{result.evaluation_seconds:.1f} s of evaluation"
    print(
        f"time    about {duration(result.total_seconds)}: {steps}, after each epoch {evaluation},"
    )
    print(
        f"        and {result.checkpoints:,} checkpoints of {1000 * result.checkpoint_seconds:,.0f} ms"
    )
    processes = f", {result.processes} processes" if result.processes > 1 else ""
    print(f"memory  {result.peak_bytes / 1e6:,.0f} MB at the most{processes}")
    print(f"disk    {result.checkpoint_bytes / 1e6:,.1f} MB a checkpoint")


def print_models(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        Column("model", no_wrap=True), "input", box=None, pad_edge=False, header_style="bold"
    )
    for heading in ("parameters", "MACs", "paper top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for row in rows:
        height, width = row["image_size"]
        top1 = "" if row["paper_top1"] is None else f"{row['paper_top1']:.1f} %"
        parameters, macs = f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e9:.3f} G"
        table.add_row(
            row["name"],
            f"{height}x{width}",
            parameters,
            macs,
            top1,
            "released" if row["weights"] else "",
        )
    _wide_console().print(table)


def print_forms(name: str, machine: str, rows: Sequence[FormUsed]) -> None:
    """Which form computes each kind of module, a table for each situation."""
    print(f"{name} on {machine}")
    for situation in dict.fromkeys(row.situation for row in rows):
        table = Table(
            Column(situation, no_wrap=True, min_width=22),
            Column("n", justify="right"),
            Column("computed by", no_wrap=True, min_width=28),
            "why not faster",
            box=None,
            pad_edge=False,
            header_style="bold",
        )
        for row in rows:
            if row.situation == situation:
                n = "" if row.n is None else str(row.n)
                table.add_row(row.module, n, row.form, row.reason)
        print()
        _wide_console().print(table)


def print_data_check(found: DataCheck) -> None:
    """What was found: parts, classes, and what is wrong, the worst first."""
    for part in found.parts:
        low, middle, high = (
            f"{height}x{width}" for height, width in (part.smallest, part.median, part.largest)
        )
        sizes = low if low == high else f"{low} to {high}, typically {middle}"
        print(f"{part.part:8} {part.n:,} images of {len(part.classes)} classes, {sizes} pixels")
    modes = ", ".join(f"{count:,} {mode}" for mode, count in found.modes.items())
    print(
        f"modes    {modes}; the largest class has {found.imbalance:.1f} times the images of the smallest"
    )
    table = Table(Column("class", no_wrap=True), box=None, pad_edge=False, header_style="bold")
    for part in found.parts:
        table.add_column(part.part, justify="right")
    for name in found.parts[0].classes:
        table.add_row(name, *(str(part.classes.get(name, 0)) for part in found.parts))
    _wide_console().print(table)
    for note in found.notes:
        print(f"note     {note}")
    for broken in found.broken[:PAIRS_PRINTED]:
        print(f"broken   {broken.reason}")
    if len(found.broken) > PAIRS_PRINTED:
        print(f"broken   and {len(found.broken) - PAIRS_PRINTED} more (--json lists them)")
    for what, count, pairs in (
        ("same", found.identical_count, found.identical),
        ("near", found.near_count, found.near),
    ):
        for pair in pairs[:PAIRS_PRINTED]:
            print(f"{what:8} {' and '.join(pair.images)}{_wrong_with(pair)}")
        if count > PAIRS_PRINTED:
            print(f"{what:8} and {count - PAIRS_PRINTED:,} more (--report draws them)")
    print(
        f"in all   {len(found.broken)} broken; {found.identical_count:,} exact duplicates "
        f"({found.conflict_count:,} filed under two classes), {found.near_count:,} near-duplicates; "
        f"{found.leak_count:,} of these shared by two parts of the split"
    )


def _wrong_with(pair: ImagePair) -> str:
    wrong = [f"in {' and '.join(pair.parts)}"] * pair.leak + [
        f"labelled {' and '.join(pair.labels)}"
    ] * pair.conflict
    return f" ({'; '.join(wrong)})" if wrong else ""


def print_paper(rows: Sequence[Row], tables: Mapping[str, str]) -> None:
    """Each table of the paper: printed figures, ours behind them, a mark and the reason where they differ."""
    console = _wide_console()
    for name, subject in tables.items():
        table = Table(
            Column("row", no_wrap=True),
            Column("model", no_wrap=True),
            box=None,
            pad_edge=False,
            header_style="bold",
            title=f"{name}: {subject}",
            title_justify="left",
        )
        for heading in ("top-1", "GMACs", "ours", "M params", "ours"):
            table.add_column(heading, justify="right")
        reasons = []
        for row in rows:
            if row.table != name:
                continue
            ours, printed, differing = row.ours(), row.printed(), row.differing()
            cells = [f"{row.top1:.1f}"]
            for heading, value in printed.items():
                cells += [
                    f"{value:.1f}",
                    f"{ours[heading]:.1f}{'*' if heading in differing else ' '}",
                ]
            table.add_row(row.label, row.model, *cells)
            reasons += [
                f"* {row.label}, {heading}: {reason}" for heading, reason in differing.items()
            ]
        console.print(table)
        for line in reasons:
            console.print(line, soft_wrap=True, markup=False)
        console.print()


def _wide_console() -> Console:
    """Standard output, wide enough that a table is not cut: a terminal wraps it or a pipe takes it whole."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    return console
