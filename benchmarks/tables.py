"""The tables of docs/performance.md, from files of `crossvit bench --out FOLDER`: python benchmarks/tables.py bench.json..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Times and ratios of one model and batch: medians, and those of the fastest rounds, which a disturbance spares."""
    best = min(
        row["fastest"]
        for row in rows
        if row["contestant"] == "timm-eager" and row["precision"] == "fp32"
    )
    lines = [
        "| contestant | precision | ms, median (fastest) | img/s, fastest | ratio, median | ratio, fastest | difference | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row["difference"] is None else f"{row['difference']:.0e}"
        memory = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        lines.append(
            f"| {row['contestant']} | {row['precision']} | {row['milliseconds']:.1f} ({row['fastest']:.1f}) "
            f"| {1000 * row['batch'] / row['fastest']:.1f} | {row['ratio']:.2f} | {best / row['fastest']:.2f} "
            f"| {difference} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    for name in sys.argv[1:]:
        rows = json.loads(Path(name).read_text())["rows"]
        for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
            print(f"### {model}, batch {batch}\n")
            print(
                table([row for row in rows if (row["model"], row["batch"]) == (model, batch)]),
                end="\n\n",
            )


if __name__ == "__main__":
    main()
