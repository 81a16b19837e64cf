"""The main job from end to end, by the commands a person would type: train, evaluate, predict, look.

`make quickstart` runs this. The images are the 1,797 real scans of handwritten digits inside scikit-learn.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

from crossvit.cli import run as crossvit
from crossvit.data.sources import open_data

RUN = Path("runs/quickstart")
SCANS = RUN / "held-out-scans"
SHOWN = 6


def main() -> int:
    train = ["train", "digits", "--recipe", "quickstart", "--out", str(RUN), "--overwrite"]
    for words in (train, ["evaluate", str(RUN), "digits"]):
        if status := say_and_run(words):
            return status
    write_held_out_scans()
    if status := say_and_run(["predict", str(RUN), str(SCANS), "--top-k", "2"]):
        return status
    result = json.loads((RUN / "run.json").read_text())["result"]
    print(
        f"\n{100 * result['top1']:.1f} % of {result['n']} held-out scans right. "
        f"The run is in {RUN}, its page is {RUN}/report.html\n\n"
        "Next:\n"
        f"  .venv/bin/crossvit predict {RUN} your-scan.png\n"
        "  .venv/bin/crossvit train your-photos/ --out runs/photos      (a folder of class folders)\n"
        "  .venv/bin/crossvit models"
    )
    return 0


def say_and_run(words: list[str]) -> int:
    print(f"\n$ crossvit {shlex.join(words)}", flush=True)
    return crossvit(words)


def write_held_out_scans() -> None:
    """A handful of scans the training never saw, as PNG files named after what they show."""
    held_out = set(json.loads((RUN / "run.json").read_text())["data"]["held_out"])
    scans = open_data("digits").part("all")
    shutil.rmtree(SCANS, ignore_errors=True)  # of an earlier run
    SCANS.mkdir()
    chosen = [index for index, name in enumerate(scans.names) if name in held_out][:SHOWN]
    for index in chosen:
        scans.read(index).save(
            SCANS / f"a-{scans.classes[scans.labels[index]]}-{scans.names[index]}.png"
        )


if __name__ == "__main__":
    sys.exit(main())
