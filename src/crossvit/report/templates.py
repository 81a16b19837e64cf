"""The templates of the pages and their filters."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources

import jinja2
from markupsafe import Markup

from crossvit.results import Evaluation, Interval
from crossvit.text import THIN, percent


def environment(*, script: bool = False) -> jinja2.Environment:
    """The templates.

    Args:
        script: Include the page's script, the only one that its policy allows (by digest).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossvit", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": functools.partial(percent, space=THIN),
        "points": lambda difference: f"{_signed(difference)}{THIN}points",
        "signed": _signed,
        "interval": _interval,
        "chance": _chance,
        "width": lambda share: f"{100 * share:.1f}%",
        "count": lambda number: f"{number:,}",
        "wrong": _wrong,
        "mean": lambda shares: sum(shares) / len(shares),
        "hardest": lambda corruptions: sorted(corruptions, key=lambda score: sum(score.top1)),
        "branch": _branch_name,
        "picture": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "jpeg": lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        "short": lambda path: "/".join(path.split("/")[-2:]),
        "last": lambda path: path.rstrip("/").split("/")[-1],
    }
    text = (
        importlib.resources.files("crossvit.report").joinpath("page.js").read_text(encoding="utf-8")
        if script
        else ""
    )
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    environment.globals |= {
        "script": Markup(text),  # noqa: S704  # the package's script
        "script_digest": f"'sha256-{digest}'" if script else "",
    }
    return environment


def _branch_name(name: str) -> str:
    """S and L in words, other branches by their number."""
    words = {"S": "fine-detail branch S", "L": "coarse branch L"}
    return words.get(name, f"branch {name}")


def _signed(difference: float) -> str:
    """A difference of shares in points, with its sign; a minus as wide as the plus."""
    points = round(100 * difference, 1)
    return f"{points:+.1f}".replace("-", "−") if points else "0.0"


def _chance(p: float) -> str:
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}" if p >= 0.0001 else "< 0.0001"


def _wrong(evaluation: Evaluation) -> int:
    return (
        evaluation.correct.count(False)
        if evaluation.correct
        else evaluation.n - round(evaluation.top1 * evaluation.n)
    )


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}{THIN}%"
