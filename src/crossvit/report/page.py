"""Self-contained pages: of a finished run, of an evaluation, of runs side by side, and of what is in some data.

No network at all (the page's own policy forbids it), and no script that is needed to read it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from crossvit.report import plots
from crossvit.report.matrix import Matrix, matrix_of
from crossvit.results import DataCheck, Evaluation, Interval, Mistake, TrainingResult

PICTURE_BYTES = 2_500_000  # of pictures and maps of mistakes that a page takes; as base64 a third more, of 5 MB in all
THIN = "\u202f"  # the narrow space before a per cent sign


def run_page(result: TrainingResult, evaluation: Evaluation) -> str:
    """The HTML of a finished run: how it learned, how good it is, where it fails, and how to train it again."""
    record = result.record
    again = ["crossvit", "train", record["recipe"]["data"], "--recipe", result.run, "--out", f"{result.run}-again"]
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


def evaluation_page(evaluation: Evaluation, *, command: str, record: Mapping[str, Any] | None = None) -> str:
    """The HTML of an evaluation. command: the one that made it; record: run.json, where what was evaluated is a run."""
    kind, again = "evaluation", "Measure it again"
    return _evaluated("evaluation.html", evaluation, record or {}, kind=kind, again=again, command=command)


def data_page(found: DataCheck) -> str:
    """The HTML of what `crossvit data check` found, with the pairs as pictures."""
    largest = max(max(part.classes.values()) for part in found.parts[:1])
    return _environment().get_template("data.html").render(found=found, largest=max(largest, 1))


def _evaluated(template: str, evaluation: Evaluation, record: Mapping[str, Any], **more: Any) -> str:
    matrix = matrix_of(evaluation)
    calibration, selective, robustness = evaluation.calibration, evaluation.selective, evaluation.robustness
    drawn = {
        "reliability": plots.reliability(calibration) if calibration else None,
        "risk_coverage": plots.risk_coverage(selective) if selective else None,
        "sizes": plots.sizes(robustness.sizes, evaluation.top1) if robustness and robustness.sizes else None,
    }
    data = record.get("data", {})
    return (
        _environment(script=True)
        .get_template(template)
        .render(
            evaluation=evaluation,
            record=record,
            model=record.get("model") or evaluation.run.rstrip("/").split("/")[-1],
            headline=evaluation.multi_label.map if evaluation.multi_label else evaluation.top1,
            notes=[*data.get("warnings", ()), *data.get("notes", ())],
            matrix=matrix,
            hardest=sorted(evaluation.classes, key=lambda score: (score.f1, score.label)),
            mistakes=_within_budget(evaluation.mistakes),
            sections=_sections(evaluation, matrix, curves=bool(more.get("curves"))),
            facts=_facts(evaluation, record),
            recipe=_flat(record.get("recipe", {})),
            whole=json.dumps({key: value for key, value in record.items() if key != "data"}, indent=2, ensure_ascii=False),
            **{name: svg and Markup(svg) for name, svg in drawn.items()},  # noqa: S704  # our own SVGs
            **more,
        )
    )


def _sections(evaluation: Evaluation, matrix: Matrix | None, *, curves: bool) -> list[tuple[str, str]]:
    """(anchor, title) of each section that the page has."""
    there = {
        ("learning", "Learning"): curves,
        ("branches", "Branches"): bool(evaluation.branches),
        ("confusion", "Confusion"): matrix is not None,
        ("classes", "Classes"): True,
        ("trust", "Confidence"): evaluation.calibration is not None or evaluation.selective is not None,
        ("robustness", "Worse images"): evaluation.robustness is not None,
        ("mistakes", "Mistakes"): True,
        ("again", "How it ran"): True,
    }
    return [section for section, shown in there.items() if shown]


def _facts(evaluation: Evaluation, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured and trained, how long it took and on what."""
    facts = [("measured on", f"{evaluation.n:,} {evaluation.split} images of {evaluation.data}")]
    if evaluation.seconds:
        rate = evaluation.n / evaluation.seconds
        facts.append(("evaluation", f"{_seconds(evaluation.seconds)} ({rate:,.0f} images a second)"))
    facts.append(("computed by", f"{evaluation.engine}, {evaluation.precision}"))
    facts.append(("loss", f"{evaluation.loss:.4f} nats, mean cross-entropy{' of each decision' * bool(evaluation.multi_label)}"))
    if record.get("result"):
        processes = record.get("processes", 1)
        several = f", {processes} processes" if processes > 1 else ""
        threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
        where = f"{record['device']}, {record['precision']}, {threads}{several}"
        facts.append(("training", f"{_seconds(record['result']['seconds'])} on {where}"))
    if record.get("versions"):
        versions = {"crossvit": record.get("crossvit"), **record["versions"]}
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    return facts


def _within_budget(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The first mistakes whose pictures together fit into PICTURE_BYTES."""
    kept, room = [], PICTURE_BYTES
    for mistake in mistakes:
        room -= len(mistake.picture) + len(mistake.map)
        if room < 0:
            break
        kept += [mistake] if mistake.picture else []
    return kept


# ---------------------------------------------------------------- templates and what they write figures with


def _environment(*, script: bool = False) -> jinja2.Environment:
    """Templates with our filters. script: with the page's script, which its policy knows by digest and lets nothing else run."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossvit", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": lambda difference: f"{100 * difference:+.1f}{THIN}points".replace("-", "−"),
        "interval": _interval,
        "width": lambda share: f"{100 * share:.1f}%",
        "count": lambda number: f"{number:,}",
        "wrong": lambda evaluation: evaluation.n - round(evaluation.top1 * evaluation.n),
        "mean": lambda shares: sum(shares) / len(shares),
        "hardest": lambda corruptions: sorted(corruptions, key=lambda one: sum(one.top1)),
        "picture": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "jpeg": lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        "short": lambda path: "/".join(path.split("/")[-2:]),
        "last": lambda path: path.rstrip("/").split("/")[-1],
    }
    text = importlib.resources.files("crossvit.report").joinpath("page.js").read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    environment.globals |= {
        "script": Markup(text),  # noqa: S704  # our own script
        "script_digest": f"'sha256-{digest}'" if script else "",
    }
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{THIN}%"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}{THIN}%"


def _seconds(seconds: float) -> str:
    """`4.2 s`, `130 s`, `35 min`, `3.4 h`."""
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _flat(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of a recipe, of nested ones as `outer.inner`, less what is not set."""
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        nested = value.items() if isinstance(value, dict) else ()
        rows += [(f"{key}.{inner}", own) for inner, own in nested] or [(key, value)]
    return [(key, value) for key, value in rows if value not in (None, "", [])]
