"""Self-contained pages: about a finished run, and about what is in some data. No network, no script that is needed to read it."""

from __future__ import annotations

import base64
import json
import shlex
from typing import Any

import jinja2
from markupsafe import Markup

from crossvit.report.plots import curves
from crossvit.results import DataCheck, Evaluation, TrainingResult

LABELLED_CELLS = 20  # classes up to which the confusion matrix writes its counts and names; beyond it they show on hover


def run_page(result: TrainingResult, evaluation: Evaluation) -> str:
    """The HTML of a finished run: headline, curves, confusion matrix, classes, surest mistakes, configuration."""
    template = _environment().get_template("page.html")
    record = result.record
    return template.render(
        result=result,
        evaluation=evaluation,
        record=record,
        curves=[Markup(svg) for svg in curves(result.epochs)],  # noqa: S704  # our own SVGs
        confusion=_confusion_rows(evaluation),
        labelled=len(evaluation.classes) <= LABELLED_CELLS,
        worst_first=sorted(evaluation.classes, key=lambda score: (score.f1, score.label)),
        wrong=result.n - round(result.top1 * result.n),
        recipe=_flat(record["recipe"]),
        branches=record["config"]["branches"],
        configuration=json.dumps({key: value for key, value in record.items() if key != "data"}, indent=2, ensure_ascii=False),
        command=shlex.join(
            ["crossvit", "train", record["recipe"]["data"], "--recipe", result.run, "--out", f"{result.run}-again"]
        ),
    )


def data_page(found: DataCheck) -> str:
    """The HTML of what `crossvit data check` found, with the pairs as pictures."""
    largest = max(max(part.classes.values()) for part in found.parts[:1])
    return _environment().get_template("data.html").render(found=found, largest=max(largest, 1))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossvit", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\u202f%"
    environment.filters["picture"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["jpeg"] = lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    environment.filters["short"] = lambda path: "/".join(path.split("/")[-2:])
    return environment


def _confusion_rows(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """(true class, cells): each with its count, its share of the row (for the shade) and what to say on hover."""
    names = [score.label for score in evaluation.classes]
    rows = []
    for index, (name, counts) in enumerate(zip(names, evaluation.confusion.tolist(), strict=True)):
        total = max(sum(counts), 1)
        rows.append(
            (
                name,
                [
                    {
                        "count": count,
                        "share": count / total,
                        "right": column == index,
                        "says": f"{name} taken for {names[column]}: {count}",
                    }
                    for column, count in enumerate(counts)
                ],
            )
        )
    return rows


def _flat(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        rows += (
            [(f"{key}.{inner}", inner_value) for inner, inner_value in value.items()]
            if isinstance(value, dict)
            else [(key, value)]
        )
    return [(key, value) for key, value in rows if value is not None]
