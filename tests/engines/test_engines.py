"""Twins: every engine and precision against torch in fp32 on real scans, and what happens where one is missing or fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

import crossvit
from crossvit.data.sources import open_data
from crossvit.engines import select as choose
from crossvit.engines.protocol import EngineOutput
from crossvit.engines.select import installed_engines, load_engine
from crossvit.engines.torch import TorchEngine
from crossvit.errors import EngineError, UsageError
from crossvit.fast.native.build import native, without_kernels
from crossvit.fast.packed_linear import PackedLinear, Resize, attention_of, scaled_qkv
from crossvit.results import TrainingResult
from crossvit.trained import Trained, open_trained
from support.models import SMALL, lively


@pytest.fixture(scope="module")
def trained(tiny_run: TrainingResult) -> Trained:
    return open_trained(tiny_run.run)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for this file, so that the model is exported and compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSVIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pictures(trained: Trained, scans: Path) -> NDArray[np.float32]:
    images = open_data(str(scans)).part("all")
    return np.stack(
        [trained.preprocessing(images.read(index)) for index in range(0, len(images), 5)]
    )


@pytest.fixture(scope="module")
def exact(trained: Trained, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model as it is, in torch, fp32: (branches, n, classes)."""
    return TorchEngine(trained.build(), device=torch.device("cpu"))(pictures).branch_logits


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we logged; torch's exporter logs for itself."""
    return [record.getMessage() for record in caplog.records if record.name == "crossvit"]


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_gives_the_logits_of_torch_in_fp32(
    engine: str,
    precision: str,
    trained: Trained,
    pictures: NDArray[np.float32],
    exact: NDArray[np.float32],
) -> None:
    if engine not in installed_engines() or precision not in choose.PRECISIONS[engine]:
        pytest.skip(f"{engine} in {precision} is not here")
    try:
        forward = load_engine(trained, engine=engine, precision=precision, device="cpu")
    except UsageError as error:
        assert precision != "fp32"
        pytest.skip(str(error))
    output = forward(pictures)
    found = output.branch_logits
    assert np.array_equal(output.logits, found.mean(axis=0))
    assert found.dtype == np.float32
    assert found.shape == exact.shape
    assert relative(found, exact) < choose.TOLERANCE[precision]
    assert (found.mean(0).argmax(-1) == exact.mean(0).argmax(-1)).mean() >= (
        1.0 if precision == "fp32" else 0.9
    )
    assert (
        np.abs(forward(pictures[:1]).branch_logits - found[:, :1]).max()
        < choose.TOLERANCE[precision]
    )  # another batch size


