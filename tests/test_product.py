"""What people get: real accuracy from scratch, and a wheel that works by itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import crossvit
from crossvit.fast.native.build import HEADERS, SOURCES

ROOT = Path(__file__).parents[1]


@pytest.mark.alone
def test_the_quickstart_gets_at_least_99_percent_of_the_held_out_scans(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    result = crossvit.fit(
        crossvit.load_recipe("quickstart", data="digits", out=str(tmp_path / "run"))
    )
    assert result.n == 360
    assert result.top1 >= 0.99


@pytest.mark.slow
def test_hands_from_scratch_reach_97_percent(pack: Callable[[str], Path], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    result = crossvit.fit(
        crossvit.load_recipe("small", data=str(pack("sign_digits_64")), out=str(tmp_path / "run"))
    )
    assert (result.record.model, result.n) == ("crossvit_nano_64", 400)
    assert result.top1 >= 0.97


def test_a_wheel_has_recipes_and_page(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("crossvit-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "crossvit/report/run.html",
        "crossvit/report/page.js",
        "crossvit/report/style.css",
        *(f"crossvit/fast/native/{name}" for name in (*HEADERS, *SOURCES)),
        "crossvit/recipes/small.toml",
        "crossvit/recipes/quickstart.toml",
    } <= inside
