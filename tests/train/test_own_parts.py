"""A block of somebody's own, in one file outside the package, goes through every verb by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from crossvit.errors import UnknownPartError, WeightsError
from crossvit.model.config import CrossViTConfig
from crossvit.model.registry import BLOCKS, FUSIONS
from crossvit.run import Run
from crossvit.train.recipe import Recipe, load_recipe
from crossvit.weights.files import read_weights
from crossvit.weights.timm_folder import timm_arguments
from support.runs import TINY

Command = Callable[..., tuple[int, str, str]]

LAYERSCALE = """
import torch
from torch import nn

import crossvit
from crossvit.model.layers import EncoderBlock


class LayerScaleBlock(EncoderBlock):
    def __init__(self, branch, **rates):
        super().__init__(branch, **rates)
        self.scale = nn.Parameter(torch.full((branch.dim,), 0.1))

    def forward(self, x):
        x = x + self.drop_path(self.scale * self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.scale * self.mlp(self.mlp_norm(x)))


crossvit.register_block("layerscale", LayerScaleBlock)
"""


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (BLOCKS, FUSIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my blocks.py"
    path.write_text(LAYERSCALE)
    return path


def forget() -> None:
    """As in a new process, to which nothing has been made known yet."""
    del BLOCKS._entries["layerscale"]


def trained(command: Command, scans: Path, out: Path, *words: object) -> tuple[int, str, str]:
    options = (f"--{name.replace('_', '-')}={value}" for name, value in TINY.items())
    return command("train", scans, "--out", out, *options, *words)


def test_a_block_from_a_file_goes_through_every_verb(
    command: Command, file: Path, scans: Path, tmp_path: Path
) -> None:
    run, image = tmp_path / "run", next((scans / "0").iterdir())
    status, _, err = trained(command, scans, run, "--block", "layerscale", "--import", file)
    assert status == 0, err
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["block"] == record["recipe"]["block"] == "layerscale"
    assert str(file) not in (run / "run.json").read_text()  # a name, never where code is
    scales = [name for name in read_weights(run).tensors if name.endswith(".scale")]
    assert len(scales) == 6  # two stages of one and two blocks
    scores = set()
    for engine in ("torch", "onnxruntime", "openvino"):
        forget()
        words = ("evaluate", run, scans, "--engine", engine, "--json")
        status, out, err = command(f"--import={file}", *words)
        assert (status, err) == (0, "")
        scores.add(json.loads(out)["top1"])
    assert scores == {record["result"]["top1"]}
    for words in (
        ("predict", run, image),
        ("explain", run, image, "--out", tmp_path / "maps"),
        ("report", run),
        ("weights", "show", run),
    ):
        forget()
        status, _, err = command(*words, "--import", file)
        assert status == 0, (words, err)


def test_a_run_without_its_file_says_how_to_make_the_name_known(
    command: Command, file: Path, scans: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert trained(command, scans, run, "--block", "layerscale", "--import", file)[0] == 0
    forget()
    for words in (("evaluate", run, scans), ("predict", run, scans), ("weights", "show", run)):
        status, _, err = command(*words)
        assert status == 2
        assert err.startswith("crossvit: block = 'layerscale': should be one of pre-norm;")
        assert err.count("\n") == 1
        assert "in a file given by --import" in err
    with pytest.raises(UnknownPartError):
        CrossViTConfig.from_dict(Run(run).record().config)


def test_runs_with_a_block_of_ones_own_are_compared(
    command: Command, file: Path, scans: Path, tmp_path: Path
) -> None:
    """Its parameters are counted; what it multiplies is known to its own code alone."""
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        assert trained(command, scans, run, "--block", "layerscale", "--import", file)[0] == 0
    status, out, err = command("report", *runs, "--out", tmp_path / "two.html", "--json")
    assert status == 0, err
    for compared, run in zip(json.loads(out)["runs"], runs, strict=True):
        assert compared["macs"] is None
        tensors = read_weights(run).tensors.values()
        assert compared["parameters"] == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["models", "--import"], "--import names no file: give --import FILE.py"),
        (["models", "--import", "gone.py"], "--import gone.py: no such Python file"),
        (["train", "digits", "--out", "x", "--block", "layerscal"], "block = 'layerscal': should"),
        (["train", "digits", "--out", "x", "--fusion", "crossattention"], "did you mean cross-att"),
        (["train", "digits", "--out", "x", "--tokeniser", "convs"], "tokeniser = 'convs': should"),
    ],
)
def test_a_wrong_name_is_one_line(command: Command, words: list[str], says: str) -> None:
    status, _, err = command(*words)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_file_that_fails_is_one_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    status, _, err = command("models", "--import", file)
    expected = f"crossvit: --import {file} fails: ZeroDivisionError: division by zero\n"
    assert (status, err) == (2, expected)


def test_a_recipe_names_parts_only_where_they_are_given() -> None:
    plain = load_recipe("small", data="digits", out="x")
    assert not {"block", "fusion", "tokeniser"} & set(plain.to_dict())
    named = plain.changed(fusion="pairwise")
    assert named.to_dict()["fusion"] == "pairwise"
    assert Recipe.from_dict(named.to_dict()) == named
    assert Recipe.from_dict(plain.to_dict()) == plain


def test_a_built_in_fusion_is_trained_by_name(
    command: Command, scans: Path, tmp_path: Path
) -> None:
    assert trained(command, scans, tmp_path / "run", "--fusion", "pairwise")[0] == 0
    assert Run(tmp_path / "run").record().config["fusion"] == "pairwise"


def test_timm_is_not_given_a_block_that_it_does_not_have(file: Path, command: Command) -> None:
    assert command("models", "--json", "--import", file)[0] == 0
    from crossvit.factory import model_config

    with pytest.raises(WeightsError, match="cannot load it: its blocks are layerscale"):
        timm_arguments(model_config("crossvit_9_240", block="layerscale"))