CONFIGS = {
    "cross-attention": SMALL,
    "as released": dataclasses.replace(SMALL, fusion_depth=2, as_released=True),
    "all-attention": dataclasses.replace(SMALL, fusion="all-attention"),
    "pairwise": dataclasses.replace(SMALL, fusion="pairwise"),
    "class-token": dataclasses.replace(SMALL, fusion="class-token"),
    "single": dataclasses.replace(SMALL, branches=SMALL.branches[1:], fusion="none"),
    "no class token": dataclasses.replace(
        SMALL,
        branches=tuple(dataclasses.replace(branch, class_token=False) for branch in SMALL.branches),
    ),
    "no small blocks": dataclasses.replace(
        SMALL, branches=(dataclasses.replace(SMALL.branches[0], depth=0), SMALL.branches[1])
    ),
    "any size": dataclasses.replace(SMALL, dynamic_size=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_inference_form_is_the_model_to_1e_5(name: str) -> None:
    model = lively(CONFIGS[name])
    form = crossvit.optimize(model)
    images = torch.randn(5, 3, *model.config.image_size)
    with torch.no_grad():
        exact = model.branch_logits(images)
    torch.testing.assert_close(
        form.branch_logits(images), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max())
    )
    torch.testing.assert_close(
        form(images), exact.mean(0), rtol=1e-5, atol=1e-5 * float(exact.abs().max())
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_inference_form_in_bf16_is_as_near_with_kernels_as_without(name: str) -> None:
    """Every fusion; the larger of both errors is some steps of bf16."""
    torch.manual_seed(0)
    model = lively(CONFIGS[name])
    images = torch.randn(5, 3, *model.config.image_size)
    with torch.no_grad():
        exact = model.branch_logits(images)
    ours = crossvit.optimize(model, precision="bf16").branch_logits(images)
    with without_kernels():
        torchs = crossvit.optimize(model, precision="bf16").branch_logits(images)
    errors = [float((found - exact).norm() / exact.norm()) for found in (ours, torchs)]
    assert errors[0] < 1.5 * errors[1] + 2e-3


def test_a_released_model_in_its_inference_form_is_the_model_to_1e_5() -> None:
    model = lively(
        dataclasses.replace(
            crossvit.create_model("crossvit_9_dagger_240", num_classes=10).config, stages=1
        )
    )
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        exact = model(images)
    assert float((crossvit.optimize(model)(images) - exact).abs().max() / exact.abs().max()) < 1e-5


def test_batches_are_cut_without_a_trace() -> None:
    model = lively(SMALL)
    form = crossvit.optimize(model)
    images = torch.randn(7, 3, *SMALL.image_size)
    whole = form(images)
    form.images_a_pass = 2
    torch.testing.assert_close(form(images), whole, rtol=1e-5, atol=1e-6)


def test_the_inference_form_keeps_its_weights_when_the_model_trains_on() -> None:
    model = lively(SMALL)
    form = crossvit.optimize(model)
    images = torch.randn(2, 3, *SMALL.image_size)
    before = form(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(form(images), before)


def test_a_form_that_is_not_to_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match="precision 'int3': optimize takes fp32"):
        crossvit.optimize(lively(SMALL), precision="int3")
    with pytest.raises(ValueError, match="this model takes"):
        crossvit.optimize(lively(SMALL))(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "sizes",
    [((240, 240), (224, 224)), ((36, 50), (24, 70)), ((7, 300), (100, 9)), ((5, 5), (1, 1))],
)
def test_the_resize_is_torchs_bicubic(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    given, size = sizes
    images = torch.randn(2, 3, *given)
    exact = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(Resize(given, size)(images), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_linear_layers(dtype: torch.dtype) -> None:
    x, weight, bias, residual = (
        torch.randn(shape).to(dtype) for shape in ((3, 7, 24), (40, 24), (40,), (3, 7, 40))
    )
    packed = PackedLinear(weight, bias, rows=21)
    exact = F.linear(x.double(), weight.double(), bias.double())
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(packed(x).double(), exact, **near)
    torch.testing.assert_close(packed.gelu(x).double(), F.gelu(exact), **near)
    torch.testing.assert_close(packed.add(x, residual).double(), exact + residual.double(), **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(37, 3, 24), (197, 4, 64), (401, 2, 32), (1, 2, 8)]
)
def test_attention_in_the_form_is_attention(
    dtype: torch.dtype, tokens: int, heads: int, width: int
) -> None:
    x, weight, bias = (
        torch.randn(2, tokens, heads * width),
        torch.randn(3 * heads * width, heads * width) / 8,
        torch.randn(3 * heads * width),
    )
    query, key, value = (
        F.linear(x.double(), weight.double(), bias.double())
        .unflatten(-1, (3, heads, width))
        .permute(2, 0, 3, 1, 4)
    )
    exact = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    qkv = F.linear(x, *scaled_qkv(weight, bias, heads)).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for kernels in (None, native()):
        found = attention_of(qkv, heads, kernels)
        assert float((found.double() - exact).abs().max() / exact.abs().max()) < bound


# ---------------------------------------------------------------- choosing


def test_an_engine_that_is_not_installed_is_one_line_and_torch_computes(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "is_installed", lambda package: package != "openvino")
    forward = load_engine(trained, engine="openvino", device="cpu")
    assert isinstance(forward.engine, TorchEngine)
    assert [record.getMessage() for record in caplog.records] == [
        "engine openvino is not installed (pip install 'crossvit[openvino]'); torch computes instead"
    ]


HEARS_A_SIGNAL = """
import gc, os, signal
from crossvit.engines import openvino
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
cores = [openvino._core(), openvino._core()]
for core in cores:
    core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
del core
while cores:
    del cores[0]
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_heard_after_openvino_was_used_twice() -> None:
    """It ended the process, as at Ctrl-C: OpenVINO put back a signal stack whose memory was gone."""
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", HEARS_A_SIGNAL], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_a_compile_that_ends_the_process_is_one_line_and_torch_computes(
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    pytest.importorskip("openvino")
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crash))
    monkeypatch.setattr("crossvit.engines.openvino.version_of", lambda package: "another")
    forward = load_engine(trained, engine="openvino", device="cpu")
    assert isinstance(forward.engine, TorchEngine)
    assert said(caplog) == [
        "OpenVINO cannot compile the model here (signal 11); torch computes instead"
    ]


def test_what_is_not_an_engine_or_its_precision_is_refused(trained: Trained) -> None:
    with pytest.raises(UsageError, match="engine 'tvm': use auto, torch, onnxruntime, openvino"):
        load_engine(trained, engine="tvm")
    with pytest.raises(UsageError, match="engine onnxruntime computes in fp32, not 'bf16'"):
        load_engine(trained, engine="onnxruntime", precision="bf16")
    if "onnxruntime" in installed_engines():
        with pytest.raises(UsageError, match="computes on the CPU here, not on 'mps'"):
            load_engine(trained, engine="onnxruntime", device="mps")


class Fixed:
    """An engine that gives the same logits to everybody."""

    name = "fixed"

    def __init__(self, logits: NDArray[np.float32], precision: str = "fp32") -> None:
        self.logits, self.precision, self.calls = logits, precision, 0

    def __call__(self, images: NDArray[np.float32]) -> EngineOutput:
        self.calls += 1
        return EngineOutput.of_branches(self.logits)


def test_auto_leaves_out_what_differs_and_remembers_its_choice(
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "TRIAL_SECONDS", 0.05)
    monkeypatch.setattr(choose, "installed_engines", lambda: ["torch", "onnxruntime", "openvino"])
    logits = np.random.default_rng(0).standard_normal((2, choose.TRIAL_BATCH, 3), dtype=np.float32)
    loaded: list[str] = []
    engines = {
        "torch": Fixed(logits),
        "onnxruntime": Fixed(logits + 0.1),
        "openvino": Fixed(logits * (1 + 1e-6)),
    }

    def load(trained: Trained, engine: str, **options: str) -> Fixed:
        loaded.append(engine)
        return engines[engine]

    monkeypatch.setattr(choose, "_load", load)
    monkeypatch.setattr(
        choose,
        "race",
        lambda calls, seconds: {name: {"torch": 2.0, "openvino": 1.0}[name] for name in calls},
    )
    assert load_engine(trained, engine="auto").engine is engines["openvino"]
    assert [message.split(" by ")[0] for message in said(caplog)] == [
        "engine onnxruntime differs from torch"
    ]
    assert list(json.loads((tmp_path / "engines.json").read_text()).values()) == ["openvino"]
    loaded.clear()
    assert load_engine(trained, engine="auto").engine is engines["openvino"]
    assert loaded == ["torch", "openvino"]  # no trial


def test_auto_goes_on_without_what_fails_or_lacks_the_precision(
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    class Failing(Fixed):
        def __call__(self, images: NDArray[np.float32]) -> EngineOutput:
            raise ValueError("an operator is not there\nat some place")

    def load(trained: Trained, engine: str, **options: str) -> Fixed:
        if engine == "openvino":
            raise UsageError("this processor has no bf16 for OpenVINO: use --precision fp32")
        return engines[engine]

    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "TRIAL_SECONDS", 0.05)
    monkeypatch.setattr(choose, "installed_engines", lambda: ["torch", "onnxruntime", "openvino"])
    monkeypatch.setitem(choose.PRECISIONS, "onnxruntime", ("fp32", "bf16"))
    logits = np.ones((2, choose.TRIAL_BATCH, 3), dtype=np.float32)
    engines = {"torch": Fixed(logits, "bf16"), "onnxruntime": Failing(logits, "bf16")}
    monkeypatch.setattr(choose, "_load", load)
    assert load_engine(trained, engine="auto", precision="bf16").engine is engines["torch"]
    assert said(caplog) == [
        "this processor has no bf16 for OpenVINO: use --precision fp32; left out",
        "engine onnxruntime fails (an operator is not there); left out",
    ]
    assert list(json.loads((tmp_path / "engines.json").read_text()).values()) == ["torch"]


def test_what_auto_remembers_depends_on_model_precision_and_versions(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, stages=1))
    keys = [
        choose.trial_key(trained, "fp32", ["torch"]),
        choose.trial_key(other, "fp32", ["torch"]),
        choose.trial_key(trained, "bf16", ["torch"]),
    ]
    monkeypatch.setattr(choose, "version_of", lambda package: "99")
    keys.append(choose.trial_key(trained, "fp32", ["torch"]))
    assert len(set(keys)) == 4


def test_a_batch_that_memory_does_not_hold_is_halved_and_said_once(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    class OrtFailure(Exception):
        """As ONNX Runtime's: an Exception, no RuntimeError."""

    class Narrow:
        name = "torch"
        precision = "fp32"

        def __call__(self, images: NDArray[np.float32]) -> EngineOutput:
            sizes.append(len(images))
            if len(images) > 7:
                raise OrtFailure(
                    "Failed to allocate memory for requested buffer of size 9663676416"
                )
            if len(images) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
            return EngineOutput.of_branches(images.reshape(1, len(images), -1))

    forward = choose.BatchSplitting(Narrow())
    images = np.arange(14, dtype=np.float32).reshape(14, 1)
    output = forward(images)
    assert np.array_equal(output.branch_logits, images[None])
    assert np.array_equal(output.logits, images)
    assert sizes == [14, 7, 3, 3, 3, 3, 2]
    assert said(caplog)[-1] == "memory does not hold 7 images at once: going on with 3"

    class Broken(Narrow):
        def __call__(self, images: NDArray[np.float32]) -> EngineOutput:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        choose.BatchSplitting(Broken())(images)


def test_an_engine_is_compared_with_the_plain_models_logits_once(
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """With the witness beside the graph, at the first load on a machine; torch computes where they differ."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    assert load_engine(trained, engine="onnxruntime").name == "onnxruntime"
    (witness,) = (tmp_path / "onnx").glob("*.witness.npy")
    (agreed,) = (tmp_path / "onnx").glob("*.agrees")
    exact = np.load(witness)
    np.save(witness, exact + 0.01)
    assert load_engine(trained, engine="onnxruntime").name == "onnxruntime"  # compared already
    agreed.unlink()
    assert load_engine(trained, engine="onnxruntime").name == "torch"
    assert said(caplog)[-1].startswith(
        "engine onnxruntime in fp32 differs from the plain model by "
    )
    np.save(witness, exact)
    assert load_engine(trained, engine="onnxruntime").name == "onnxruntime"


def test_a_model_that_cannot_be_exported_is_an_engine_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("crossvit.engines.onnx_graph")
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(onnx, "is_installed", lambda package: False)
    with pytest.raises(EngineError, match="exporting to ONNX needs onnx and onnxscript"):
        onnx.onnx_file(trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda_the_form_is_the_model(compile: bool) -> None:
    model = lively(SMALL).cuda()
    form = crossvit.optimize(model, precision="bf16", compile=compile)
    images = torch.randn(5, 3, *SMALL.image_size, device="cuda")
    with torch.no_grad():
        exact = model.branch_logits(images)
    for count in (5, 2):
        found = form.branch_logits(images[:count])
        assert (
            float((found - exact[:, :count]).abs().max() / exact.abs().max())
            < choose.TOLERANCE["bf16"]
        )


def test_engines_say_what_they_do(
    caplog: pytest.LogCaptureFixture, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with caplog.at_level(logging.WARNING):
        TorchEngine.load(trained, device="cpu", precision="bf16")
    assert said(caplog) == [
        "this processor has no bf16: it is emulated, and slower than --precision fp32"
    ]
