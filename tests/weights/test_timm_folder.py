"""The folder for timm and Transformers: what they load computes what the model here computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import crossvit
from crossvit import BranchConfig, CrossViTConfig
from crossvit.data.preprocess import Preprocessing
from crossvit.errors import WeightsError
from crossvit.factory import model_config
from crossvit.results import TrainingResult
from crossvit.train.loop import fit
from crossvit.train.recipe import load_recipe
from crossvit.weights.files import read_weights
from crossvit.weights.timm_folder import save_timm, timm_arguments

timm = pytest.importorskip("timm", reason="timm is not installed")

Command = Callable[..., tuple[int, str, str]]

OWN = CrossViTConfig(
    image_size=(48, 72),
    num_classes=3,
    stages=2,
    branches=(
        BranchConfig(patch=4, dim=16, heads=2, depth=1),
        BranchConfig(patch=6, dim=24, heads=3, depth=2, image_scale=0.75, mlp_ratio=2.5),
    ),
)
CONFIGS = {
    "released": model_config("crossvit_9_dagger_240", num_classes=5),
    "another size": model_config("crossvit_9_240", num_classes=5, image_size=120, in_channels=1),
    "oblong": model_config("crossvit_9_240", num_classes=5, image_size=(240, 480)),
    "Table 7, A": model_config("crossvit_small_240_a", num_classes=5),
    "Table 7, C": model_config("crossvit_small_240_c", num_classes=5),
    "Table 7, D, as released": model_config(
        "crossvit_small_240_d", num_classes=5, as_released=True
    ),
    "a config of its own": OWN,
}


def preprocessing(config: CrossViTConfig, **changes: Any) -> dict[str, Any]:
    half = (0.5,) * config.in_channels
    return Preprocessing(
        image_size=config.image_size, **({"mean": half, "std": half} | changes)
    ).to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_timm_loads_the_folder_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = crossvit.create_model(CONFIGS[name]).eval()
    folder = save_timm(
        tmp_path / "model", ours.state_dict(), ours.config, preprocessing=preprocessing(ours.config)
    )
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, ours.config.in_channels, *ours.config.image_size)
    logits = ours(images)
    assert (theirs(images) - logits).abs().max() < 1e-5 * logits.abs().max()
    again = crossvit.create_model(ours.config, weights=folder)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True)
    )


def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = crossvit.create_model(CONFIGS["released"]).eval()
    classes = ["ant", "bee", "cat", "dog", "eel"]
    folder = save_timm(
        tmp_path / "model",
        ours.state_dict(),
        ours.config,
        classes=classes,
        preprocessing=preprocessing(ours.config),
    )
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 240, 240)
    torch.testing.assert_close(
        theirs(pixel_values=images).logits, ours(images), atol=1e-5, rtol=1e-5
    )
    assert list(theirs.config.id2label.values()) == classes


@pytest.mark.parametrize("crop", [None, 0.875, 1.0])
def test_timms_preprocessing_of_a_picture_is_ours(crop: float | None, tmp_path: Path) -> None:
    ours = crossvit.create_model("crossvit_9_240", num_classes=2, image_size=48)
    described = preprocessing(ours.config, crop=crop)
    folder = save_timm(tmp_path / "model", ours.state_dict(), ours.config, preprocessing=described)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    picture = Image.effect_mandelbrot((90, 70), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    torch.testing.assert_close(
        transform(picture), torch.from_numpy(Preprocessing.from_dict(described)(picture))
    )
    back = read_weights(folder)
    assert back.preprocessing == described
    save_file(back.tensors, folder / "model.safetensors")  # without our header
    assert read_weights(folder).preprocessing == described  # now from timm's own config.json


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fusion": "pairwise"}, "its fusion is pairwise"),
        ({"fusion_depth": 2}, r"every fusion block sees the patches \(as_released=False\)"),
        (
            {"projection_norm": False, "fusion": "none"},
            "its fusion is none; f and g have no LayerNorm or no GELU",
        ),
        ({"branches": OWN.branches[:1], "fusion": "none"}, "it has 1 branch, not two"),
        ({"branches": (*OWN.branches, OWN.branches[0])}, "it has 3 branches, not two"),
        ({"branches": OWN.branches[::-1]}, "its first branch is deeper than its second"),
        (
            {"branches": tuple(dataclasses.replace(b, class_token=False) for b in OWN.branches)},
            "it has no class tokens",
        ),
        (
            {
                "branches": tuple(
                    dataclasses.replace(b, patch=4, tokeniser="halving") for b in OWN.branches
                )
            },
            "tokenisers are halving",
        ),
        ({"image_size": (52, 72)}, "another aspect than the input"),
    ],
)
def test_what_timm_cannot_compute_is_refused_with_every_reason(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(WeightsError, match=rf"cannot load it: .*{reason}"):
        timm_arguments(dataclasses.replace(OWN, **changes))


@pytest.fixture(scope="module")
def paper_run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """One epoch of a model of the paper, small, on `scans`."""
    changes = {
        "model": "crossvit_9_dagger_240",
        "image_size": 48,
        "epochs": 1,
        "batch_size": 16,
        "precision": "fp32",
    }
    out = tmp_path_factory.mktemp("runs") / "paper"
    return fit(load_recipe("small", data=str(scans), out=str(out), device="cpu", **changes))


def test_a_run_becomes_a_folder_that_predicts_the_same_in_timm(
    paper_run: TrainingResult, scans: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "digits-012"
    status, out, err = command("weights", "save-timm", paper_run.run, folder)
    assert (status, err) == (0, "")
    assert f"local-dir:{folder}" in out
    picture = next(scans.glob("1/*.png"))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    chances = theirs(transform(Image.open(picture).convert("RGB"))[None]).softmax(-1)[0]
    labels = json.loads((folder / "config.json").read_text())["label_names"]
    [ours] = crossvit.Predictor(paper_run.run, device="cpu")([picture])
    assert {label.label: label.probability for label in ours.top} == pytest.approx(
        dict(zip(labels, chances.tolist(), strict=True)), abs=1e-5
    )
    card = (folder / "README.md").read_text()
    assert "- **Top-1:**" in card
    assert "- **Classes:** 3: 0, 1, 2" in card
    assert str(scans.parent) not in card  # where it lay on this machine is nobody's business
    code = card.split("```python\n")[3].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('weights="digits-012"', f"weights={str(folder)!r}"), names)
    assert names["model"].config.num_classes == 3
    status, _, err = command("weights", "save-timm", paper_run.run, folder)
    assert status == 2
    assert "add --overwrite" in err


def test_a_released_file_without_classes_becomes_a_folder_too(
    command: Command, tmp_path: Path
) -> None:
    model = crossvit.create_model("crossvit_9_240", in_channels=1)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    status, out, err = command(
        "weights", "save-timm", tmp_path / "w.pth", tmp_path / "folder", "--json"
    )
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "folder": str(tmp_path / "folder"),
        "model": "crossvit_9_240",
        "num_classes": 1000,
    }
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert theirs.pretrained_cfg["crop_pct"] == 0.875
    assert theirs.pretrained_cfg["mean"] == [0.449]


def test_a_folder_that_timm_wrote_is_known_and_loads(command: Command, tmp_path: Path) -> None:
    theirs = timm.create_model("crossvit_9_dagger_240", img_size=120, num_classes=7).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    status, out, _ = command("weights", "show", tmp_path / "theirs", "--json")
    shown = json.loads(out)
    assert status == 0
    assert (shown["model"], shown["image_size"], shown["num_classes"]) == (
        "crossvit_9_dagger_240",
        [120, 120],
        7,
    )
    ours = crossvit.create_model(
        CrossViTConfig.from_dict(shown["config"]), weights=tmp_path / "theirs"
    ).eval()
    images = torch.randn(1, 3, 120, 120)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_a_folder_of_timms_with_unusual_arguments_is_refused(
    command: Command, tmp_path: Path
) -> None:
    theirs = timm.create_model("crossvit_9_dagger_240", num_heads=[2, 2])
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    status, _, err = command("weights", "show", tmp_path / "theirs")
    assert status == 1
    assert "built in timm with num_heads=[2, 2]" in err
