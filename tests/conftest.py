"""Fixtures: the image packs where they are, and small data and runs made from the real scans inside scikit-learn."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossvit import BranchConfig, CrossViTConfig
from crossvit.cli import run as crossvit_command
from crossvit.data.sources import open_data
from crossvit.fast.accelerate import accelerate
from crossvit.model.crossvit import CrossViT
from crossvit.results import Epoch, TrainingResult
from crossvit.train.callbacks import Watch
from crossvit.train.loop import fit
from crossvit.train.recipe import load_recipe

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

PACKS = Path(os.environ.get("CROSSVIT_DATA_PACKS", Path(__file__).parents[2] / "shared" / "data"))

# One epoch of a very small model: enough to go through everything.
TINY = {
    "model": "crossvit_pico_32",
    "epochs": 1,
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
}


# Two branches of different grids, widths and depths on an oblong image: small enough for double precision.
SMALL = CrossViTConfig(
    image_size=(24, 36),
    num_classes=5,
    stages=2,
    branches=(
        BranchConfig(patch=4, dim=16, heads=2, depth=1, tokeniser="halving"),
        BranchConfig(patch=6, dim=24, heads=3, depth=2, image_scale=0.9),
    ),
)


class Heard(Watch):
    """Remembers what a training run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.epochs: list[Epoch] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def epoch_done(self, entry: Epoch) -> None:
        self.epochs.append(entry)


def lively(config: CrossViTConfig, seed: int = 0) -> CrossViT:
    """A model whose logits differ from image to image."""
    torch.manual_seed(seed)
    model = accelerate(CrossViT(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks an image pack by name, once, or skips the test where the packs are not there. Its files are not to be changed."""

    @functools.cache
    def unpack(name: str) -> Path:
        archive = PACKS / f"{name}.zip"
        if not archive.is_file():
            pytest.skip(
                f"no image pack {archive}: set CROSSVIT_DATA_PACKS to the folder that has it"
            )
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: 20 real scans of each of the digits 0, 1 and 2, as PNG files of 8x8."""
    return write_scans(tmp_path_factory.mktemp("scans"), classes=("0", "1", "2"), each=20)


@pytest.fixture
def own_scans(tmp_path: Path) -> Path:
    """As `scans`, for tests that change the files."""
    return write_scans(tmp_path / "own scans é", classes=("0", "1", "2"), each=8)


def write_scans(folder: Path, *, classes: tuple[str, ...], each: int) -> Path:
    digits = open_data("digits").part("all")
    for name in classes:
        (folder / name).mkdir(parents=True)
        label = digits.classes.index(name)
        for index in [i for i, own in enumerate(digits.labels) if own == label][:each]:
            picture = digits.read(index)
            assert isinstance(picture, Image.Image)
            picture.save(folder / name / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A finished run of one epoch on `scans`; its folder is `.run`."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return fit(load_recipe("small", data=str(scans), out=str(out), **TINY))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `crossvit WORDS` in this process: (exit status, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = crossvit_command([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
