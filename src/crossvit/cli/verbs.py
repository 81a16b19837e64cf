"""The verbs, each one typed function: its signature is its options, its docstring its help."""

from __future__ import annotations

import json
from typing import Any

from cyclopts import App

from crossvit import __version__
from crossvit.cli.data import app as data_app
from crossvit.cli.switch import Switch
from crossvit.cli.weights import app as weights_app

app = App(
    name="crossvit",
    version=f"crossvit {__version__}",
    help="Multi-scale vision transformers (CrossViT) from a folder of images to a trained, evaluated classifier. "
    "With --debug an error shows where it came from.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
TRAIN_HELP = "Train a classifier on a folder of images and evaluate it."
app.command("crossvit.cli.training:train", name="train", help=TRAIN_HELP)  # loaded when it is called: it has many options
app.command(data_app)
app.command(weights_app)


@app.command
def recipes(name: str | None = None, /, *, json: Switch = False) -> int:
    """List the shipped recipes, or print one as a TOML file to change and give to `train --recipe FILE.toml`.

    Parameters
    ----------
    name
        The recipe to print.
    json
        Print one JSON object on stdout.
    """
    from crossvit.train.recipe import load_recipe, recipe_text, shipped_recipes

    names = shipped_recipes() if name is None else [name]
    if json:
        _print_json({"recipes": {one: load_recipe(one).to_dict() for one in names}})
    elif name is not None:
        print(recipe_text(name), end="")
    else:
        for one in names:
            print(f"{one:14}{recipe_text(one).splitlines()[0].lstrip('# ')}")
    return 0


@app.command
def evaluate(
    run: str,
    data: str,
    /,
    *,
    split: str | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    device: str = "auto",
    skip_bad: Switch = False,
    json: Switch = False,
) -> int:
    """Measure a run on labelled images.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`.
    data
        As for `train`. Of data with val/ or test/ that part is taken, of the data the run was split from its held-out
        part, otherwise every image.
    split
        Take this part instead: train, val or test where the data has them, all where it has none, or held-out.
    batch_size
        Images a step.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    skip_bad
        Leave out images that cannot be decoded instead of stopping.
    json
        Print one JSON object on stdout.
    """
    import crossvit
    from crossvit.cli.terminal import counting, print_evaluation
    from crossvit.results import to_json

    with counting("evaluating") as progress:
        result = crossvit.evaluate(
            run,
            data,
            split=split,
            batch_size=batch_size,
            device=device,
            precision=precision,
            skip_bad=skip_bad,
            progress=progress,
        )
    if json:
        _print_json(to_json(result))
    else:
        print_evaluation(result)
    return 0


@app.command
def predict(
    run: str,
    /,
    *paths: str,
    top_k: int = 5,
    precision: str = "auto",
    device: str = "auto",
    json: Switch = False,
) -> int:
    """Classify images. Exits with 1 if one of them could not be read; the others are classified all the same.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`.
    paths
        Image files, folders (searched through) or globs.
    top_k
        Classes to name for each image, the surest first.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    json
        Print one JSON object on stdout.
    """
    from crossvit.cli.terminal import print_prediction
    from crossvit.errors import UsageError
    from crossvit.prediction import Predictor, find_images
    from crossvit.results import to_json

    if not paths:
        raise UsageError("no image given: `crossvit predict RUN photo.jpg`, a folder, or a glob")
    images = find_images(paths)
    predictor = Predictor(run, top_k=top_k, device=device, precision=precision)
    failed = 0
    found = []
    for prediction in predictor.stream(images):
        failed += prediction.error is not None
        if json:
            found.append(to_json(prediction))
        else:
            print_prediction(prediction)
    if json:
        _print_json({"run": run, "n": len(images), "failed": failed, "predictions": found})
    return 1 if failed else 0


@app.command
def models(*, paper: Switch = False, json: Switch = False) -> int:
    """List the models: name, input, parameters, multiply-accumulates of one image, and top-1 on ImageNet-1k in the paper.

    Multiply-accumulates are counted as the paper counts, with the keys and values of cross-attention built for every token;
    the models compute a few per cent less.

    Parameters
    ----------
    paper
        Print the paper's tables of models with our counts beside its own, and why a cell differs.
    json
        Print one JSON object on stdout.
    """
    from crossvit.cli.terminal import print_models, print_paper
    from crossvit.model.cost import cost
    from crossvit.model.paper import ROWS, TABLES
    from crossvit.model.presets import PRESETS

    if paper and json:
        _print_json({"tables": [row.to_dict() for row in ROWS]})
        return 0
    if paper:
        print_paper(ROWS, TABLES)
        return 0
    rows = []
    for preset in PRESETS.values():
        total = cost(preset.config, keys_values="materialised")["total"]  # as the paper counts
        rows.append(
            {
                "name": preset.name,
                "alias": preset.alias,
                "image_size": list(preset.config.image_size),
                "parameters": total.parameters,
                "macs": total.macs,
                "paper_top1": preset.paper_top1,
                "timm_top1": preset.timm_top1,
                "weights": preset.hub if preset.released else None,
            }
        )
    if json:
        _print_json({"models": rows})
    else:
        print_models(rows)
    return 0


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False, allow_nan=False))
