"""Weight files that nobody should trust: what they may say, and that each ends in one clear line."""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

import crossvit
from crossvit import CrossViTConfig
from crossvit.errors import UsageError, WeightsError
from crossvit.weights.files import header, read_weights, write_weights
from crossvit.weights.hub import locate
from crossvit.weights.identify import identify
from crossvit.weights.keys import renamed

Command = Callable[..., tuple[int, str, str]]
SMALL = {"image_size": 32, "num_classes": 4, "stages": 1}


def small_model(**changes: Any) -> crossvit.CrossViT:
    return crossvit.create_model("crossvit_9_dagger_240", **(SMALL | changes))


def described(config: CrossViTConfig, /, **changes: Any) -> dict[str, Any]:
    return header(model=None, config=config, classes=None, preprocessing=None) | changes


def test_the_authors_training_checkpoints_load(tmp_path: Path) -> None:
    """They hold the options of the script, an argparse.Namespace, beside the model."""
    source, target = small_model(), small_model()
    names = renamed(source.state_dict(), "authors")
    state = {names[key]: value for key, value in source.state_dict().items()}
    optimizer = torch.optim.AdamW(source.parameters()).state_dict()
    torch.save(
        {"model": state, "optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        tmp_path / "c.pth",
    )
    assert crossvit.load_weights(target, tmp_path / "c.pth") == []
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True)
    )


def test_what_a_file_is_is_told_by_its_content(tmp_path: Path) -> None:
    state = small_model().state_dict()
    (tmp_path / "no-suffix").write_bytes(save(state))
    torch.save(state, tmp_path / "torch.safetensors")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("no-suffix", "torch.safetensors", "old.pth"):
        assert read_weights(tmp_path / name).tensors.keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"  <!DOCTYPE html><html>Log in</html>", "a web page"),
        (b"hello world", "not a file of tensors"),
        (struct.pack("<Q", 20) + b'{"a": "b"}          ', "its header is damaged"),
        (struct.pack("<Q", 10) + b'{"a": [1]}', "its header is damaged"),
        (b"PK\x03\x04 and then nothing", "cut off"),
        (b"\x80\x02 not a pickle", "not a file of tensors"),
    ],
)
def test_a_file_of_something_else_says_what_it_is(
    content: bytes, says: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    status, out, err = command("weights", "show", tmp_path / "w.pth")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"({says})" in err
    assert "weights_only" not in err


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_refused_pickle_names_what_it_holds_and_gives_no_bad_advice(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    status, _, err = command("weights", "show", "evil.pth")
    assert status == 1
    assert "it holds posix.system, which is not plain tensors; nothing of it was run" in err
    assert "weights_only" not in err
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.zeros(1).expand(10**9),
    ],
    ids=["sparse", "meta", "0-dimensional", "empty", "expanded"],
)
def test_tensors_that_no_parameter_is_are_refused_before_anything_is_loaded(
    odd: torch.Tensor, tmp_path: Path
) -> None:
    target = small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    torch.save(target.state_dict() | {"norms.1.bias": odd}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"'norms\.1\.bias' is not a plain tensor"):
        crossvit.load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_names_are_printed_without_their_escape_codes(tmp_path: Path, command: Command) -> None:
    state = small_model().state_dict()
    torch.save(state | {"evil\n\x1b[31mname": torch.zeros(1)}, tmp_path / "w.pth")
    _, _, err = command("weights", "show", tmp_path / "w.pth")
    assert "\x1b" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": "abc"}, "is damaged"),
        ({"config": {"branches": [5]}}, "is damaged"),
        ({"classes": ["a", "b"]}, "classes: should be 4 names"),
        ({"classes": "cats"}, "classes: should be 4 names"),
        ({"preprocessing": {"foo": 1}}, "is damaged"),
    ],
)
def test_a_header_that_cannot_be_true_is_one_line(
    changes: dict[str, Any], says: str, tmp_path: Path, command: Command
) -> None:
    model = small_model()
    write_weights(
        tmp_path / "w.safetensors", model.state_dict(), described(model.config, **changes)
    )
    status, _, err = command("weights", "show", tmp_path / "w.safetensors")
    assert (status, err.count("\n")) == (1, 1)
    assert says in err


@pytest.mark.parametrize(
    "changes", [{"num_classes": 9}, {"image_size": [480, 480]}, {"stages": 10**8}]
)
def test_a_header_that_the_tensors_contradict_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = small_model()
    record = described(model.config)
    record["config"] |= changes
    write_weights(tmp_path / "w.safetensors", model.state_dict(), record)
    with pytest.raises(WeightsError, match=r"do not fit what they are said to be|is damaged"):
        identify(read_weights(tmp_path / "w.safetensors"))


