"""The verbs, each one typed function: its signature is its options, its docstring its help."""

from __future__ import annotations

from typing import Any

from cyclopts import App

from crossvit import __version__
from crossvit.cli.flag import Switch
from crossvit.text import json_line

app = App(
    name="crossvit",
    version=f"crossvit {__version__}",
    help="Multi-scale vision transformers (CrossViT) from a folder of images to a trained, evaluated classifier. "
    "With --debug an error shows where it came from; --import FILE.py, as often as needed, runs a file of your own that registers "
    "blocks, fusions or tokenisers.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
TRAIN_HELP = "Train a classifier on a folder of images and evaluate it."
DATA_HELP = "Look at images before training on them; put them into tar shards."
WEIGHTS_HELP = (
    "Show, convert and hand on weights: a run, a file, an https:// address, or a name on the hub."
)
app.command(
    "crossvit.cli.training:train", name="train", help=TRAIN_HELP
)  # loaded when it is called: it has many options
app.command(
    "crossvit.cli.evaluating:evaluate", name="evaluate", help="Measure a run on labelled images."
)
app.command(
    "crossvit.cli.reporting:report",
    name="report",
    help="Write the page of a run anew, or compare runs.",
)
app.command("crossvit.cli.predicting:predict", name="predict", help="Classify images.")
app.command(
    "crossvit.cli.planning:plan",
    name="plan",
    help="What a long run comes to on so many GPUs. Starts nothing.",
)
app.command(
    "crossvit.cli.explaining:explain",
    name="explain",
    help="Show which parts of a photo the answer came from.",
)
app.command(
    "crossvit.cli.benching:bench",
    name="bench",
    help="Time our models against timm's through every engine installed.",
)
app.command("crossvit.cli.data:app", name="data", help=DATA_HELP)
app.command("crossvit.cli.weights:app", name="weights", help=WEIGHTS_HELP)


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
def models(*, paper: Switch = False, explain: str | None = None, json: Switch = False) -> int:
    """List the models: name, input, parameters, multiply-accumulates of one image, and top-1 on ImageNet-1k in the paper.

    Multiply-accumulates are counted as the paper counts, with the keys and values of cross-attention built for every token;
    the models compute a few per cent less.

    Parameters
    ----------
    paper
        Print the paper's tables of models with our counts beside its own, and why a cell differs.
    explain
        A name, or a run: print which form computes each kind of its modules on this machine, in training and
        inference, and why not a faster one.
    json
        Print one JSON object on stdout.
    """
    if explain is not None:
        return _explain(explain, as_json=json)
    from crossvit.cli.terminal import print_models, print_paper
    from crossvit.model.cost import cost
    from crossvit.model.paper_tables import ROWS, TABLES
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


def _explain(name: str, *, as_json: bool) -> int:
    """`models --explain`."""
    import torch

    from crossvit.cli.terminal import print_forms
    from crossvit.factory import create_model
    from crossvit.fast.explain import forms_used
    from crossvit.hardware import processor
    from crossvit.model.presets import preset
    from crossvit.run import Run
    from crossvit.trained import open_trained

    if Run(name).path.exists():
        model = open_trained(name).build()
    else:
        model = create_model(preset(name).name)
    rows = forms_used(model)
    machine = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    if as_json:
        forms = [row._asdict() for row in rows]
        _print_json({"model": name, "machine": machine, "forms": forms})
    else:
        print_forms(name, machine, rows)
    return 0


def _print_json(record: dict[str, Any]) -> None:
    print(json_line(record))
