"""What a first prediction leaves out, and that leaving it out changes nothing: modules, digests, optimising, drawing."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import crossvit
import crossvit.results
from crossvit import cache
from crossvit.cache import digest_of
from crossvit.cli.gc_control import uncollected
from crossvit.errors import EngineError
from crossvit.hardware import is_installed
from crossvit.results import TrainingResult
from crossvit.trained import Trained, open_trained
from crossvit.weights.files import header, write_weights
from crossvit.weights.load import load_weights
from support.models import SMALL


@pytest.fixture(scope="module")
def trained(tiny_run: TrainingResult) -> Trained:
    return open_trained(tiny_run.run)


@pytest.fixture(scope="module")
def filled_cache(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the model as an ONNX file and nothing else."""
    pytest.importorskip("onnxruntime")
    from crossvit.engines.onnx_graph import onnx_file

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSVIT_CACHE", str(folder))
        onnx_file(trained)
    return folder


# ---------------------------------------------------------------- modules


def loaded_by(*words: str, cache: Path) -> set[str]:
    """The modules that `crossvit WORDS` has imported when it is done."""
    script = "import sys; from crossvit.cli import run; status = run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "CROSSVIT_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.count("\n") == 1, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_a_prediction_imports_what_it_needs(
    tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    picture = next(scans.rglob("*.png"))
    loaded = loaded_by("predict", str(tiny_run.run), str(picture), cache=tmp_path)
    assert "torch" in loaded
    assert not {"sympy", "torchvision", "timm", "torch._dynamo", "matplotlib", "sklearn"} & loaded


def test_a_prediction_by_onnx_runtime_imports_no_torch(
    tiny_run: TrainingResult, scans: Path, filled_cache: Path
) -> None:
    words = (
        "predict",
        str(tiny_run.run),
        str(next(scans.rglob("*.png"))),
        "--engine",
        "onnxruntime",
    )
    loaded = loaded_by(*words, cache=filled_cache)
    assert "onnxruntime" in loaded
    assert (
        not {
            "torch",
            "rich",
            "email",
            "fsspec",
            "csv",
            "crossvit.results.evaluation",
            "crossvit.model.presets",
        }
        & loaded
    )


def test_every_record_comes_from_its_home() -> None:
    assert sorted(crossvit.results.__all__) == sorted(crossvit.results._HOMES)
    for name in crossvit.results.__all__:
        found = getattr(crossvit.results, name)
        assert (
            getattr(found, "__module__", crossvit.results._HOMES[name])
            == crossvit.results._HOMES[name]
        )
    with pytest.raises(
        AttributeError, match=r"module 'crossvit.results' has no attribute 'nothing'"
    ):
        crossvit.results.nothing  # noqa: B018


def test_a_folder_called_like_a_package_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_engine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_installed("numpy")
    assert not is_installed("no_such_engine")
    assert not is_installed("no_such_engine_either")


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_inside_and_is_as_it_was_behind(before: bool) -> None:
    enabled = gc.isenabled()
    try:
        gc.enable() if before else gc.disable()
        with contextlib.suppress(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        gc.enable() if enabled else gc.disable()


def test_what_is_there_is_left_out_once_in_a_process() -> None:
    script = """
import gc
from crossvit.cli.gc_control import leave_out_what_is_there
leave_out_what_is_there()
first = gc.get_freeze_count()
garbage = []
garbage.append(garbage)
del garbage
leave_out_what_is_there()
assert 0 < gc.get_freeze_count() <= first
assert gc.collect() > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------- digests


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of ten bytes whose times count as settled, and an empty cache."""
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_nothing(*_: object) -> None:
    raise AssertionError("the file was read again")


def test_an_unchanged_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest_of(file) == sha256(b"0123456789")
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", read_nothing)
        assert digest_of(file) == sha256(b"0123456789")


def test_a_changed_file_is_read_again_though_its_size_and_time_are_the_same(file: Path) -> None:
    before = file.stat()
    digest_of(file)
    file.write_bytes(b"9876543210")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of(file) == sha256(b"9876543210")
    other = file.with_name("other")
    other.write_bytes(b"abcdefghij")
    other.replace(file)
    assert digest_of(file) == sha256(b"abcdefghij")


def test_a_file_written_just_now_is_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED", 60.0)
    digest_of(file)
    assert not (cache.cache_folder() / "digests.json").exists()


def test_files_that_are_gone_are_forgotten(file: Path) -> None:
    digest_of(file)
    other = file.with_name("other")
    other.write_bytes(b"")
    file.unlink()
    digest_of(other)
    assert list(json.loads((cache.cache_folder() / "digests.json").read_text())) == [str(other)]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": [1, 2, 3]}', "null", "\x00"])
def test_a_damaged_record_of_digests_is_written_anew(content: str, file: Path) -> None:
    record = cache.cache_folder() / "digests.json"
    record.parent.mkdir()
    record.write_text(content)
    assert digest_of(file) == sha256(b"0123456789")
    assert list(json.loads(record.read_text())) == [str(file)]


def test_a_cache_that_cannot_be_written_changes_no_digest(file: Path) -> None:
    cache.cache_folder().write_text("a file in its place")
    assert digest_of(file) == sha256(b"0123456789")


# ---------------------------------------------------------------- ONNX Runtime's graph


@pytest.fixture
def model(filled_cache: Path, tmp_path: Path) -> Path:
    """A copy of the exported file, with nothing beside it."""
    (exported,) = (filled_cache / "onnx").glob("*.onnx")
    return Path(shutil.copy(exported, tmp_path))


def logits(path: Path, *, cache_optimised: bool) -> NDArray[np.float32]:
    from crossvit.engines.onnxruntime import OnnxRuntimeEngine

    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    return OnnxRuntimeEngine(path, cache_optimised=cache_optimised).compute(images)


def kept_beside(path: Path) -> list[Path]:
    return [found for found in path.parent.iterdir() if found != path]


def test_the_kept_graph_gives_the_same_bits_and_is_used(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = logits(model, cache_optimised=False)
    assert kept_beside(model) == []
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    (folder,) = kept_beside(model)
    assert sorted(file.name for file in folder.iterdir()) == ["graph.onnx", "graph.weights"]
    model.write_bytes(b"no longer needed")
    assert np.array_equal(logits(model, cache_optimised=True), exact)


@pytest.mark.parametrize("changed", ["version", "processor"])
def test_a_graph_of_another_version_or_processor_is_not_used(
    changed: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    exact = logits(model, cache_optimised=True)
    (first,) = kept_beside(model)
    (first / "graph.onnx").write_bytes(b"what would be wrong here")
    if changed == "version":
        monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    else:
        monkeypatch.setattr("crossvit.engines.onnxruntime.instruction_sets", lambda: "sse2")
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    assert len(kept_beside(model)) == 2
    assert (first / "graph.onnx").read_bytes() == b"what would be wrong here"


@pytest.mark.parametrize("file", ["graph.onnx", "graph.weights"])
@pytest.mark.parametrize("left", [0.0, 0.5, None])
def test_a_torn_graph_is_made_anew(file: str, left: float | None, model: Path) -> None:
    exact = logits(model, cache_optimised=True)
    (folder,) = kept_beside(model)
    torn = folder / file
    if left is None:
        torn.unlink()
    else:
        os.truncate(torn, int(left * torn.stat().st_size))
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    assert kept_beside(model) == []
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    assert kept_beside(model) == [folder]


def test_two_processes_that_keep_a_graph_at_once_leave_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossvit.engines import onnxruntime as onnx

    exact = logits(model, cache_optimised=False)
    sync, calls = os.fsync, []

    def overtaken(file: int) -> None:
        """While the first process writes, another one makes the folder."""
        sync(file)
        calls.append(file)
        if len(calls) == 1:
            assert np.array_equal(logits(model, cache_optimised=True), exact)

    monkeypatch.setattr(onnx.os, "fsync", overtaken)
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    (folder,) = kept_beside(model)
    assert sorted(file.name for file in folder.iterdir()) == ["graph.onnx", "graph.weights"]
    assert len(calls) == 4


def test_where_no_graph_can_be_kept_the_model_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = logits(model, cache_optimised=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert np.array_equal(logits(model, cache_optimised=True), exact)
    assert kept_beside(model) == []


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load the model"):
        logits(path, cache_optimised=True)
    assert kept_beside(path) == []


# ---------------------------------------------------------------- weights into a model without numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_meta_takes_the_weights_that_another_would(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    source = {
        name: value.to(dtype) for name, value in crossvit.CrossViT(SMALL).state_dict().items()
    }
    write_weights(path, source, header(model=None, config=SMALL, classes=None, preprocessing=None))
    drawn = crossvit.CrossViT(SMALL)
    with torch.device("meta"):
        blank = crossvit.CrossViT(SMALL)
    assert load_weights(blank, path) == load_weights(drawn, path)
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place: the model must not lie in the file
    for (name, found), (_, expected) in zip(
        blank.named_parameters(), drawn.named_parameters(), strict=True
    ):
        assert found.dtype == torch.float32, name
        assert found.device.type == "cpu", name
        assert found.requires_grad, name
        assert torch.equal(found, expected), name
