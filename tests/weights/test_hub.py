"""Weights from a hub and from addresses: fetched once, checked, gone on with, and clear when there is no network."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import crossvit
import crossvit.weights.hub
from crossvit.errors import UsageError, WeightsError
from crossvit.model.presets import PRESETS
from crossvit.weights.hub import locate
from crossvit.weights.keys import renamed
from support.loopback import Hub, serve_hub

NAME = "crossvit_9_dagger_240"
ANOTHER = save({"x": torch.ones(3)})
REPOSITORY = f"timm/{NAME}.in1k"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> crossvit.CrossViT:
    torch.manual_seed(0)
    return crossvit.create_model(NAME).eval()


@pytest.fixture(scope="module")
def released(model: crossvit.CrossViT) -> bytes:
    """Random weights in the layout of the released file on the hub."""
    state = model.state_dict()
    return save(
        {renamed(state, "timm")[name]: tensor for name, tensor in state.items()},
        metadata={"format": "pt"},
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, and an empty cache in `tmp_path / "cache"`."""
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "shared"))
        monkeypatch.setattr(crossvit.weights.hub, "PAUSE", 0.0)
        yield hub


def same_weights(one: crossvit.CrossViT, other: crossvit.CrossViT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("source", [NAME, REPOSITORY, f"hf-hub:{REPOSITORY}", f"{REPOSITORY}@main"])
def test_a_released_file_is_fetched_once_and_loads_to_the_bit(
    source: str, hub: Hub, released: bytes, model: crossvit.CrossViT
) -> None:
    hub.put(REPOSITORY, "model.safetensors", released)
    assert same_weights(crossvit.create_model(NAME, weights=source), model)
    asked = len(hub.asked)
    assert same_weights(crossvit.create_model(NAME, weights=source), model)
    assert len(hub.asked) == asked  # the second time nobody is asked


def test_a_revision_is_a_file_of_its_own(hub: Hub, released: bytes) -> None:
    hub.put(REPOSITORY, "model.safetensors", ANOTHER, revision="v2")
    hub.put(REPOSITORY, "model.safetensors", released)
    assert locate(f"{REPOSITORY}@v2").joinpath().read_bytes() == ANOTHER
    assert locate(REPOSITORY).read_bytes() == released


def test_an_answer_that_breaks_off_is_gone_on_with(hub: Hub, released: bytes) -> None:
    hub.put(REPOSITORY, "model.safetensors", released)
    hub.cut = [1 << 20]
    assert locate(REPOSITORY).read_bytes() == released
    assert [span for path, span in hub.fetched() if path.endswith(".safetensors")] == [
        None,
        "bytes=1048576-",
    ]


def test_a_second_call_goes_on_where_the_first_was_interrupted(
    hub: Hub, released: bytes, tmp_path: Path
) -> None:
    hub.put(REPOSITORY, "model.safetensors", released)
    hub.cut = [5 << 20] + [0] * 6
    with pytest.raises(
        WeightsError,
        match=r"stopped after 5\.2 of 35\.\d MB .*run the same command again to go on from there",
    ):
        locate(REPOSITORY)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.cut.clear()
    hub.asked.clear()
    assert locate(REPOSITORY).read_bytes() == released
    assert [span for path, span in hub.fetched() if path.endswith(".safetensors")] == [
        "bytes=5242880-"
    ]
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_bytes_of_another_version_are_not_gone_on_with(hub: Hub, released: bytes) -> None:
    hub.put(REPOSITORY, "model.safetensors", b"old" * 1_000_000)
    hub.cut = [1 << 20] + [0] * 6
    with pytest.raises(WeightsError, match="stopped after"):
        locate(REPOSITORY)
    hub.cut.clear()
    hub.put(REPOSITORY, "model.safetensors", released)
    assert locate(REPOSITORY).read_bytes() == released


def test_a_corrupted_transfer_is_refused_and_not_kept(
    hub: Hub, released: bytes, tmp_path: Path
) -> None:
    hub.put(REPOSITORY, "model.safetensors", released[:-1] + b"!")
    hub.announced[f"/{REPOSITORY}/resolve/main/model.safetensors"] = hashlib.sha256(
        released
    ).hexdigest()
    with pytest.raises(WeightsError, match=r"is not the file it should be: .* the hub announced"):
        locate(REPOSITORY)
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))
    hub.put(REPOSITORY, "model.safetensors", released)
    assert locate(REPOSITORY).read_bytes() == released


