"""Weight files: three layouts told apart by their keys, strict, and never able to run code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import crossvit
from crossvit.errors import UsageError, WeightsError
from crossvit.model.presets import PRESETS
from crossvit.results import TrainingResult
from crossvit.weights.files import read_weights
from crossvit.weights.keys import authors_name, layout_of, timm_name, to_ours

SMALL = {"image_size": 32, "num_classes": 4, "stages": 1}


def small_model(**changes: object) -> crossvit.CrossViT:
    return crossvit.create_model("crossvit_9_dagger_240", **(SMALL | changes))


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.released])
def test_names_are_one_to_one_in_every_layout(name: str) -> None:
    with torch.device("meta"):
        ours = list(crossvit.create_model(name).state_dict())
    for rename in (timm_name, authors_name):
        theirs = [rename(key) for key in ours]
        assert len(set(theirs)) == len(ours)
        assert to_ours(dict(zip(theirs, ours, strict=True)), ours) == {key: key for key in ours}


@pytest.mark.parametrize("layout", ["ours", "timm", "authors"])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth under model"])
def test_every_layout_and_file_loads_to_the_bit(layout: str, kind: str, tmp_path: Path) -> None:
    source, target = small_model(), small_model()
    rename = {"ours": str, "timm": timm_name, "authors": authors_name}[layout]
    state = {rename(key): value for key, value in source.state_dict().items()}
    assert layout_of(state) == layout
    path = tmp_path / f"weights.{kind.split()[0]}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if "under" in kind else state, path)
    assert crossvit.load_weights(target, path) == []
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_missing_and_unused_keys_are_all_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["heads.1.bias"], state["norms.0.weight"]
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    target = small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"missing heads\.1\.bias, norms\.0\.weight; not used extra\.weight"):
        crossvit.load_weights(target, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_another_class_count_needs_a_new_head(tmp_path: Path) -> None:
    save_file(small_model().state_dict(), tmp_path / "w.safetensors")
    target = small_model(num_classes=7)
    with pytest.raises(WeightsError, match=r"heads\.0\.bias \(4,\) for \(7,\), heads\.0\.weight"):
        crossvit.load_weights(target, tmp_path / "w.safetensors")
    own_head = target.heads[0].weight.clone()
    notes = crossvit.load_weights(target, tmp_path / "w.safetensors", head="new")
    assert notes == ["new classifier: 7 classes in place of 4"]
    assert torch.equal(target.heads[0].weight, own_head)


def test_another_image_size_says_what_to_do(tmp_path: Path) -> None:
    save_file(small_model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"tokens\.0\.positions .*give the image size that the weights were trained at"):
        crossvit.load_weights(small_model(image_size=64), tmp_path / "w.safetensors")


def test_create_model_takes_weights_of_a_run(tiny_run: TrainingResult) -> None:
    model = crossvit.create_model("crossvit_pico_32", num_classes=3, weights=tiny_run.run)
    assert torch.equal(model.heads[0].weight, read_weights(tiny_run.run)["heads.0.weight"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
