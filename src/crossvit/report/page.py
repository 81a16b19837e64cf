"""Self-contained pages: of a finished run, of an evaluation, and of what is in some data.

No network at all (the page's own policy forbids it), and no script that is needed to read it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from crossvit.report import plots
from crossvit.report.matrix import Matrix, matrix_of
from crossvit.report.templates import environment
from crossvit.results import DataCheck, Evaluation, Mistake, RunRecord, TrainingResult
from crossvit.text import measured_duration

# Of the pictures and maps of mistakes on a page; a third more as base64, of 5 MB for a page.
PICTURE_BYTES = 2_500_000


def run_page(result: TrainingResult, evaluation: Evaluation) -> str:
    """HTML of a finished run: learning curves, metrics, mistakes, and the command to repeat it.

    Args:
        result: The run.
        evaluation: Of its weights, on the held-out images.
    """
    record = result.record
    again = [
        "crossvit",
        "train",
        record.recipe["data"],
        "--recipe",
        result.run,
        "--out",
        f"{result.run}-again",
    ]
    return _evaluated(
        "run.html",
        evaluation,
        record,
        kind="training run",
        again="Train it again",
        command=shlex.join(again),
        curves=[Markup(svg) for svg in plots.curves(result.epochs)] if result.epochs else [],  # noqa: S704  # our own SVGs
        epochs=len(result.epochs),
        skipped=sum(entry.skipped for entry in result.epochs),
    )


def evaluation_page(
    evaluation: Evaluation, *, command: str, record: RunRecord | None = None
) -> str:
    """The HTML of an evaluation.

    Args:
        evaluation: What to show.
        command: The command that made it.
        record: run.json, where a run was evaluated.
    """
    kind, again = "evaluation", "Measure it again"
    return _evaluated(
        "evaluation.html", evaluation, record, kind=kind, again=again, command=command
    )


def data_page(found: DataCheck) -> str:
    """The HTML of what `crossvit data check` found, with the pairs as pictures."""
    largest = max(max(part.classes.values()) for part in found.parts[:1])
    return environment().get_template("data.html").render(found=found, largest=max(largest, 1))


def _evaluated(template: str, evaluation: Evaluation, record: RunRecord | None, **more: Any) -> str:
    matrix = matrix_of(evaluation)
    calibration, selective, robustness = (
        evaluation.calibration,
        evaluation.selective,
        evaluation.robustness,
    )
    drawn = {
        "reliability": plots.reliability(calibration) if calibration else None,
        "risk_coverage": plots.risk_coverage(selective) if selective else None,
        "sizes": plots.sizes(robustness.sizes, robustness.unspoilt)
        if robustness and robustness.sizes
        else None,
    }
    whole = {} if record is None else record.to_dict()
    whole.pop("data", None)  # as long as the list of held-out images
    return (
        environment(script=True)
        .get_template(template)
        .render(
            evaluation=evaluation,
            record=record,
            model=record.model if record else evaluation.run.rstrip("/").split("/")[-1],
            headline=evaluation.multi_label.map if evaluation.multi_label else evaluation.top1,
            notes=[*record.data.warnings, *record.data.notes] if record else [],
            matrix=matrix,
            hardest=sorted(evaluation.classes, key=lambda score: (score.f1, score.label)),
            mistakes=_within_budget(evaluation.mistakes),
            sections=_sections(evaluation, matrix, curves=bool(more.get("curves"))),
            facts=_facts(evaluation, record),
            recipe=_flat(record.recipe) if record else [],
            whole=json.dumps(whole, indent=2, ensure_ascii=False),
            **{name: svg and Markup(svg) for name, svg in drawn.items()},  # noqa: S704  # our own SVGs
            **more,
        )
    )


def _sections(
    evaluation: Evaluation, matrix: Matrix | None, *, curves: bool
) -> list[tuple[str, str]]:
    """(anchor, title) of each section that the page has."""
    sections = {
        ("learning", "Learning curves"): curves,
        ("branches", "Branches"): bool(evaluation.branches),
        ("confusion", "Confusion matrix"): matrix is not None,
        ("classes", "Per-class results"): True,
        ("trust", "Calibration"): evaluation.calibration is not None
        or evaluation.selective is not None,
        ("robustness", "Robustness"): evaluation.robustness is not None,
        ("mistakes", "Mistakes"): bool(evaluation.mistakes) or evaluation.top1 == 1,
        ("again", "Run details"): True,
    }
    return [section for section, present in sections.items() if present]


def _facts(evaluation: Evaluation, record: RunRecord | None) -> list[tuple[str, str]]:
    """What was measured and trained, how long it took and on what."""
    facts = [("measured on", f"{evaluation.n:,} {evaluation.split} images of {evaluation.data}")]
    if evaluation.seconds:
        rate = evaluation.n / evaluation.seconds
        facts.append(
            ("evaluation", f"{measured_duration(evaluation.seconds)} ({rate:,.0f} images a second)")
        )
    facts.append(("inference engine", f"{evaluation.engine}, {evaluation.precision}"))
    each = " of each decision" if evaluation.multi_label else ""
    facts.append(("loss", f"{evaluation.loss:.4f} nats, mean cross-entropy{each}"))
    if record is None:
        return facts
    if record.result is not None:
        several = f", {record.processes} processes" if record.processes > 1 else ""
        threads = f"{record.threads} thread{'s' * (record.threads != 1)}"
        where = f"{record.device}, {record.precision}, {threads}{several}"
        facts.append(("training", f"{measured_duration(record.result.seconds)} on {where}"))
    versions = {"crossvit": record.crossvit, **record.versions}
    facts.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return facts


def _within_budget(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The first mistakes whose pictures together fit into PICTURE_BYTES."""
    shown, room = [], PICTURE_BYTES
    for mistake in mistakes:
        room -= len(mistake.picture) + len(mistake.map)
        if room < 0:
            break
        shown += [mistake] if mistake.picture else []
    return shown


def _flat(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of a recipe, of nested ones as `outer.inner`, less what is not set."""
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        nested = value.items() if isinstance(value, dict) else ()
        rows += [(f"{key}.{inner}", setting) for inner, setting in nested] or [(key, value)]
    return [(key, value) for key, value in rows if value not in (None, "", [])]
