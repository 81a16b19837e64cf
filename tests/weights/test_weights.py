"""Weight files: three layouts told apart by their keys, strict, and never able to run code."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import crossvit
from crossvit.errors import UsageError, WeightsError
from crossvit.model.presets import PRESETS
from crossvit.results import TrainingResult
from crossvit.weights.adapt import spread_channels
from crossvit.weights.convert import convert_weights
from crossvit.weights.files import Weights, header, read_weights, write_weights
from crossvit.weights.identify import blank_state, identify
from crossvit.weights.keys import LAYOUTS, layout_of, renamed, to_ours

SMALL = {"image_size": 32, "num_classes": 4, "stages": 1}


def small_model(**changes: object) -> crossvit.CrossViT:
    return crossvit.create_model("crossvit_9_dagger_240", **(SMALL | changes))


RELEASED = [name for name, preset in PRESETS.items() if preset.released]


def in_timms_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {renamed(state, "timm")[name]: value for name, value in state.items()}


@pytest.mark.parametrize("name", RELEASED)
def test_names_are_one_to_one_in_every_layout(name: str) -> None:
    ours = list(blank_state(PRESETS[name].config))
    for layout in LAYOUTS:
        theirs = renamed(ours, layout)
        assert len(set(theirs.values())) == len(ours)
        assert to_ours({their: our for our, their in theirs.items()}, ours) == {
            key: key for key in ours
        }


@pytest.mark.parametrize("depth", [1, 2])
def test_fusion_blocks_have_timms_names(depth: int) -> None:
    """With timm's own model as the witness; one block has no number in its name, or a nought."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    config = dataclasses.replace(
        PRESETS["crossvit_9_240"].config, fusion_depth=depth, as_released=depth > 1
    )
    ours = blank_state(config)
    for third in {1: (0, 1), 2: (2,)}[depth]:
        theirs = timm.create_model("crossvit_9_240", depth=[[1, 3, third]] * 3).state_dict()
        shapes = {key: value.shape for key, value in to_ours(theirs, ours).items()}
        assert shapes == {key: value.shape for key, value in ours.items()}
        assert third == 1 or set(renamed(ours, "timm").values()) == set(theirs)


@pytest.mark.parametrize("name", RELEASED)
def test_there_and_back_through_every_layout_keeps_every_bit(name: str, tmp_path: Path) -> None:
    """authors' .pth -> ours -> timm -> authors' .pth, for each released model at its full size."""
    torch.manual_seed(0)
    blank = blank_state(PRESETS[name].config)
    theirs = renamed(blank, "authors")
    first = {
        theirs[key]: torch.rand(value.shape).to(torch.bfloat16) for key, value in blank.items()
    }
    first["norm.0.bias"] = torch.rand(first["norm.0.bias"].shape)  # full precision among half of it
    torch.save(first, tmp_path / "a.pth")
    steps = [
        ("a.pth", "ours.safetensors", "ours"),
        ("ours.safetensors", "timm.safetensors", "timm"),
    ]
    for source, destination, to in [*steps, ("timm.safetensors", "b.pth", "authors")]:
        done = convert_weights(tmp_path / source, tmp_path / destination, to=to)
        assert (done.model, done.to, done.tensors) == (name, to, len(blank))
        assert layout_of(read_weights(tmp_path / destination).tensors) == to
        (tmp_path / source).unlink()
    last = torch.load(tmp_path / "b.pth", weights_only=True)
    assert last.keys() == first.keys()
    assert all(torch.equal(last[key], first[key]) for key in first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth under model"])
def test_every_layout_and_file_loads_to_the_bit(layout: str, kind: str, tmp_path: Path) -> None:
    source, target = small_model(), small_model()
    state = {
        renamed(source.state_dict(), layout)[key]: value
        for key, value in source.state_dict().items()
    }
    assert layout_of(state) == layout
    path = tmp_path / f"weights.{kind.split()[0]}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if "under" in kind else state, path)
    assert crossvit.load_weights(target, path) == []
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True)
    )


