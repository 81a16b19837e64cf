"""What is exported is the model: every fusion, tokeniser and head of the paper, in torch and through both engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crossvit import CrossViTConfig
from crossvit.engines.select import installed_engines
from crossvit.factory import model_config
from crossvit.fast.export_form import GraphForm
from crossvit.model.crossvit import CrossViT
from support.models import SMALL

NO_CLASS_TOKEN = tuple(dataclasses.replace(branch, class_token=False) for branch in SMALL.branches)
T2T = tuple(dataclasses.replace(branch, tokeniser="t2t", patch=16) for branch in SMALL.branches)
CONFIGS = {
    "cross-attention": SMALL,
    "as released": dataclasses.replace(SMALL, fusion_depth=2, as_released=True),
    "materialised": dataclasses.replace(SMALL, keys_values="materialised"),
    "all-attention": dataclasses.replace(SMALL, fusion="all-attention"),
    "pairwise": dataclasses.replace(SMALL, fusion="pairwise"),
    "class-token": dataclasses.replace(SMALL, fusion="class-token"),
    "no fusion": dataclasses.replace(SMALL, fusion="none"),
    "single": dataclasses.replace(SMALL, branches=SMALL.branches[1:], fusion="none"),
    "no class token": dataclasses.replace(SMALL, branches=NO_CLASS_TOKEN),
    "T2T": dataclasses.replace(SMALL, branches=T2T, image_size=(64, 64)),
    "three branches": dataclasses.replace(SMALL, branches=(*SMALL.branches, dataclasses.replace(SMALL.branches[1], patch=8))),
    "any size": dataclasses.replace(SMALL, dynamic_size=True),
    "convolutions": dataclasses.replace(model_config("crossvit_9_dagger_240"), image_size=(96, 96), num_classes=5, stages=1),
    "plain": dataclasses.replace(model_config("crossvit_tiny_240"), image_size=(96, 96), num_classes=5, stages=1),
    "small images": model_config("crossvit_nano_64"),
    "not square": dataclasses.replace(SMALL, image_size=(48, 32)),
}  # fmt: skip


def lively(config: CrossViTConfig) -> CrossViT:
    """A model whose LayerNorms and biases are not those it starts with, and whose logits differ from image to image."""
    torch.manual_seed(0)
    model = CrossViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def given(config: CrossViTConfig, count: int) -> tuple[Tensor, CrossViT, Tensor]:
    """Images, a model, and its branches' logits."""
    model = lively(config)
    images = torch.randn(count, config.in_channels, *config.image_size)
    with torch.no_grad():
        return images, model, model.branch_logits(images)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_form_is_the_model_to_1e_5(name: str) -> None:
    images, model, exact = given(CONFIGS[name], 3)
    found = GraphForm(model)(images)
    assert found.shape == exact.shape
    assert relative(found, exact) < 1e-5
    assert (
        relative(exact[:, 1:], exact[:, :-1]) > 1e-2
    )  # the images are told apart, so that the line above can fail


def test_the_form_is_a_copy() -> None:
    images, model, exact = given(SMALL, 2)
    form = GraphForm(model)
    with torch.no_grad():
        assert torch.equal(model.branch_logits(images), exact)
        before = form(images)
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert torch.equal(form(images), before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's graph: cross-attention, a resize, a stem of convolutions and one of patches."""
    onnx = pytest.importorskip("crossvit.engines.onnx_graph")
    pytest.importorskip("onnxscript")
    path: Path = tmp_path_factory.mktemp("graph") / "small.onnx"
    onnx.export_module(
        GraphForm(lively(SMALL)), path, in_channels=SMALL.in_channels, image_size=SMALL.image_size
    )
    return path


def test_the_graph_has_no_operation_that_the_engines_are_slow_in(exported: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported).graph
    operations = [node.op_type for node in graph.node]
    blocks = SMALL.stages * sum(branch.depth for branch in SMALL.branches)
    assert "Resize" not in operations
    assert not {node.domain for node in graph.node} - {"", "ai.onnx"}  # any runtime can read it
    assert operations.count("Gelu") >= blocks  # one operation, not an erf among five
    # Nothing but ones and zeros is left of a block's LayerNorms.
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    bare = [
        node
        for node in graph.node
        if node.op_type == "LayerNormalization" and np.all(weights[node.input[1]] == 1)
    ]
    assert len(bare) == 2 * blocks


@pytest.mark.skipif("onnxruntime" not in installed_engines(), reason="onnxruntime is not installed")
@pytest.mark.parametrize("count", [1, 5])
def test_onnx_runtime_gives_the_models_logits_for_any_batch(exported: Path, count: int) -> None:
    from crossvit.engines.onnxruntime import OnnxRuntimeEngine

    images, _, exact = given(SMALL, count)
    assert (
        relative(torch.from_numpy(OnnxRuntimeEngine(exported).compute(images.numpy())), exact)
        < 1e-5
    )


@pytest.mark.skipif("openvino" not in installed_engines(), reason="openvino is not installed")
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_openvino_gives_the_models_logits_whole_and_in_parts(
    exported: Path, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossvit.engines import openvino

    monkeypatch.setattr(openvino, "physical_cores", lambda: streams)
    monkeypatch.setattr(openvino, "PART_IMAGES", 2)
    engine = openvino.OpenVINOEngine(exported)
    for count in (
        1,
        2,
        2 * streams,
        4 * streams + 3,
    ):  # less than a round of parts, one round, two and a rest
        images, _, exact = given(SMALL, count)
        found = engine(images.numpy()).branch_logits
        assert found.shape == exact.shape
        assert relative(torch.from_numpy(found), exact) < 1e-5
    assert ("part_requests" in vars(engine)) == (
        streams > 1
    )  # compiled because it was needed, and only then
    images, _, exact = given(SMALL, 4)
    whole = openvino.OpenVINOEngine(exported, in_parts=False)
    assert relative(torch.from_numpy(whole.compute(images.numpy())), exact) < 1e-5
    assert "part_requests" not in vars(whole)
