"""What is timed: our model and timm's, each through every engine that is installed.

A contestant is a name `who-how`, such as `timm-openvino`, and the precisions it computes in. `prepare` makes it a call:
images (B, C, H, W) -> logits (B, classes). EngineError where it is not installed or does not come up.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossvit.engines.torch import autocast
from crossvit.errors import EngineError, UsageError
from crossvit.fast.inference import optimize
from crossvit.hardware import version_of
from crossvit.model.crossvit import CrossViT

Call = Callable[[Tensor], Tensor]

CONTESTANTS: dict[str, tuple[str, ...]] = {
    "timm-eager": ("fp32", "bf16"),  # the first: what the others are measured against
    "timm-compiled": ("fp32", "bf16"),
    "timm-onnxruntime": ("fp32",),
    "timm-openvino": ("fp32", "bf16"),  # given a batch whole
    "timm-openvino-parts": ("fp32", "bf16"),  # as our engine gives it
    "timm-zentorch": ("fp32", "bf16"),
    "ours-eager": ("fp32", "bf16"),
    "ours-torch": ("fp32", "bf16"),
    "ours-onnxruntime": ("fp32",),
    "ours-openvino": ("fp32", "bf16"),
}
REFERENCE = "timm-eager"
# Of one model's code: every batch, precision and backend is one. Beyond 8, torch would compute what follows as eager does.
COMPILED_FORMS = 256
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "zentorch": "zentorch"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two models with the same weights, in evaluation mode, and a folder for their exported files."""

    timm: nn.Module
    ours: CrossViT
    device: torch.device
    folder: Path


def make_pair(name: str, *, image_size: int | None, device: torch.device, folder: Path) -> Pair:
    """timm's model `name` and ours with its weights, random and spread so that logits differ from image to image and that no
    bias is zero and no LayerNorm without effect, which compilers would leave out as they cannot in a trained model.

    UsageError for a size at which the two differ: timm cuts a branch's size off where ours rounds it.
    """
    import timm

    from crossvit.factory import create_model
    from crossvit.weights.keys import to_ours

    torch.manual_seed(0)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    theirs = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    ours = create_model(name, image_size=image_size).eval()
    if [
        branch.image_size(ours.config.image_size) for branch in ours.config.branches
    ] != theirs.img_size_scaled:
        raise UsageError(
            f"image size {image_size}: timm's model sees it otherwise; take 120, 240, 360 or 480"
        )
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.state_dict()))
    return Pair(theirs.to(device), ours.to(device), device, folder)


def prepare(contestant: str, precision: str, pair: Pair) -> Call:
    """The call of `contestant`. EngineError where it is missing or fails."""
    who, how, *parts = contestant.split("-")
    if how in NEEDS and version_of(NEEDS[how]) is None:
        raise EngineError(f"{NEEDS[how]} is not installed")
    model: Any = pair.timm if who == "timm" else pair.ours
    if how == "torch":
        return optimize(pair.ours, precision=precision)
    if how == "eager":
        return _eager(model, precision, pair.device)
    if how in ("compiled", "zentorch"):
        return _compiled(model, precision, pair.device, zentorch=how == "zentorch")
    if pair.device.type != "cpu":
        raise EngineError(f"{how} computes on the CPU here")
    return _exported(model, how, precision, pair, in_parts=who == "ours" or bool(parts))


def _eager(model: nn.Module, precision: str, device: torch.device) -> Call:
    def call(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device, precision):
            return model(images)  # type: ignore[no-any-return]

    return call


def _compiled(model: nn.Module, precision: str, device: torch.device, *, zentorch: bool) -> Call:
    """torch.compile with weights frozen into the program, which is its faster form on a CPU; with CUDA graphs on a GPU."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    if zentorch:
        try:
            import zentorch as _  # noqa: F401  # registers its backend
        except Exception as error:
            raise EngineError(f"zentorch does not import ({type(error).__name__})") from error
    options: dict[str, Any] = {"backend": "zentorch"} if zentorch else {}
    if device.type == "cuda":
        options = {"mode": "reduce-overhead"}
    compiled = torch.compile(copy.deepcopy(model), dynamic=False, **options)

    def call(images: Tensor) -> Tensor:
        limits = dynamo.patch(recompile_limit=COMPILED_FORMS, fail_on_recompile_limit_hit=True)
        with (
            warnings.catch_warnings(),
            limits,
            inductor.patch(freezing=device.type == "cpu"),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            with autocast(device, precision):
                return compiled(images)  # type: ignore[no-any-return]

    return call


def _exported(model: nn.Module, how: str, precision: str, pair: Pair, *, in_parts: bool) -> Call:
    """in_parts: whether OpenVINO is given a large batch as our engine gives it."""
    from crossvit.engines.onnx_graph import export_module
    from crossvit.engines.onnxruntime import OnnxRuntimeEngine
    from crossvit.engines.openvino import OpenVINOEngine, try_compiling
    from crossvit.fast.export_form import GraphForm

    ours = isinstance(model, CrossViT)
    path = pair.folder / f"{'ours' if ours else 'timm'}.onnx"
    if not path.is_file():
        config = pair.ours.config
        exported = GraphForm(model) if isinstance(model, CrossViT) else model
        with contextlib.redirect_stdout(sys.stderr):
            export_module(
                exported, path, in_channels=config.in_channels, image_size=config.image_size
            )
    if how == "openvino":
        try_compiling(path, precision)
    engine = (
        OpenVINOEngine(path, precision=precision, in_parts=in_parts)
        if how == "openvino"
        else OnnxRuntimeEngine(path)
    )
    if ours:  # each branch's logits are given
        return lambda images: torch.from_numpy(engine(images.numpy()).logits)
    return lambda images: torch.from_numpy(engine.compute(images.numpy()))
