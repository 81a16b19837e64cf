"""Comparison of runs: all on the same images, with a paired test of each against the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossvit.data.images import HELD_OUT_PARTS
from crossvit.errors import ConfigError, UsageError
from crossvit.evaluation.bootstrap import compare
from crossvit.evaluation.evaluator import evaluate
from crossvit.model.config import CrossViTConfig
from crossvit.model.cost import cost
from crossvit.results import ComparedRun, DataRecord, Epoch, Evaluation, RunRecord, RunsCompared
from crossvit.run import Run
from crossvit.weights.identify import blank_state

OF_THE_MACHINE = frozenset({"out", "workers", "skip_bad"})  # fields without effect on the model


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

    Args:
        runs: Run folders.
        data: By default the images that all of them held out, where those are the same.
        split: As for `evaluate`.
        batch_size: As for `evaluate`.
        device: As for `evaluate`.
        precision: As for `evaluate`.
        skip_bad: As for `evaluate`.
        progress: Called with (images done, images in all), each image counted for every run.

    Raises:
        UsageError: Where the runs held out different images or are measured on different ones.
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
        tests=tuple(compare(first, second) for second in evaluations[1:]),
        differing=differing([{**record.recipe, "model": record.model} for record in records]),
    )


def common_data(records: Mapping[str, RunRecord]) -> str:
    """Where the held-out images of all of these runs are.

    They are the same by name and size where the run split them off, and by the fingerprint of the
    data where that has a part for them.

    Args:
        records: run.json of each run, by its name.

    Raises:
        UsageError: Unless all held out the same images.
    """
    held_out = {name: _held_out(record.data) for name, record in records.items()}
    first = next(iter(records))
    for name, identity in held_out.items():
        if identity != held_out[first]:
            raise UsageError(
                f"{first} and {name} held out different images, so their scores cannot be "
                "compared: give images that are new to both with --data DATA"
            )
    location: str = records[first].recipe["data"]
    return location


def _held_out(data: DataRecord) -> tuple[Any, ...]:
    """What is equal for two runs only if they held out the same images."""
    if data.held_out_part in HELD_OUT_PARTS:
        return data.held_out_part, data.fingerprint
    return data.held_out_part, frozenset(data.held_out.items())


def _refuse_other_images(
    first_name: str, first: Evaluation, second_name: str, second: Evaluation
) -> None:
    if set(first.images) != set(second.images):
        common = len(set(first.images) & set(second.images))
        raise UsageError(
            f"{first_name} and {second_name} were measured on different images of {first.data} "
            f"({first.n:,} and {second.n:,}, {common:,} in common), because each leaves out what "
            "it was trained on: give --data that is new to both"
        )


def _compared(name: str, run: Run, record: RunRecord, evaluation: Evaluation) -> ComparedRun:
    assert record.result is not None
    parameters, macs = _cost(CrossViTConfig.from_dict(record.config))
    return ComparedRun(
        name=name,
        run=str(run.path),
        model=record.model,
        parameters=parameters,
        macs=macs,
        seconds=record.result.seconds,
        evaluation=evaluation,
        record=record,
        epochs=tuple(Epoch(**entry) for entry in run.entries()),
    )


def _cost(config: CrossViTConfig) -> tuple[int, int | None]:
    """(parameters, multiply-accumulates of an image); None for parts that are not built in."""
    try:
        total = cost(config)["total"]
    except ConfigError:
        return sum(tensor.numel() for tensor in blank_state(config).values()), None
    return total.parameters, total.macs


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest distinct ends of the paths; UsageError for a path that is given twice."""
    all_parts = [Path(path).parts for path in paths]
    for index, parts in enumerate(all_parts):
        if parts in all_parts[:index]:
            raise UsageError(f"{paths[index]} is given twice: leave one out")
    names = []
    for parts in all_parts:
        rest = [path for path in all_parts if path != parts]
        sizes = range(1, len(parts) + 1)
        distinct = (size for size in sizes if all(path[-size:] != parts[-size:] for path in rest))
        names.append(str(Path(*parts[-next(distinct, len(parts)) :])))
    return names


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Fields in which recipes differ, nested ones as `outer.inner`, with the values in each."""
    flat = [_flat(recipe) for recipe in recipes]
    fields = dict.fromkeys(field for recipe in flat for field in recipe)
    values = {
        field: tuple(recipe.get(field) for recipe in flat)
        for field in fields
        if field not in OF_THE_MACHINE
    }
    return {field: row for field, row in values.items() if any(value != row[0] for value in row)}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, value in recipe.items():
        flat |= (
            {f"{field}.{inner}": nested for inner, nested in value.items()}
            if isinstance(value, Mapping)
            else {field: value}
        )
    return flat
