"""The inference form of a model: the same function, computed the way its device does it fastest.

`optimize(model)` copies the weights, so the model itself is left as it is and may go on training.
docs/performance.md says what each change gave.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from crossvit.errors import UsageError
from crossvit.fast.cpu_form import CpuForm
from crossvit.fast.eligibility import is_changed_at_the_root, why_not_exact
from crossvit.fast.form import InferenceForm, own_copy
from crossvit.model.crossvit import CrossViT, check_images

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger("crossvit")


def optimize(
    model: CrossViT, *, precision: str = "fp32", compile: bool | None = None
) -> CpuForm | DeviceForm:
    """The form of `model` for inference on the device it is on.

    `form(images)` and `form.branch_logits(images)` are the model's: float32 logits, without
    gradients. The form is of the model as it is now; later changes of its weights do not reach
    it. What has been changed in the model (a subclass, a hook, a layer in another's place) is
    computed by its own code, from a layer up to the whole model, which the log says.

    Args:
        model: Is copied, and not changed.
        precision: `fp32`: on a CPU the logits equal the model's to 1e-5 of the largest. `bf16`
            (or, on a GPU, `fp16`) holds weights and tokens in it.
        compile: Whether torch compiles the form, with CUDA graphs; by default on CUDA. It takes a
            minute on the first call of each batch size.

    Raises:
        UsageError: For another precision.
    """
    if precision not in DTYPES:
        raise UsageError(f"precision {precision!r}: optimize takes {', '.join(DTYPES)}")
    device = next(model.parameters()).device
    if device.type == "cpu" and precision != "fp16":
        if (reason := why_not_exact(model, CrossViT)) is None:
            return CpuForm(model, dtype=DTYPES[precision])
        log.info("the model computes by its own code, not by a faster form: %s", reason)
    compiles = device.type == "cuda" if compile is None else compile
    return DeviceForm(model, dtype=DTYPES[precision], compile=compiles)


class DeviceForm(InferenceForm):
    """A copy of a model in one dtype: fused attention, convolutions channels last, CUDA graphs.

    For GPUs, and on a CPU for a model that has been changed as a whole. images: (B, C, H, W)
    float32, normalised, on the device. A compiled form computes a batch smaller than the largest
    so far as one of that size, since every size is compiled and recorded by itself.
    """

    def __init__(self, model: CrossViT, *, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.compiled = compile
        self.largest = 0  # images in the largest batch so far
        self.model: CrossViT = own_copy(model).to(dtype)
        for embed in self.model.tokens:
            embed.to(memory_format=torch.channels_last)
        logits = self.model.branch_logits
        self._logits = (
            torch.compile(logits, mode="reduce-overhead", dynamic=False) if compile else logits
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches', or what a changed model makes."""
        if is_changed_at_the_root(self.model):
            with torch.no_grad():
                return self.model(images.to(self.dtype)).float()  # type: ignore[no-any-return]
        return self.branch_logits(images).mean(dim=0)

    @torch.no_grad()
    def branch_logits(self, images: Tensor) -> Tensor:
        """(branches, B, num_classes), float32."""
        check_images(images, self.config)
        count = len(images)
        batch = images.to(self.dtype, memory_format=torch.channels_last)
        if self.compiled:
            self.largest = max(self.largest, count)
            if count < self.largest:
                rest = batch[:1].expand(self.largest - count, -1, -1, -1)
                batch = torch.cat((batch, rest))
        # a copy: the next replay of a graph writes over its output
        return self._logits(batch)[:, :count].float()  # type: ignore[no-any-return]
