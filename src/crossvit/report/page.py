"""report.html: one self-contained page about a finished run. No network, no script that is needed to read it."""

from __future__ import annotations

import base64
import json
import shlex
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from crossvit.report.plots import curves
from crossvit.results import Evaluation, TrainingResult

LABELLED_CELLS = 20  # classes up to which the confusion matrix writes its counts and names; beyond it they show on hover


def run_page(result: TrainingResult, evaluation: Evaluation) -> str:
    """The HTML of a finished run: headline, curves, confusion matrix, classes, surest mistakes, configuration."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\u202f%"
    environment.filters["picture"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["short"] = lambda path: "/".join(path.split("/")[-2:])
    template = environment.from_string((resources.files("crossvit") / "report" / "page.html").read_text(encoding="utf-8"))
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
