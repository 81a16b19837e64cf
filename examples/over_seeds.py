"""How the examples compare ways of training over several seeds: each score, their mean and their standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def print_seed(seed: int, scores: Mapping[str, Sequence[float]]) -> None:
    """The newest score of each way, in %."""
    print(
        f"seed {seed}: " + ", ".join(f"{name} {found[-1]:.2f} %" for name, found in scores.items()),
        flush=True,
    )


def print_scores(
    scores: Mapping[str, Sequence[float]], *, beside: Mapping[str, str] | None = None
) -> None:
    """A line for each way, with what stands `beside` it."""
    width = max(map(len, scores))
    for name, found in scores.items():
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in found)
        print(
            f"{name:{width}} {statistics.mean(found):6.2f} %{spread}  ({each}){(beside or {}).get(name, '')}"
        )
