"""The torch engine; `--device` and `--precision` resolved to what this machine has."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crossvit.engines.protocol import EngineOutput, Images, Logits
from crossvit.errors import UsageError
from crossvit.fast.cpu_form import CpuForm
from crossvit.fast.eligibility import is_changed_at_the_root
from crossvit.fast.inference import DTYPES, DeviceForm, optimize
from crossvit.hardware import physical_cores
from crossvit.model.crossvit import CrossViT
from crossvit.trained import Trained

GPU_PART = 64  # images copied to a GPU while the ones before are computed

log = logging.getLogger("crossvit")


class TorchEngine:
    """`engine(images)`: (B, C, H, W) float32, normalised -> `EngineOutput`, without gradients.

    The logits are the mean of the branches', or what a model makes of them that has been changed
    as a whole (a subclass, a hook), which is then called for them.
    """

    name = "torch"

    def __init__(
        self,
        model: CrossViT | CpuForm | DeviceForm,
        *,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            model: On `device`: a model as it trains, in `precision` by autocast,
                or its inference form, which is in its precision already.
            device: The model's device.
            precision: fp32, bf16 or fp16.
        """
        self.model = model
        self.device = device
        self.precision = precision
        self.on_gpu = device.type != "cpu"

    @classmethod
    def load(
        cls,
        trained: Trained,
        *,
        device: str = "auto",
        precision: str = "auto",
        model: CrossViT | None = None,
    ) -> TorchEngine:
        """The engine of a trained model.

        Args:
            trained: The trained model.
            device: auto, cpu, cuda or mps.
            precision: fp32, bf16 or fp16; auto is fp32, so that results do not depend on the
                processor.
            model: `trained.build()`, where that has been called; it is moved to the device.

        Raises:
            UsageError: For a device or precision that is not available.
        """
        place = resolve_device(device)
        chosen = "fp32" if precision == "auto" else resolve_precision(precision, place)
        if chosen == "bf16" and resolve_precision("auto", place) != "bf16":
            log.warning(
                "%s has no bf16: it is emulated, and slower than --precision fp32",
                "this processor" if place.type == "cpu" else place,
            )
        if place.type == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), physical_cores()))
        plain = trained.build() if model is None else model
        # Compiling takes a minute: `crossvit.optimize` does it for whoever computes for longer.
        return cls(
            optimize(plain.to(place), precision=chosen, compile=False),
            device=place,
            precision=chosen,
        )

    def __call__(self, images: Images) -> EngineOutput:
        branch_logits = self._compute(images, self.model.branch_logits)
        if not self._is_changed():
            return EngineOutput.of_branches(branch_logits)
        logits = self._compute(images, lambda part: self.model(part)[None])
        return EngineOutput(logits[0], branch_logits)

    def _is_changed(self) -> bool:
        """Whether the model's logits may be other than the mean of its branches'."""
        if isinstance(self.model, CpuForm):
            return False
        model = self.model if isinstance(self.model, CrossViT) else self.model.model
        return is_changed_at_the_root(model)

    def _compute(self, images: Images, function: Callable[[Tensor], Tensor]) -> Logits:
        """`function` of the images, whose output has them along its second axis."""
        if self.device.type == "cuda":
            return self._overlapped(images, function)
        with self._inference():
            logits = function(torch.from_numpy(images).to(self.device))
        return logits.float().cpu().numpy()

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode, the engine's precision and no gradients; restores the model's mode."""
        training = self.model.training
        trains = isinstance(self.model, CrossViT)  # an inference form is in its precision already
        cast = autocast(self.device, self.precision) if trains else contextlib.nullcontext()
        self.model.eval()
        try:
            with torch.inference_mode(), cast:
                yield
        finally:
            self.model.train(training)

    def _overlapped(self, images: Images, function: Callable[[Tensor], Tensor]) -> Logits:
        """As `_compute`, in parts: the next is copied from pinned memory during computation."""
        copying = torch.cuda.Stream(self.device)
        logits = []
        with self._inference():
            staged = [part.pin_memory() for part in torch.from_numpy(images).split(GPU_PART)]
            for part in staged:
                with torch.cuda.stream(copying):
                    on_device = part.to(self.device, non_blocking=True)
                torch.cuda.current_stream(self.device).wait_stream(copying)
                on_device.record_stream(torch.cuda.current_stream(self.device))
                logits.append(function(on_device).float())
            joined = torch.cat(logits, dim=1).cpu()
        return joined.numpy()


def resolve_device(name: str) -> torch.device:
    """A device by name; `auto` is CUDA, else Apple's GPU, else the CPU.

    Raises:
        UsageError: For an unknown or unavailable device.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available.get(name, False):
        choices = ", ".join(device for device in available if available[device])
        raise UsageError(f"device {name!r} is not available here: use {choices}")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """A precision by name; `auto` is bf16 where the hardware has it, else fp32.

    On a CPU that is AVX-512 BF16 or AMX.

    Raises:
        UsageError: For an unknown precision.
    """
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
    """The autocast context of a precision on a device; none for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
