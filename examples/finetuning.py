"""Fine-tuning on few photos against training from scratch: the same images, seeds and number of passes, mean and spread.

    python examples/finetuning.py PRETRAINED DATA --each 20 --seeds 3 --out runs/finetuning

PRETRAINED is a run (or anything that `--weights` takes), DATA a folder with train/ and val/. For each seed, `--each` images of
every class are drawn from train/; both models learn from them and are measured on all of val/. Nothing is selected on val/:
the last epoch counts, so the recipe's early stopping is off here.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tomllib
from pathlib import Path
from typing import Any

from over_seeds import print_scores, print_seed

import crossvit
from crossvit.weights.files import read_weights
from crossvit.weights.identify import identify


def draw(data: Path, out: Path, *, each: int, seed: int) -> Path:
    """A folder with `each` images of every class of data/train, and a link to data/val."""
    shutil.rmtree(out, ignore_errors=True)
    for folder in sorted((data / "train").iterdir()):
        (out / "train" / folder.name).mkdir(parents=True)
        for photo in random.Random(seed).sample(sorted(folder.iterdir()), each):
            shutil.copy(photo, out / "train" / folder.name / photo.name)
    (out / "val").symlink_to((data / "val").resolve())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pretrained")
    parser.add_argument("data", type=Path)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        help='fine-tuned with other settings: "lr=3e-3 layer_decay=0.7" ...',
    )
    parser.add_argument("--no-scratch", action="store_true", help="leave out training from scratch")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    options = parser.parse_args()
    model, _ = identify(read_weights(options.pretrained))
    ways: dict[str, dict[str, Any]] = {"fine-tuned": {}}
    ways |= {settings: tomllib.loads(settings.replace(" ", "\n")) for settings in options.also}
    scores: dict[str, list[float]] = {name: [] for name in ways}
    if not options.no_scratch:
        scores["from scratch"] = []
    settled: dict[
        str, dict[str, Any]
    ] = {}  # the recipe of each way, with the number of epochs that was chosen
    for seed in range(options.seeds):
        photos = str(
            draw(options.data, options.out / f"photos-{seed}", each=options.each, seed=seed)
        )
        for name, settings in ways.items():
            tuned = crossvit.load_recipe(
                "finetune", data=photos, out=str(options.out / f"tuned-{seed}"), weights=options.pretrained, seed=seed,
                patience="0", select="last", **settings,
            )  # fmt: skip
            result = crossvit.fit(tuned, overwrite=True)
            scores[name].append(100 * result.top1)
            settled.setdefault(name, result.record.recipe)
        if not options.no_scratch:
            scratch = crossvit.load_recipe(
                "small", data=photos, out=str(options.out / f"scratch-{seed}"), model=model, seed=seed,
                batch_size=settled["fine-tuned"]["batch_size"], epochs=settled["fine-tuned"]["epochs"],
            )  # fmt: skip
            scores["from scratch"].append(100 * crossvit.fit(scratch, overwrite=True).top1)
        print_seed(seed, scores)
    chosen = settled["fine-tuned"]
    print(
        f"{model}, {options.each} photos a class, {chosen['epochs']} epochs of batches of {chosen['batch_size']}, "
        f"{result.n} held-out photos"
    )
    print_scores(scores)


if __name__ == "__main__":
    main()
