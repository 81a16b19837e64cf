"""Runs side by side: each evaluated on the same images, and a paired test of each against the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossvit.data.images import HELD_OUT_PARTS
from crossvit.errors import UsageError
from crossvit.evaluation.bootstrap import compare
from crossvit.evaluation.evaluator import evaluate
from crossvit.model.config import CrossViTConfig
from crossvit.model.cost import cost
from crossvit.results import ComparedRun, DataRecord, Epoch, Evaluation, RunRecord, RunsCompared
from crossvit.run import Run

OF_THE_MACHINE = frozenset(
    {"out", "workers", "skip_bad"}
)  # fields of a recipe that say nothing of the model it makes


def compare_runs(
    runs: Sequence[str | Path],
    *,
    data: str | Path | None = None,
    split: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    skip_bad: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> RunsCompared:
    """Evaluate two or more finished runs on the same images and compare them.

    data: without it the images that all of them held out, where those are the same. split, batch_size, device, precision,
    skip_bad: as for `evaluate`. progress: called with (images done, images in all), each counted once for every run.
    Raises UsageError where the runs held out different images or are measured on different images of `data`.
    """
    folders = [Run(run) for run in runs]
    names = short_names([str(run.path) for run in folders])
    if len(names) < 2:
        raise UsageError("one run has nothing to be compared with: give two or more")
    records = [run.finished_record() for run in folders]
    if data is None:
        data = common_data(dict(zip(names, records, strict=True)))

    def after(runs_done: int) -> Callable[[int, int], object]:
        return lambda done, total: progress(runs_done * total + done, len(folders) * total)

    evaluations: list[Evaluation] = []
    for run, name in zip(folders, names, strict=True):
        evaluations.append(
            evaluate(
                run.path,
                data,
                split=split,
                batch_size=batch_size,
                device=device,
                precision=precision,
                skip_bad=skip_bad,
                progress=after(len(evaluations)),
            )
        )
        _refuse_other_images(names[0], evaluations[0], name, evaluations[-1])
    first = evaluations[0]
    return RunsCompared(
        data=str(data),
        split=first.split,
        n=first.n,
        runs=tuple(
            _compared(name, run, record, evaluation)
            for name, run, record, evaluation in zip(
                names, folders, records, evaluations, strict=True
            )
        ),
        tests=tuple(compare(first, other) for other in evaluations[1:]),
        differing=differing([{**record.recipe, "model": record.model} for record in records]),
    )


def common_data(records: Mapping[str, RunRecord]) -> str:
    """Where the held-out images of all of these runs (run.json by name) are. UsageError unless they are the same images: by name
    and size where the run held them out itself, by the fingerprint of the data where that has a part for them."""
    held_out = {name: _held_out(record.data) for name, record in records.items()}
    first = next(iter(records))
    for name, own in held_out.items():
        if own != held_out[first]:
            raise UsageError(
                f"{first} and {name} held out different images, so their scores cannot be compared: give images that are new to "
                "both with --data DATA"
            )
    location: str = records[first].recipe["data"]
    return location


def _held_out(data: DataRecord) -> tuple[Any, ...]:
    """What tells the held-out images of one run from those of another."""
    if data.held_out_part in HELD_OUT_PARTS:
        return data.held_out_part, data.fingerprint
    return data.held_out_part, frozenset(data.held_out.items())


def _refuse_other_images(first: str, own: Evaluation, name: str, other: Evaluation) -> None:
    if set(own.images) != set(other.images):
        common = len(set(own.images) & set(other.images))
        raise UsageError(
            f"{first} and {name} were measured on different images of {own.data} ({own.n:,} and {other.n:,}, {common:,} in "
            "common), because each leaves out what it was trained on: give --data that is new to both"
        )


def _compared(name: str, run: Run, record: RunRecord, evaluation: Evaluation) -> ComparedRun:
    assert record.result is not None
    total = cost(CrossViTConfig.from_dict(record.config))["total"]
    return ComparedRun(
        name=name,
        run=str(run.path),
        model=record.model,
        parameters=total.parameters,
        macs=total.macs,
        seconds=record.result.seconds,
        evaluation=evaluation,
        record=record,
        epochs=tuple(Epoch(**entry) for entry in run.entries()),
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart. UsageError for a path that is there twice."""
    parts = [Path(path).parts for path in paths]
    for index, own in enumerate(parts):
        if own in parts[:index]:
            raise UsageError(f"{paths[index]} is given twice: leave one out")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(
            (
                size
                for size in range(1, len(own) + 1)
                if all(other[-size:] != own[-size:] for other in others)
            ),
            len(own),
        )
        names.append(str(Path(*own[-length:])))
    return names


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The fields in which recipes differ, nested ones as `outer.inner`, and their values in each."""
    flat = [_flat(recipe) for recipe in recipes]
    fields = dict.fromkeys(field for recipe in flat for field in recipe)
    values = {
        field: tuple(recipe.get(field) for recipe in flat)
        for field in fields
        if field not in OF_THE_MACHINE
    }
    return {field: own for field, own in values.items() if any(value != own[0] for value in own)}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, value in recipe.items():
        found |= (
            {f"{field}.{inner}": own for inner, own in value.items()}
            if isinstance(value, Mapping)
            else {field: value}
        )
    return found
