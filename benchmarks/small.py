"""From scratch on few real photos: our presets with the `small` recipe against timm's resnet18 and vit_tiny at equal wall-clock.

Every model gets the same images, splits, augmentation, optimiser and schedule (`small`, with the learning rate that suits it
below), and as many epochs as fit into `--seconds` of training, as a few timed steps say. Prints accuracy on the held-out part
over the seeds (mean and spread), and draws accuracy over seconds to `--plot`. DATA are folders with train/ and val/ or test/, or
names of image packs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from packs import unpacked
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.engines.torch import autocast, resolve_precision
from crossvit.factory import create_model
from crossvit.train.callbacks import Callback
from crossvit.train.optim import learning_rate
from crossvit.train.recipe import load_recipe
from crossvit.train.reproducibility import step_seed
from crossvit.train.setup import PreparedRun, prepare_run

matplotlib.use("svg")
from matplotlib import pyplot as plt

CPU = torch.device("cpu")
RIVALS = {
    "resnet18": 1e-3,
    "vit_tiny_patch16_224": 5e-4,
}  # timm's name -> learning rate, the better of 5e-4 and 1e-3
TIMED = 10  # steps


@dataclasses.dataclass
class Curve:
    """Seconds of training and held-out accuracy after each epoch."""

    seconds: list[float]
    top1: list[float]


def build(name: str, plan: PreparedRun) -> nn.Module:
    if name not in RIVALS:
        return create_model(plan.config)
    size = {"img_size": plan.config.image_size, "patch_size": 8} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=len(plan.train.classes), **size)


def train(name: str, plan: PreparedRun, *, seconds: float, precision: str) -> Curve:
    recipe = plan.recipe
    optimiser_recipe = dataclasses.replace(
        recipe.optimiser, lr=RIVALS.get(name, recipe.optimiser.lr)
    )
    torch.manual_seed(recipe.seed)
    model = build(name, plan)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": optimiser_recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=optimiser_recipe.lr, fused=True)
    loader = plan.training_loader()

    def step(images: Tensor, labels: Tensor) -> None:
        with autocast(CPU, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimiser_recipe.clip)
        optimiser.step()
        optimiser.zero_grad()

    state = {key: value.clone() for key, value in model.state_dict().items()}
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    model.train()
    for _ in range(
        2
    ):  # the first time the images are decoded, the second they are in memory as in all later epochs
        started = time.perf_counter()
        for _, batch in zip(range(TIMED), loader.epoch(0), strict=False):
            step(*batch)
        seconds_a_step = (time.perf_counter() - started) / TIMED
    model.load_state_dict(state)
    optimiser.state.clear()
    epochs = max(1, round(seconds / (seconds_a_step * len(loader))))
    steps = epochs * len(loader)
    curve = Curve([], [])
    spent = 0.0
    for epoch in range(epochs):
        model.train()
        started = time.perf_counter()
        for index, (images, labels) in enumerate(loader.epoch(epoch)):
            number = epoch * len(loader) + index
            torch.manual_seed(step_seed(recipe.seed, number))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(
                    number, steps=steps, per_epoch=len(loader), recipe=optimiser_recipe
                )
            step(images, labels)
        spent += time.perf_counter() - started
        curve.seconds.append(spent)
        curve.top1.append(accuracy(model, plan))
    return curve


def accuracy(model: nn.Module, plan: PreparedRun) -> float:
    model.eval()
    images = plan.held_out
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            indices = range(start, min(start + 100, len(images)))
            pixels = np.stack([plan.preprocessing.fit(images.read(index)) for index in indices])
            found = (
                model(torch.from_numpy(plan.preprocessing.normalise(pixels))).argmax(dim=1).tolist()
            )
            right += sum(
                label == images.labels[index] for label, index in zip(found, indices, strict=True)
            )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", default=["sign_digits_64", "cifar10_subset"])
    parser.add_argument("--models", nargs="+", default=["ours", *RIVALS])
    parser.add_argument("--seconds", type=float, default=70.0, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--plot", type=Path, default=Path("small.svg"))
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: should be at least 1")
    with contextlib.ExitStack() as held:
        folders = {Path(name).name: held.enter_context(unpacked(name)) for name in options.data}
        compare(folders, options)


def compare(folders: dict[str, Path], options: argparse.Namespace) -> None:
    """Train and print for every folder, and draw: name -> folder."""
    precision = resolve_precision("auto", CPU)
    figure, axes = plt.subplots(1, len(folders), figsize=(5.5 * len(folders), 4), squeeze=False)
    for axis, (title, data) in zip(axes[0], folders.items(), strict=True):
        print(
            f"{title}: {options.seconds:.0f} s of training, {precision}, {torch.get_num_threads()} threads"
        )
        for colour, name in enumerate(options.models):
            curves = []
            for seed in range(options.seeds):
                plan = prepare_run(
                    load_recipe("small", data=str(data), out="unused", seed=seed), Callback()
                )
                model = plan.model_name if name == "ours" else name
                curves.append(train(model, plan, seconds=options.seconds, precision=precision))
            last = [100 * curve.top1[-1] for curve in curves]
            label = plan.model_name if name == "ours" else name
            spread = statistics.stdev(last) if len(last) > 1 else 0.0
            spent = statistics.mean(curve.seconds[-1] for curve in curves)
            print(
                f"  {label:22} {statistics.mean(last):6.2f} % ± {spread:.2f}  of {len(plan.held_out)} held out "
                f"({', '.join(f'{value:.2f}' for value in last)})  {len(curves[0].top1)} epochs, {spent:.0f} s",
                flush=True,
            )
            for number, curve in enumerate(curves):
                accuracies = [100 * value for value in curve.top1]
                axis.plot(
                    curve.seconds,
                    accuracies,
                    color=f"C{colour}",
                    alpha=0.8,
                    lw=1.2,
                    label=None if number else label,
                )
        axis.set(title=title, xlabel="seconds of training", ylabel="top-1 on held-out photos, %")
        axis.legend(frameon=False)
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(options.plot)
    print(f"curves: {options.plot}")


if __name__ == "__main__":
    main()
