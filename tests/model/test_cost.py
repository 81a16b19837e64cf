"""Closed-form costs against the paper's exact counts and against counters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossvit import CrossViTConfig, create_model, list_models
from crossvit.fast.form import own_copy
from crossvit.model.cost import cost
from crossvit.model.paper_tables import ROWS, TABLES
from crossvit.model.presets import PRESETS

# name: parameters, parameters without position embeddings, GMACs with keys and values built (docs/paper.md, Models)
COUNTS = {
    "crossvit_tiny_240": (7_014_800, 6_938_480, 1.563),
    "crossvit_small_240": (26_856_272, 26_703_632, 5.616),
    "crossvit_base_240": (105_025_232, 104_719_952, 21.191),
    "crossvit_9_240": (8_553_296, 8_451_536, 1.841),
    "crossvit_9_dagger_240": (8_776_592, 8_674_832, 1.979),
    "crossvit_15_240": (27_528_464, 27_375_824, 5.791),
    "crossvit_15_dagger_240": (28_209_008, 28_056_368, 6.112),
    "crossvit_15_dagger_408": (28_500_080, 28_056_368, 21.399),
    "crossvit_18_240": (43_271_408, 43_093_328, 9.031),
    "crossvit_18_dagger_240": (44_266_976, 44_088_896, 9.473),
    "crossvit_18_dagger_408": (44_606_560, 44_088_896, 32.409),
    "crossvit_18_dagger_504": (44_887_904, 44_088_896, 56.602),
    # Table 6 and its likely make-up (docs/paper.md, Ablations)
    "crossvit_small_240_none": (23_738_960, 23_586_320, 5.350),
    "crossvit_small_240_all_attention": (26_846_480, 26_693_840, 7.583),
    "crossvit_small_240_class_token": (24_183_056, 24_030_416, 5.350),
    "crossvit_small_240_pairwise": (24_183_056, 24_030_416, 5.527),
    # Table 8
    "vit_9_224": (6_430_952, 6_380_520, 1.380),
    "vit_9_dagger_224": (6_612_584, 6_562_152, 1.486),
    "vit_15_224": (22_944_616, 22_868_968, 4.863),
    "vit_15_dagger_224": (23_493_544, 23_417_896, 5.109),
    "vit_18_224": (37_106_600, 37_018_344, 7.811),
    "vit_18_dagger_224": (37_908_296, 37_820_040, 8.149),
}

# Table 7: millions of parameters without position embeddings, GMACs (docs/paper.md, Ablations)
TABLE_7 = {
    "crossvit_small_240": (26.704, 5.616),
    "crossvit_small_240_a": (26.658, 6.731),
    "crossvit_small_240_c": (28.038, 6.333),
    "crossvit_small_240_d": (28.926, 5.881),
    "crossvit_small_240_e": (31.156, 6.599),
}


def millions_and_giga_macs(config: CrossViTConfig) -> tuple[float, float]:
    parts = cost(config, keys_values="materialised")
    return round((parts["total"].parameters - parts["positions"].parameters) / 1e6, 3), round(
        parts["total"].macs / 1e9, 3
    )


@pytest.mark.parametrize("name", TABLE_7)
def test_table_7_to_three_decimals(name: str) -> None:
    assert millions_and_giga_macs(PRESETS[name].config) == TABLE_7[name]


def test_equal_widths_with_and_without_identity_and_two_blocks_as_released() -> None:
    equal = PRESETS["crossvit_small_240_b"].config
    assert millions_and_giga_macs(equal) == (31.404, 7.697)
    assert millions_and_giga_macs(dataclasses.replace(equal, projection_identity=False)) == (
        33.187,
        7.699,
    )
    two_blocks = PRESETS["crossvit_small_240_d"].config
    assert millions_and_giga_macs(dataclasses.replace(two_blocks, as_released=True)) == (
        28.926,
        5.618,
    )


def test_the_papers_other_form_of_table_6() -> None:
    for name in ("class_token", "pairwise"):
        config = PRESETS[f"crossvit_small_240_{name}"].config
        with_norm = dataclasses.replace(config, projection_norm=True, projection_gelu=True)
        assert cost(with_norm)["total"].parameters == 24_186_512


def test_every_cell_of_the_papers_tables_is_equal_or_has_its_reason() -> None:
    assert {row.table for row in ROWS} == set(TABLES)
    for row in ROWS:
        assert set(row.differing()) == set(row.reasons), row.label


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(name: str) -> None:
    parts = cost(PRESETS[name].config, keys_values="materialised")
    parameters, without_positions, giga_macs = COUNTS[name]
    assert parts["total"].parameters == parameters
    assert parts["total"].parameters - parts["positions"].parameters == without_positions
    assert round(parts["total"].macs / 1e9, 3) == giga_macs


@pytest.mark.parametrize("name", list_models())
def test_parameters_equal_the_built_models(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert cost(model.config)["total"].parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize("keys_values", ["lazy", "materialised"])
@pytest.mark.parametrize(
    "name",
    ["crossvit_9_dagger_240", "crossvit_pico_32", "crossvit_micro_96", "crossvit_18_t2t_240"],
)
def test_macs_equal_a_counter(name: str, keys_values: str) -> None:
    with torch.device("meta"):
        model = create_model(name, accelerated=False).eval()
        if keys_values == "lazy":
            model = own_copy(model)
        images = torch.empty(1, 3, *model.config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    counted = counter.get_total_flops() // 2
    # The counter also sees q·b_k, one row a head: left out of the closed form as every bias is.
    exact = cost(model.config, keys_values=keys_values)["total"].macs
    assert counted == pytest.approx(exact, rel=1e-4)


def test_lazy_keys_and_values_make_the_exchange_thirty_times_cheaper() -> None:
    """In the multiply–accumulates that grow with the number of tokens, at 240 pixels."""
    config = PRESETS["crossvit_9_240"].config
    eager, lazy = (
        cost(config, keys_values=form)["fusion"].macs for form in ("materialised", "lazy")
    )
    fixed = (
        sum(2 * branch.dim**2 for branch in config.branches) * config.stages
    )  # query and output projections
    exchange = (
        config.stages * 4 * config.branches[0].dim * config.branches[1].dim
    )  # f and g, both ways
    lazy_key_and_value = sum(2 * branch.dim**2 for branch in config.branches) * config.stages
    ratio = (eager - fixed - exchange) / (lazy - fixed - exchange - lazy_key_and_value)
    assert ratio > 30
