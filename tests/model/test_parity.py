"""Every released model computes what timm's implementation computes with the same weights: logits and gradients."""

from __future__ import annotations

import pytest
import torch

import crossvit
from crossvit.model.presets import PRESETS
from crossvit.weights.keys import renamed, to_ours

timm = pytest.importorskip("timm", reason="timm is not installed")

RELEASED = [name for name, preset in PRESETS.items() if preset.released]


def scale_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max()


@pytest.mark.parametrize("name", RELEASED)
def test_logits_and_gradients_equal_timm(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    ours = crossvit.create_model(name).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.state_dict()))
    images = torch.randn(1, 3, *ours.config.image_size)
    direction = torch.randn(1, 1000)

    their_logits, our_logits = theirs(images), ours(images)
    assert (our_logits - their_logits).abs().max() < 1e-5 * scale_of(their_logits)

    (their_logits * direction).sum().backward()
    (our_logits * direction).sum().backward()
    names = renamed(ours.state_dict(), "timm")
    our_gradients = {names[key]: parameter.grad for key, parameter in ours.named_parameters()}
    largest = max(scale_of(parameter.grad) for parameter in theirs.parameters())
    for key, parameter in theirs.named_parameters():
        difference = (our_gradients[key] - parameter.grad).abs().max()
        # A key bias has a gradient of zero but for rounding, so it is held against the largest gradient instead.
        scale = largest if key.endswith("wk.bias") else scale_of(parameter.grad)
        assert difference < 2e-4 * scale, key


def test_gradients_equal_timm_in_double_precision() -> None:
    """Rounding out of the way: the same gradients to eleven digits."""
    torch.manual_seed(0)
    theirs = timm.create_model("crossvit_9_dagger_240").double().eval()
    ours = crossvit.create_model("crossvit_9_dagger_240").double().eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.state_dict()))
    images = torch.randn(1, 3, 240, 240, dtype=torch.float64)
    for model in (theirs, ours):
        model(images).square().sum().backward()
    names = renamed(ours.state_dict(), "timm")
    our_gradients = {names[key]: parameter.grad for key, parameter in ours.named_parameters()}
    largest = max(scale_of(parameter.grad) for parameter in theirs.parameters())
    for key, parameter in theirs.named_parameters():
        assert (our_gradients[key] - parameter.grad).abs().max() < 1e-11 * largest, key


def test_released_names_are_timms() -> None:
    assert sorted(RELEASED) == sorted(timm.list_models("crossvit_*"))


@pytest.mark.parametrize("name", RELEASED)
def test_test_time_crop_and_normalisation_are_timms(name: str) -> None:
    from crossvit.data.preprocess import IMAGENET_MEAN, IMAGENET_STD

    theirs = timm.get_pretrained_cfg(name)
    assert theirs.crop_pct == PRESETS[name].crop
    assert theirs.input_size[1:] == PRESETS[name].config.image_size
    assert (theirs.mean, theirs.std) == (IMAGENET_MEAN, IMAGENET_STD)
