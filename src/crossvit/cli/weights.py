"""The verbs of `crossvit weights`: weight files shown, converted and handed to others."""

from __future__ import annotations

import hashlib
import json as json_module
from pathlib import Path

from cyclopts import App

from crossvit.cli.flag import Switch
from crossvit.text import json_line, percent

app = App(name="weights")  # its help is in verbs.py, which loads this when it is called


@app.command
def show(source: str, /, *, json: Switch = False) -> int:
    """Say what weights are: whose keys they have, of which model, for which classes and size. Fetches what is elsewhere.

    Parameters
    ----------
    source
        A run folder, a .safetensors or .pth file, a timm folder, an https:// address, a released model's name, or owner/name
        on the hub.
    json
        Print one JSON object on stdout.
    """
    from crossvit.weights.files import read_weights
    from crossvit.weights.identify import identify
    from crossvit.weights.keys import layout_of

    weights = read_weights(source)
    model, config = identify(weights)
    with weights.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    record = {
        "source": source,
        "path": str(weights.path),
        "sha256": digest,
        "layout": layout_of(weights.tensors),
        "model": model,
        "image_size": list(config.image_size),
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "classes": list(weights.classes) if weights.classes else None,
        "tensors": len(weights.tensors),
        "parameters": parameters,
    }
    if json:
        print(json_line({**record, "config": config.to_dict()}))
        return 0
    height, width = config.image_size
    print(
        f"model   {model or 'a config of its own'}, {height}x{width} pixels, {config.in_channels} channels"
    )
    print(
        f"classes {config.num_classes}{': ' + ', '.join(weights.classes) if weights.classes else ', without names'}"
    )
    print(f"keys    {record['layout']}, {len(weights.tensors)} tensors, {parameters:,} parameters")
    print(f"file    {weights.path}")
    print(f"sha256  {digest}")
    return 0


@app.command
def convert(
    source: str,
    destination: str,
    /,
    *,
    to: str,
    overwrite: Switch = False,
    json: Switch = False,
) -> int:
    """Write weights under other keys. Every bit of the numbers stays, so that there and back gives the same ones.

    Parameters
    ----------
    source
        As for `crossvit weights show`.
    destination
        The file to write: .safetensors, or .pth for a flat state dict.
    to
        Whose keys: ours, timm or authors.
    overwrite
        Replace the file if it is there.
    json
        Print one JSON object on stdout.
    """
    from crossvit.results import to_json
    from crossvit.weights.convert import convert_weights

    done = convert_weights(source, destination, to=to, overwrite=overwrite)
    if json:
        print(json_line(to_json(done)))
    else:
        model = done.model or "a config of its own"
        print(
            f"{done.destination}: {model}, {done.tensors} tensors, {done.parameters:,} parameters, {done.layout} -> {done.to}"
        )
    return 0


@app.command
def save_timm(
    source: str,
    folder: str,
    /,
    *,
    overwrite: Switch = False,
    json: Switch = False,
) -> int:
    """Write a folder that timm and Transformers load, with a model card: for the hub, or for `timm.create_model`.

    Parameters
    ----------
    source
        As for `crossvit weights show`; a run brings its classes, its preprocessing and its accuracy along.
    folder
        The folder to write: model.safetensors, config.json and README.md.
    overwrite
        Replace those files if they are there.
    json
        Print one JSON object on stdout.
    """
    from crossvit.errors import UsageError
    from crossvit.trained import paper_preprocessing
    from crossvit.weights.files import read_weights
    from crossvit.weights.identify import identify
    from crossvit.weights.timm_folder import FILES, save_timm

    there = [name for name in FILES if (Path(folder).expanduser() / name).exists()]
    if there and not overwrite:
        raise UsageError(
            f"{folder} has {', '.join(there)}: add --overwrite to replace them, or choose another folder"
        )
    weights = read_weights(source)
    model, config = identify(weights)
    path = save_timm(
        folder,
        weights.tensors,
        config,
        model=model,
        classes=weights.classes,
        preprocessing=weights.preprocessing or paper_preprocessing(model, config),
        facts=_facts(source),
    )
    if json:
        print(
            json_module.dumps(
                {"folder": str(path), "model": model, "num_classes": config.num_classes}
            )
        )
    else:
        print(
            f"{path}: timm.create_model('local-dir:{path}', pretrained=True) loads it; the model card is {path / 'README.md'}"
        )
    return 0


def _facts(source: str) -> dict[str, str]:
    """What a run knows of its model, for the card. The data goes by its folder's name, not by where it lies."""
    from crossvit.run import Run

    run = Run(source)
    if not run.exists():
        return {}
    record = run.finished_record()
    data, result, recipe = record.data, record.result, record.recipe
    assert result is not None
    where = {"held-out": "held-out images", "val": "images of val/", "test": "images of test/"}[
        data.held_out_part
    ]
    return {
        "Trained on": f"{Path(data.location).name} ({data.train:,} images), {recipe['epochs']} epochs, from "
        + (f"the weights of {recipe['weights']}" if recipe["weights"] else "scratch"),
        "Top-1": f"{percent(result.top1)} of {result.n:,} {where}",
    }