def test_a_preset_that_a_header_names_wrongly_is_not_believed(tmp_path: Path) -> None:
    model = crossvit.create_model("crossvit_pico_32", num_classes=3)
    for name, found in (
        ("crossvit_pico_32", "crossvit_pico_32"),
        ("crossvit_18_240", None),
        ("nosuch", None),
        (5, None),
    ):
        write_weights(
            tmp_path / "w.safetensors", model.state_dict(), described(model.config, model=name)
        )
        assert identify(read_weights(tmp_path / "w.safetensors"))[0] == found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": 8}, r"branches\[0\]\.heads 2 for 8"),
        ({"as_released": True, "fusion_depth": 2}, "as_released False for True"),
        ({"projection_gelu": False}, "projection_gelu True for False"),
    ],
)
def test_weights_of_another_function_are_refused_though_they_fit(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    import dataclasses

    config = crossvit.create_model("crossvit_pico_32", num_classes=3).config
    heads = changes.pop("heads", None)
    made = dataclasses.replace(
        config, **{key: value for key, value in changes.items() if key == "fusion_depth"}
    )
    wanted = dataclasses.replace(made, **changes)
    if heads:
        wanted = dataclasses.replace(
            wanted, branches=tuple(dataclasses.replace(one, heads=heads) for one in wanted.branches)
        )
    source, target = crossvit.create_model(made), crossvit.create_model(wanted)
    if "projection_gelu" not in changes:  # without GELU the keys have other numbers
        assert {key: value.shape for key, value in source.state_dict().items()} == {
            key: value.shape for key, value in target.state_dict().items()
        }
    write_weights(tmp_path / "w.safetensors", source.state_dict(), described(made))
    with pytest.raises(WeightsError, match=rf"{says}|of another model"):
        crossvit.load_weights(target, tmp_path / "w.safetensors")


def test_numbers_that_are_not_finite_are_said(tmp_path: Path) -> None:
    state = small_model().state_dict()
    state["norms.0.bias"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    [note] = crossvit.load_weights(small_model(), tmp_path / "w.safetensors")
    assert "has numbers that are not finite" in note


def test_create_model_says_what_was_adapted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(small_model().state_dict(), tmp_path / "w.safetensors")
    small_model(weights=tmp_path / "w.safetensors", num_classes=7, in_channels=1, head="new")
    assert caplog.messages == [
        "first convolution of branch 0 adapted from 3 channels to 1",
        "first convolution of branch 1 adapted from 3 channels to 1",
        "new classifier: 7 classes in place of 4",
    ]
    with pytest.raises(UsageError, match="head = 'zzz': should be one of same, new"):
        small_model(head="zzz")


def test_a_timm_folder_without_safetensors_is_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("crossvit_9_240", num_classes=3)
    timm.models.save_for_hf(theirs, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "pytorch_model.bin").is_file()
    ours = crossvit.create_model("crossvit_9_240", num_classes=3, weights=tmp_path / "theirs")
    assert torch.equal(ours.heads[0].weight, theirs.head[0].weight)


def test_a_size_at_which_timm_gives_the_branches_other_images_is_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    timm.models.save_for_hf(
        timm.create_model("crossvit_9_240", img_size=(108, 240)),
        tmp_path / "t",
        safe_serialization=True,
    )
    with pytest.raises(
        WeightsError, match=r"timm gives the branches other image sizes at \(108, 240\) pixels"
    ):
        identify(read_weights(tmp_path / "t"))


# ---- places


@pytest.mark.parametrize(
    "digest", ["sha256=abc", f"sha256:{'0' * 64}", "md5=0", f"sha256={'g' * 64}", ""]
)
def test_a_digest_that_is_none_is_a_wrong_call(digest: str) -> None:
    for source in (f"https://127.0.0.1:9/w.pth#{digest}", f"acme/hands#{digest}"):
        with pytest.raises(UsageError, match="behind # stands sha256= and 64 hexadecimal digits"):
            locate(source)


@pytest.mark.parametrize(
    "source", ["x" * 5000, "~nobody-of-this-name/w.pth", "https://[::1/w.pth", "nul\0byte"]
)
def test_what_cannot_be_a_place_is_a_wrong_call(source: str, command: Command) -> None:
    status, _, err = command("weights", "show", source)
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["crossvit_18_dagger_504", "crossvit_pico_32"])
def test_a_model_without_released_weights_says_so(name: str) -> None:
    with pytest.raises(UsageError, match=f"no weights of {name} were released"):
        locate(name)


def test_a_cache_that_cannot_be_used_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="set CROSSVIT_CACHE to a folder of yours"):
        locate("acme/hands")


def test_a_damaged_record_of_digests_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    kept = tmp_path / "hub" / "acme--hands@main" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(save(small_model().state_dict()))
    for content in ("[1]", "{", "5"):
        (tmp_path / "sha256.json").write_text(content)
        with pytest.raises(WeightsError, match=r"sha256\.json is damaged"):
            locate("acme/hands")
    (tmp_path / "sha256.json").unlink()
    assert locate("acme/hands") == kept
    assert list(json.loads((tmp_path / "sha256.json").read_text())) == ["acme/hands@main"]


def test_an_empty_name_of_weights_is_a_wrong_call(
    scans: Path, tmp_path: Path, command: Command
) -> None:
    status, _, err = command("train", scans, "--out", tmp_path / "run", "--weights", "")
    assert status == 2
    assert "weights = '': should be a name, or left out" in err
