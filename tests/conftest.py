"""Fixtures: the image packs where they are, and small data and runs made from the real scans inside scikit-learn."""

from __future__ import annotations

import functools
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossvit.cli import run as crossvit_command
from crossvit.data.sources import open_data
from crossvit.fast.native.build import look_again
from crossvit.results import TrainingResult
from crossvit.train.loop import fit
from crossvit.train.recipe import load_recipe
from support.runs import TINY

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

PACKS = Path(os.environ.get("CROSSVIT_DATA_PACKS", Path(__file__).parents[2] / "shared" / "data"))


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


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The native kernels are looked for again, before and after."""
    look_again()
    yield
    look_again()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In one line what this machine could not test, by the reasons of the skipped tests."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        counts[reason.removeprefix("Skipped: ")] += 1
    if counts:
        named = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common())
        terminalreporter.write_line(f"not tested on this machine: {named}")