def test_missing_and_unused_keys_are_all_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["heads.1.bias"], state["norms.0.weight"]
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    target = small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"missing heads\.1\.bias, norms\.0\.weight; not used extra\.weight"
    ):
        crossvit.load_weights(target, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_another_class_count_needs_a_new_head(tmp_path: Path) -> None:
    save_file(small_model().state_dict(), tmp_path / "w.safetensors")
    target = small_model(num_classes=7)
    with pytest.raises(
        WeightsError, match=r"heads\.0\.bias \(4,\) for \(7,\), heads\.0\.weight .*head='new' makes"
    ):
        crossvit.load_weights(target, tmp_path / "w.safetensors")
    own_head = target.heads[0].weight.clone()
    notes = crossvit.load_weights(target, tmp_path / "w.safetensors", head="new")
    assert notes == ["new classifier: 7 classes in place of 4"]
    assert torch.equal(target.heads[0].weight, own_head)


def test_rows_of_classes_with_the_same_name_are_kept(tmp_path: Path) -> None:
    source = small_model()
    described = header(
        model=None, config=source.config, classes=["ant", "bee", "cat", "dog"], preprocessing=None
    )
    write_weights(tmp_path / "w.safetensors", source.state_dict(), described)
    target = small_model(num_classes=3)
    before = [head.weight.clone() for head in target.heads]
    notes = crossvit.load_weights(
        target, tmp_path / "w.safetensors", head="new", classes=["dog", "eel", "bee"]
    )
    assert notes == [
        "new classifier: 3 classes in place of 4; 2 with the same name keep their rows"
    ]
    for new, old, fresh in zip(target.heads, source.heads, before, strict=True):
        assert torch.equal(new.weight, torch.stack([old.weight[3], fresh[1], old.weight[1]]))
        assert torch.equal(new.bias, torch.stack([old.bias[3], torch.zeros(()), old.bias[1]]))
    with pytest.raises(WeightsError, match="has a classifier for other classes: add head='new'"):
        crossvit.load_weights(
            small_model(), tmp_path / "w.safetensors", classes=["bee", "ant", "cat", "dog"]
        )


def test_positions_are_resampled_to_another_size(tmp_path: Path) -> None:
    source = small_model(image_size=48)
    save_file(in_timms_names(source.state_dict()), tmp_path / "w.safetensors")
    target = small_model(image_size=(96, 64))
    notes = crossvit.load_weights(target, tmp_path / "w.safetensors")
    assert notes == [
        "positions of branch 0 resampled from 4x4 to 8x5 patches",
        "positions of branch 1 resampled from 3x3 to 6x4 patches",
    ]
    for there, here in zip(source.tokens, target.tokens, strict=True):
        wanted = F.interpolate(
            there.positions[:, 1:].transpose(1, 2).unflatten(2, there.grid),
            size=here.grid,
            mode="bicubic",
            align_corners=False,
        )
        assert torch.equal(here.positions[:, 1:], wanted.flatten(2).transpose(1, 2))
        assert torch.equal(here.positions[:, :1], there.positions[:, :1])
    assert torch.isfinite(target(torch.randn(1, 3, 96, 64))).all()


def test_an_oblong_grid_is_resampled_where_the_file_says_what_it_is(tmp_path: Path) -> None:
    source = small_model(image_size=(48, 96))
    described = header(model=None, config=source.config, classes=None, preprocessing=None)
    write_weights(tmp_path / "known.safetensors", source.state_dict(), described)
    save_file(source.state_dict(), tmp_path / "unknown.safetensors")
    assert (
        crossvit.load_weights(small_model(image_size=(48, 96)), tmp_path / "unknown.safetensors")
        == []
    )
    turned = small_model(image_size=(96, 48))  # as many patches, on another grid
    assert "positions of branch 0 resampled from 4x8 to 8x4 patches" in crossvit.load_weights(
        turned, tmp_path / "known.safetensors"
    )
    with pytest.raises(
        WeightsError,
        match=r"tokens\.0\.positions .*; positions are resampled from a square grid, or",
    ):
        crossvit.load_weights(small_model(image_size=96), tmp_path / "unknown.safetensors")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["crossvit_9_240", "crossvit_9_dagger_240", "crossvit_nano_64"])
