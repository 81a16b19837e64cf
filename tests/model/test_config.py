"""Configurations: a bad one fails at construction with the field, the value and what would be right."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from crossvit import BranchConfig, CrossViTConfig, create_model, list_models
from crossvit.errors import ConfigError, UnknownNameError
from crossvit.fast.form import own_copy
from crossvit.model.cost import cost
from crossvit.model.crossvit import CrossViT
from crossvit.model.presets import ALIASES, PRESETS
from crossvit.model.registry import FUSIONS

GOOD = BranchConfig(patch=4, dim=16, heads=2, depth=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 3}, r"heads = 3: should be a divisor of dim=16"),
        ({"patch": 0}, r"patch = 0: should be an integer of 1 or more"),
        ({"depth": -1}, r"depth = -1: should be an integer of 0 or more"),
        ({"mlp_ratio": 0}, r"mlp_ratio = 0: should be a positive number"),
        ({"image_scale": 0}, r"image_scale = 0"),
        (
            {"tokeniser": "magic"},
            r"tokeniser = 'magic': should be one of linear, dagger, t2t, halving",
        ),
        ({"tokeniser": "t2t"}, r"patch = 4: should be 12 or 16 with tokeniser='t2t'"),
        ({"tokeniser": "dagger"}, r"patch = 4: should be 12 or 16 with tokeniser='dagger'"),
        (
            {"tokeniser": "halving", "patch": 6},
            r"patch = 6: should be a power of two with tokeniser='halving'",
        ),
    ],
)
def test_bad_branch(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"branches": ()}, "branches has 0 entries: a CrossViT has one to 4"),
        ({"branches": (GOOD,) * 5}, "branches has 5 entries"),
        (
            {"branches": (GOOD,)},
            "fusion = 'cross-attention': should be 'none' with a single branch",
        ),
        (
            {"branches": (GOOD, dataclasses.replace(GOOD, class_token=False))},
            "class_token = True, False over the branches: should be the same in every branch",
        ),
        ({"fusion": "magic"}, "fusion = 'magic': should be one of none, all-attention"),
        (
            {"fusion": "none", "as_released": True},
            "fusion = 'none': should be 'cross-attention' with as_released=True",
        ),
        ({"fusion_depth": 0}, "fusion_depth = 0: should be an integer of 1 or more"),
        ({"keys_values": "eager"}, "keys_values = 'eager': should be one of lazy, materialised"),
        ({"branches": (GOOD, "large")}, r"branches\[1\] = 'large': should be a BranchConfig"),
        (
            {"image_size": 3},
            "image_size = 3x3: a side is shorter than the 4-pixel patch of branch 0; use 4 or more",
        ),
        ({"image_size": (32,)}, "image_size"),
        ({"num_classes": 0}, "num_classes = 0: should be an integer of 1 or more"),
        ({"stages": True}, "stages = True"),
        ({"drop_path": 1.0}, "drop_path = 1.0: should be a number from 0 up to"),
        ({"init": "zeros"}, "init = 'zeros': should be one of paper, xavier"),
        ({"dynamic_size": "no"}, "dynamic_size = 'no': should be True or False"),
        ({"projection_norm": 2}, "projection_norm = 2: should be True or False"),
        ({"image_size": {32, 48}}, "image_size = .*: should be a positive integer or a pair"),
        ({"image_size": None}, "image_size = None: should be a positive integer or a pair"),
        ({"branches": None}, "branches = None: should be a tuple of BranchConfig"),
        ({"drop": "a"}, "drop = 'a': should be a number from 0"),
        (
            {"fusion": "class-token", "fusion_depth": 3},
            "should be all-attention or cross-attention with fusion_depth=3",
        ),
    ],
)
def test_bad_model(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CrossViTConfig(**({"branches": (GOOD, GOOD), "image_size": 32} | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"class_token": 2}, "class_token = 2: should be True or False"),
        ({"mlp_ratio": "x"}, "mlp_ratio = 'x': should be a positive number"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio = inf: should be a positive number"),
        ({"image_scale": "a"}, "image_scale = 'a': should be a number"),
    ],
)
def test_branch_fields_of_another_type(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(GOOD, **change)


def test_what_is_no_config_is_said() -> None:
    for record in ("abc", {"branches": [5]}, {"branches": 5}):
        with pytest.raises(ConfigError, match="should be a dict"):
            CrossViTConfig.from_dict(record)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError,
        match=r"name_or_config = 5: should be a name from list_models\(\) or a CrossViTConfig",
    ):
        create_model(5)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="keys_values = 'materialized': should be one of lazy, materialised"
    ):
        cost(CrossViTConfig(branches=(GOOD, GOOD), image_size=32), keys_values="materialized")


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(UnknownNameError, match="did you mean crossvit_15_dagger_240"):
        create_model("crossvit_15_dager_240")
    with pytest.raises(
        UnknownNameError, match="unknown model field 'drop_paths': did you mean drop_path"
    ):
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
def branches(draw: st.DrawFn, class_token: bool) -> BranchConfig:
    heads = draw(st.integers(1, 3))
    tokeniser = draw(st.sampled_from(["linear", "dagger", "t2t", "halving"]))
    patches = {"linear": [2, 3, 5, 8], "halving": [2, 4, 8]}.get(tokeniser, [12, 16])
    return BranchConfig(
        patch=draw(st.sampled_from(patches)),
        dim=heads * draw(st.integers(1, 3)) * 4,
        heads=heads,
        depth=draw(st.integers(0, 2)),
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 3.0])),
        image_scale=draw(st.sampled_from([0.5, 0.9, 1.0, 1.3])),
        tokeniser=tokeniser,
        class_token=class_token,
    )


@st.composite
def configs(draw: st.DrawFn) -> CrossViTConfig:
    class_token = draw(st.booleans())
    chosen = draw(st.lists(branches(class_token), min_size=1, max_size=4))
    fusion = "none" if len(chosen) == 1 else draw(st.sampled_from(list(FUSIONS)))
    return CrossViTConfig(
        branches=tuple(chosen),
        image_size=(draw(st.integers(16, 30)), draw(st.integers(16, 30))),
        num_classes=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 4)),
        stages=draw(st.integers(1, 2)),
        init=draw(st.sampled_from(["paper", "xavier"])),
        dynamic_size=draw(st.booleans()),
        fusion=fusion,
        fusion_depth=draw(st.integers(1, 2))
        if fusion in ("all-attention", "cross-attention")
        else 1,
        as_released=fusion == "cross-attention" and draw(st.booleans()),
        keys_values=draw(st.sampled_from(["lazy", "materialised"])),
        projection_norm=draw(st.booleans()),
        projection_gelu=draw(st.booleans()),
        projection_identity=draw(st.booleans()),
        projection_shared=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_any_legal_config_builds_runs_learns_costs_and_comes_back(config: CrossViTConfig) -> None:
    model = CrossViT(config)
    loss = model(torch.randn(2, config.in_channels, *config.image_size)).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert cost(config)["total"].parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert CrossViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=25, deadline=None)
@given(configs())
def test_closed_form_macs_equal_a_counter(config: CrossViTConfig) -> None:
    with torch.device("meta"):
        model = own_copy(CrossViT(config))  # builds no keys and values where the config says so
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, config.in_channels, *config.image_size))
    counted, closed = counter.get_total_flops() // 2, cost(config)["total"].macs
    # The counter also takes q·b_k of the lazy form, a bias: D multiply–adds a read, left out of the closed form.
    biases = config.stages * config.fusion_depth * sum(branch.dim for branch in config.branches)
    assert (
        0
        <= counted - closed
        <= (biases if config.fusion == "cross-attention" and config.keys_values == "lazy" else 0)
    )
