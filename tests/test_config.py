"""Configurations: a bad one fails at construction with the field, the value and what would be right."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossvit import BranchConfig, CrossViTConfig, create_model, list_models
from crossvit.errors import ConfigError, UnknownNameError
from crossvit.model.crossvit import CrossViT
from crossvit.model.presets import ALIASES, PRESETS

GOOD = BranchConfig(patch=4, dim=16, heads=2, depth=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 3}, r"heads = 3: should be a divisor of dim=16"),
        ({"patch": 0}, r"patch = 0: should be an integer of 1 or more"),
        ({"depth": -1}, r"depth = -1: should be an integer of 0 or more"),
        ({"mlp_ratio": 0}, r"mlp_ratio = 0: should be a positive number"),
        ({"image_scale": 0}, r"image_scale = 0"),
        ({"tokeniser": "magic"}, r"tokeniser = 'magic': should be one of linear, dagger, halving"),
        ({"tokeniser": "dagger"}, r"patch = 4: should be 12 or 16 with tokeniser='dagger'"),
        ({"tokeniser": "halving", "patch": 6}, r"patch = 6: should be a power of two with tokeniser='halving'"),
    ],
)
def test_bad_branch(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"branches": ()}, "branches has 0 entries"),
        ({"branches": (GOOD, "large")}, r"branches\[1\] = 'large': should be a BranchConfig"),
        ({"image_size": 3}, "image_size = 3x3: a side is shorter than the 4-pixel patch of branch 0; use 4 or more"),
        ({"image_size": (32,)}, "image_size"),
        ({"num_classes": 0}, "num_classes = 0: should be an integer of 1 or more"),
        ({"stages": True}, "stages = True"),
        ({"drop_path": 1.0}, "drop_path = 1.0: should be a number from 0 up to"),
        ({"init": "zeros"}, "init = 'zeros': should be one of paper, xavier"),
    ],
)
def test_bad_model(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CrossViTConfig(**({"branches": (GOOD, GOOD), "image_size": 32} | change))


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(UnknownNameError, match="did you mean crossvit_15_dagger_240"):
        create_model("crossvit_15_dager_240")
    with pytest.raises(UnknownNameError, match="unknown model field 'drop_paths': did you mean drop_path"):
        create_model("crossvit_9_240", drop_paths=0.1)
    with pytest.raises(ConfigError, match="unknown field of BranchConfig: patches"):
        CrossViTConfig.from_dict({"branches": [{"patches": 4}]})


def test_aliases_are_the_authors_names() -> None:
    assert ALIASES["crossvit_18_dagger_384"] == "crossvit_18_dagger_408"
    assert len(ALIASES) == 11
    assert create_model("crossvit_tiny_224").config == PRESETS["crossvit_tiny_240"].config


@pytest.mark.parametrize("name", list_models())
def test_presets_come_back_equal_from_json(name: str) -> None:
    config = PRESETS[name].config
    assert CrossViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@st.composite
def branches(draw: st.DrawFn) -> BranchConfig:
    heads = draw(st.integers(1, 3))
    tokeniser = draw(st.sampled_from(["linear", "halving"]))
    return BranchConfig(
        patch=draw(st.sampled_from([2, 4, 8] if tokeniser == "halving" else [2, 3, 5, 8])),
        dim=heads * draw(st.integers(1, 4)) * 2,
        heads=heads,
        depth=draw(st.integers(0, 2)),
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 3.0])),
        image_scale=draw(st.sampled_from([0.5, 0.9, 1.0, 1.3])),
        tokeniser=tokeniser,
    )


@settings(max_examples=25, deadline=None)
@given(
    pair=st.tuples(branches(), branches()),
    size=st.tuples(st.integers(8, 21), st.integers(8, 21)),
    stages=st.integers(1, 2),
    in_channels=st.integers(1, 4),
    init=st.sampled_from(["paper", "xavier"]),
)
def test_any_legal_config_builds_runs_learns_and_comes_back(
    pair: tuple[BranchConfig, BranchConfig], size: tuple[int, int], stages: int, in_channels: int, init: str
) -> None:
    config = CrossViTConfig(branches=pair, image_size=size, stages=stages, in_channels=in_channels, num_classes=3, init=init)
    model = CrossViT(config)
    loss = model(torch.randn(2, in_channels, *size)).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert CrossViTConfig.from_dict(config.to_dict()) == config