def test_first_convolutions_adapt_to_other_channels(
    name: str, channels: int, tmp_path: Path
) -> None:
    """A picture whose channels are all alike gives what it gave."""
    small = {"image_size": 64, "num_classes": 2, "stages": 1}
    source = crossvit.create_model(name, **small).double().eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = crossvit.create_model(name, in_channels=channels, **small).double().eval()
    assert crossvit.load_weights(target, tmp_path / "w.safetensors") == [
        f"first convolution of branch {index} adapted from 3 channels to {channels}"
        for index in range(2)
    ]
    grey = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(
        target(grey.expand(1, channels, -1, -1)), source(grey.expand(1, 3, -1, -1))
    )


def test_each_channel_is_used_alike(tmp_path: Path) -> None:
    rgb = torch.tensor([[1.0, 2.0, 3.0]])[:, :, None, None]
    assert spread_channels(rgb, 4).flatten().tolist() == [0.5, 2.0, 3.0, 0.5]
    assert spread_channels(rgb, 6).flatten().tolist() == [0.5, 1.0, 1.5, 0.5, 1.0, 1.5]
    assert spread_channels(rgb, 1).flatten().tolist() == [6.0]
    assert spread_channels(rgb, 2).flatten().tolist() == [3.0, 3.0]


def test_another_number_type_is_said_and_integers_are_refused(tmp_path: Path) -> None:
    state = small_model().state_dict()
    save_file(
        {key: value.bfloat16() for key, value in state.items()}, tmp_path / "half.safetensors"
    )
    assert crossvit.load_weights(small_model(), tmp_path / "half.safetensors") == [
        "torch.bfloat16 weights loaded as torch.float32"
    ]
    save_file(
        state | {"norms.0.bias": torch.zeros(128, dtype=torch.int64)},
        tmp_path / "whole.safetensors",
    )
    with pytest.raises(WeightsError, match=r"norms\.0\.bias torch\.int64 \(128,\) for \(128,\)"):
        crossvit.load_weights(small_model(), tmp_path / "whole.safetensors")


def test_every_misshapen_key_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = small_model().state_dict()
    save_file(
        state | {"norms.0.bias": torch.zeros(5), "tokens.1.class_token": torch.zeros(2, 2)},
        tmp_path / "w.safetensors",
    )
    target = small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    expected = (
        r"norms\.0\.bias \(5,\) for \(128,\), tokens\.1\.class_token \(2, 2\) for \(1, 1, 256\)$"
    )
    with pytest.raises(WeightsError, match=expected):
        crossvit.load_weights(target, tmp_path / "w.safetensors", head="new")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("name", [*PRESETS])
def test_every_preset_is_known_by_its_tensors(name: str) -> None:
    config = dataclasses.replace(PRESETS[name].config, num_classes=6)
    tensors = {key: torch.empty(value.shape) for key, value in blank_state(config).items()}
    assert identify(Weights("w", Path("w.pth"), tensors)) == (name, config)


@pytest.mark.parametrize(
    "name", ["crossvit_15_dagger_408", "crossvit_18_dagger_504", "crossvit_9_240"]
)
def test_weights_of_another_size_channels_and_classes_are_known(name: str) -> None:
    config = dataclasses.replace(
        PRESETS[name].config, num_classes=2, in_channels=4, image_size=(96, 96)
    )
    tensors = {key: torch.empty(value.shape) for key, value in blank_state(config).items()}
    _, found = identify(Weights("w", Path("w.pth"), tensors))
    assert (found.num_classes, found.in_channels, found.image_size) == (2, 4, (96, 96))
    for one, other in zip(
        found.branches, config.branches, strict=True
    ):  # at 96 pixels 224/240 and 384/408 are the same
        assert one.image_size((96, 96)) == other.image_size((96, 96))
        assert dataclasses.replace(one, image_scale=1.0) == dataclasses.replace(
            other, image_scale=1.0
        )