def test_a_file_damaged_in_the_cache_is_noticed(hub: Hub, released: bytes) -> None:
    hub.put(REPOSITORY, "model.safetensors", released)
    kept = locate(REPOSITORY)
    kept.write_bytes(released[:-1] + b"!")
    with pytest.raises(
        WeightsError, match=rf"recorded at its first use.*; remove {kept} and run again"
    ):
        locate(REPOSITORY)
    kept.unlink()
    assert locate(REPOSITORY).read_bytes() == released


def test_the_first_use_is_recorded_and_later_ones_must_equal_it(
    hub: Hub, released: bytes, tmp_path: Path
) -> None:
    hub.put("acme/hands", "model.safetensors", released)
    kept = locate("acme/hands")
    record = tmp_path / "cache" / "sha256.json"
    assert json.loads(record.read_text()) == {
        "acme/hands@main": hashlib.sha256(released).hexdigest()
    }
    kept.unlink()
    hub.put("acme/hands", "model.safetensors", ANOTHER)
    with pytest.raises(
        WeightsError, match=rf"recorded at its first use in {record} \(remove its line there"
    ):
        locate("acme/hands")
    record.unlink()
    assert locate("acme/hands").read_bytes() == ANOTHER


def test_what_is_fetched_and_whom_it_waits_for_is_said(
    hub: Hub, released: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put("acme/hands", "model.safetensors", released)
    hub.cut = [1 << 20]
    locate("acme/hands")
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0]
        == f"fetching {hub.address}/acme/hands/resolve/main/model.safetensors ({len(released) / 1e6:.1f} MB)"
    )
    assert said[1].startswith("no more bytes of acme/hands (")
    assert said[1].endswith("): trying again")
    locate("acme/hands")
    with pytest.raises(UsageError):
        locate("acme/nothing")
    assert capsys.readouterr().err == ""  # what is here, and what is refused at once
    monkeypatch.setattr(crossvit.weights.hub, "SLOW", 0.05)
    monkeypatch.setattr(crossvit.weights.hub, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
        with pytest.raises(WeightsError, match=r"cannot be reached \(timed out\)"):
            locate("acme/other")
    assert capsys.readouterr().err == f"waiting for {address}, 0 seconds at most\n"


def test_a_trusted_digest_comes_before_everything(hub: Hub, released: bytes) -> None:
    pinned = next(name for name, preset in PRESETS.items() if preset.sha256)
    hub.put(PRESETS[pinned].hub, "model.safetensors", released)
    with pytest.raises(WeightsError, match=rf"{PRESETS[pinned].sha256} is trusted"):
        locate(pinned)
    hub.put("acme/hands", "model.safetensors", released)
    with pytest.raises(WeightsError, match=rf"{'0' * 64} is trusted"):
        locate(f"acme/hands#sha256={'0' * 64}")
    assert (
        locate(f"acme/hands#sha256={hashlib.sha256(released).hexdigest()}").read_bytes() == released
    )


def test_only_released_models_have_a_trusted_digest_and_it_is_one() -> None:
    for preset in PRESETS.values():
        assert preset.sha256 is None or (
            preset.released and len(bytes.fromhex(preset.sha256)) == 32
        )


@pytest.mark.parametrize("how", ["told so", "no answer"])
def test_offline_says_what_to_put_where_and_takes_it_from_there(
    how: str,
    hub: Hub,
    released: bytes,
    model: crossvit.CrossViT,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if how == "told so":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setenv(
            "HF_ENDPOINT", "http://127.0.0.1:9"
        )  # the port of `discard`, where nobody listens
    place = tmp_path / "cache" / "hub" / f"timm--{NAME}.in1k@main" / "model.safetensors"
    url = rf"/{REPOSITORY}/resolve/main/model\.safetensors"
    with pytest.raises(WeightsError, match=rf"{url} cannot be reached .* put it at {place}"):
        locate(REPOSITORY)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(released)
    assert same_weights(crossvit.create_model(NAME, weights=REPOSITORY), model)
    assert not hub.asked


def test_what_is_no_weight_file_is_not_taken_for_the_first_use(hub: Hub, released: bytes) -> None:
    hub.put("acme/hands", "model.safetensors", b"<html>Log in</html>")
    with pytest.raises(
        WeightsError, match=r"acme/hands@main cannot be read as weights \(a web page\)"
    ):
        locate("acme/hands")
    hub.put("acme/hands", "model.safetensors", released)
    assert locate("acme/hands").read_bytes() == released


def test_the_hubs_own_cache_is_read(hub: Hub, released: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "shared" / f"models--timm--{NAME}.in1k"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(released)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert locate(REPOSITORY) == snapshot / "model.safetensors"
    assert not hub.asked


@pytest.mark.parametrize("source", ["acme/nothing", "runs/mistyped"])
def test_a_name_that_is_nowhere_is_a_wrong_call(source: str, hub: Hub) -> None:
    with pytest.raises(
        UsageError,
        match=rf"no file or folder {source} here, and .*{source}/resolve/main/.* is not there",
    ):
        locate(source)


@pytest.mark.parametrize(
    "source", ["photo.pth", "runs/new/model.safetensors", "a/b/c", "two words/here"]
)
def test_what_cannot_be_a_name_on_the_hub_asks_nobody(source: str, hub: Hub) -> None:
    with pytest.raises(UsageError, match="no weights at .*: give a run folder"):
        locate(source)
    assert not hub.asked


def test_an_address_is_fetched_checked_and_gone_on_with(
    hub: Hub, model: crossvit.CrossViT, tmp_path: Path
) -> None:
    state = model.state_dict()
    names = renamed(state, "authors")
    torch.save({names[name]: tensor for name, tensor in state.items()}, tmp_path / "authors.pth")
    hub.files["/weights/crossvit.pth"] = (tmp_path / "authors.pth").read_bytes()
    source = f"{hub.address}/weights/crossvit.pth"
    hub.cut = [1 << 20] + [0] * 6
    with pytest.raises(WeightsError, match=r"stopped after 1\.0 of 35"):
        locate(source)
    hub.cut.clear()
    hub.asked.clear()
    assert same_weights(crossvit.create_model(NAME, weights=source), model)
    assert hub.fetched() == [("/weights/crossvit.pth", "bytes=1048576-")]
    with pytest.raises(WeightsError, match="is trusted"):
        locate(f"{source}#sha256={'0' * 64}")
    with pytest.raises(UsageError, match=r"there is nothing at .*/gone\.pth"):
        locate(f"{hub.address}/gone.pth")


def test_a_server_that_answers_get_alone_is_asked_by_get(hub: Hub, released: bytes) -> None:
    hub.files["/signed"] = released
    hub.refuses_head = True
    assert locate(f"{hub.address}/signed").read_bytes() == released


def test_an_address_that_is_not_encrypted_needs_a_digest(hub: Hub) -> None:
    with pytest.raises(UsageError, match="is not encrypted: use https://, or add #sha256="):
        locate("http://example.com/weights.pth")


def test_the_authors_names_mean_the_authors_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        WeightsError,
        match=r"https://github\.com/IBM/CrossViT/releases/.*/crossvit_18_dagger_384\.pth cannot be",
    ):
        locate("crossvit_18_dagger_384")


def test_the_command_shows_and_trains_from_a_name_on_the_hub(
    hub: Hub, released: bytes, command: Command, scans: Path, tmp_path: Path
) -> None:
    hub.put("acme/hands", "model.safetensors", released)
    status, out, _ = command("weights", "show", "acme/hands", "--json")
    shown = json.loads(out)
    assert (status, shown["model"], shown["layout"], shown["num_classes"]) == (
        0,
        NAME,
        "timm",
        1000,
    )
    options = [
        "--image-size",
        48,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    status, out, err = command(
        "train", scans, "--out", tmp_path / "run", "--weights", "acme/hands", *options
    )
    assert status == 0, err
    assert f"{NAME}, as in acme/hands" in " ".join(err.split()) or NAME in err
    assert "positions of branch 0 resampled from 20x20 to 4x4 patches" in err
    assert "new classifier: 3 classes in place of 1000" in err
    status, _, err = command(
        "train", scans, "--out", tmp_path / "other", "--weights", "acme/nothing"
    )
    assert status == 2
    assert err.count("\n") == 1
