"""Closed-form costs against the paper's exact counts and against counters."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossvit import create_model, list_models
from crossvit.model.cost import cost
from crossvit.model.presets import PRESETS

# name: parameters, parameters without position embeddings, GMACs with keys and values built (PAPER, section 2)
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
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(name: str) -> None:
    parts = cost(PRESETS[name].config)
    parameters, without_positions, giga_macs = COUNTS[name]
    assert parts["total"].parameters == parameters
    assert parts["total"].parameters - parts["positions"].parameters == without_positions
    assert round(parts["total"].macs / 1e9, 3) == giga_macs


@pytest.mark.parametrize("name", list_models())
def test_parameters_equal_the_built_models(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert cost(model.config)["total"].parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["crossvit_9_dagger_240", "crossvit_pico_32", "crossvit_micro_96"])
def test_lazy_macs_equal_a_counter(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
        images = torch.empty(1, 3, *model.config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    counted = counter.get_total_flops() // 2
    # The counter also sees q·b_k, one row a head: left out of the closed form as every bias is.
    assert counted == pytest.approx(cost(model.config, keys_values="lazy")["total"].macs, rel=1e-4)


def test_lazy_keys_and_values_make_the_exchange_thirty_times_cheaper() -> None:
    """In the multiply–accumulates that grow with the number of tokens, at 240 pixels."""
    config = PRESETS["crossvit_9_240"].config
    eager, lazy = (cost(config, keys_values=form)["fusion"].macs for form in ("materialised", "lazy"))
    fixed = sum(2 * branch.dim**2 for branch in config.branches) * config.stages  # query and output projections
    exchange = config.stages * 4 * config.branches[0].dim * config.branches[1].dim  # f and g, both ways
    lazy_key_and_value = sum(2 * branch.dim**2 for branch in config.branches) * config.stages
    ratio = (eager - fixed - exchange) / (lazy - fixed - exchange - lazy_key_and_value)
    assert ratio > 30