LOOK = {
    "image_size": [32, 32],
    "crop": None,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "channels": 0,
}


def test_what_a_header_says_comes_first_and_must_be_true(tmp_path: Path) -> None:
    config = small_model().config
    described = header(
        model="crossvit_9_dagger_240",
        config=config,
        classes=["a", "b", "c", "d"],
        preprocessing=LOOK,
    )
    write_weights(tmp_path / "w.safetensors", small_model().state_dict(), described)
    weights = read_weights(tmp_path / "w.safetensors")
    assert identify(weights) == (None, config)  # one stage of three is not that preset
    assert (weights.classes, weights.preprocessing) == (("a", "b", "c", "d"), LOOK)
    write_weights(tmp_path / "w.safetensors", small_model(stages=2).state_dict(), described)
    with pytest.raises(WeightsError, match=r"is damaged|not used encoders\.1"):
        identify(read_weights(tmp_path / "w.safetensors"))
    write_weights(
        tmp_path / "w.safetensors",
        small_model().state_dict(),
        {"config": {"branches": [{"patch": 0}]}},
    )
    with pytest.raises(WeightsError, match="what .* says of its model is damaged"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("destination", "to", "problem"),
    [
        ("there.pth", "ours", "exists: add --overwrite"),
        ("w.onnx", "ours", r"should end in \.safetensors or \.pth"),
        ("w.pth", "theirs", "to = 'theirs': should be one of ours, timm, authors"),
    ],
)
def test_a_conversion_that_cannot_be_asked_for_is_a_wrong_call(
    destination: str, to: str, problem: str, tiny_run: TrainingResult, tmp_path: Path
) -> None:
    (tmp_path / "there.pth").write_bytes(b"mine")
    with pytest.raises(UsageError, match=problem):
        convert_weights(tiny_run.run, tmp_path / destination, to=to)
    assert (tmp_path / "there.pth").read_bytes() == b"mine"


def test_what_the_other_layout_cannot_hold_is_refused_with_the_reason(
    tiny_run: TrainingResult, tmp_path: Path
) -> None:
    with pytest.raises(
        WeightsError, match="cannot load it: its tokenisers are halving and halving"
    ):
        convert_weights(tiny_run.run, tmp_path / "w.pth", to="authors")
    assert not (tmp_path / "w.pth").exists()


def test_weights_of_no_model_known_here_are_refused_with_the_difference(tmp_path: Path) -> None:
    state = small_model().state_dict()  # one stage in place of three
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError, match=r"no model known here \(it is not crossvit_9_240: .*missing encoders\.1"
    ):
        identify(read_weights(tmp_path / "w.safetensors"))


def test_a_model_without_class_tokens_keeps_its_weights(tmp_path: Path) -> None:
    source = crossvit.create_model(
        "crossvit_small_240_no_class_token", stages=1, image_size=32, num_classes=2
    )
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = crossvit.create_model(
        "crossvit_small_240_no_class_token", stages=1, image_size=32, num_classes=2
    )
    crossvit.load_weights(target, tmp_path / "w.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True)
    )


def test_create_model_takes_weights_of_a_run(tiny_run: TrainingResult) -> None:
    model = crossvit.create_model("crossvit_pico_32", num_classes=3, weights=tiny_run.run)
    assert torch.equal(model.heads[0].weight, read_weights(tiny_run.run).tensors["heads.0.weight"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read as weights"):
        read_weights("evil.pth")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.pth", "empty.safetensors"])
def test_a_damaged_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = small_model().state_dict()
    if name.startswith("cut"):
        (save_file if name.endswith("safetensors") else torch.save)(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"hello" * name.startswith("text"))
    with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_another_models_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights at .*nowhere\.pth"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="not the weights of a CrossViT"):
        layout_of(["conv1.weight", "fc.bias"])
