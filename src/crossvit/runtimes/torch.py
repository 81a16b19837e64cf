"""The torch engine, and how `--device` and `--precision` become what is there."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from numpy.typing import NDArray

from crossvit.errors import UsageError
from crossvit.model.crossvit import CrossViT
from crossvit.trained import Trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """`engine(images)`: (B, C, H, W) float32 normalised -> (branches, B, classes) float32 logits, without gradients."""

    def __init__(self, model: CrossViT, *, device: torch.device, precision: str = "fp32") -> None:
        self.model = model
        self.device = device
        self.precision = precision

    @classmethod
    def load(cls, trained: Trained, *, device: str = "auto", precision: str = "auto") -> TorchEngine:
        """The engine of a trained model. `precision` auto is fp32, so that results do not depend on the processor."""
        place = resolve_device(device)
        chosen = "fp32" if precision == "auto" else resolve_precision(precision, place)
        return cls(trained.build().to(place), device=place, precision=chosen)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        training = self.model.training
        self.model.eval()
        with torch.inference_mode(), autocast(self.device, self.precision):
            logits = self.model.branch_logits(torch.from_numpy(images).to(self.device))
        self.model.train(training)
        return logits.float().cpu().numpy()


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's GPU, else the CPU. UsageError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    if name not in there or not there[name]:
        raise UsageError(f"device {name!r} is not available here: use {', '.join(device for device in there if there[device])}")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes in it (on a CPU: AVX-512 BF16 or AMX), else fp32."""
    if name not in ("auto", *DTYPES):
        raise UsageError(f"precision {name!r}: use auto, {', '.join(DTYPES)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context in which `precision` is computed."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
