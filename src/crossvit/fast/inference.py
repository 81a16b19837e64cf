"""The inference form of a model: the same function, computed the way its device does it fastest.

`optimize(model)` copies the weights, so the model itself is left as it is and may go on training. docs/performance.md says
what each change gave.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from crossvit.errors import UsageError
from crossvit.fast.cpu_form import CpuForm
from crossvit.fast.eligibility import is_changed_at_the_root, why_not
from crossvit.model.crossvit import CrossViT, check_images

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger("crossvit")


def optimize(
    model: CrossViT, *, precision: str = "fp32", compile: bool | None = None
) -> CpuForm | DeviceForm:
    """The form of `model` for inference on the device it is on: `form(images)` and `form.branch_logits(images)` as the
    model's, float32 logits without gradients.

    In fp32 on a CPU the logits equal the model's to 1e-5 of the largest. precision `bf16` (or, on a GPU, `fp16`) holds
    weights and tokens in it. compile: whether torch compiles the form, with CUDA graphs; by default on CUDA. It takes a
    minute on the first call of each batch size. Later changes of the model's weights do not reach the form. A model of
    which something has been changed (a subclass, a hook, a layer in another's place) is computed by its own code, which
    the log says. UsageError for another precision.
    """
    if precision not in DTYPES:
        raise UsageError(f"precision {precision!r}: optimize takes {', '.join(DTYPES)}")
    device = next(model.parameters()).device
    if device.type == "cpu" and precision != "fp16":
        if (reason := why_not(model)) is None:
            return CpuForm(model, dtype=DTYPES[precision])
        log.info("the model computes by its own code, not by a faster form: %s", reason)
    return DeviceForm(
        model,
        dtype=DTYPES[precision],
        compile=device.type == "cuda" if compile is None else compile,
    )


class DeviceForm(nn.Module):
    """A copy of a model, in one dtype: fused attention, convolutions channels last, CUDA graphs if compiled. For GPUs, and
    on a CPU for models that `CpuForm` does not know.

    images: (B, C, H, W) float32, normalised, on the device. A compiled form computes a batch smaller than the largest so
    far as one of that size, since every size is compiled and recorded by itself.
    """

    def __init__(self, model: CrossViT, *, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.compiled = compile
        self.largest = 0  # images in the largest batch so far
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        for embed in self.model.tokens:
            embed.to(memory_format=torch.channels_last)
        logits = self.model.branch_logits
        self._logits = (
            torch.compile(logits, mode="reduce-overhead", dynamic=False) if compile else logits
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches', or what a changed model makes of them."""
        if is_changed_at_the_root(self.model):
            with torch.no_grad():
                return self.model(images.to(self.dtype)).float()  # type: ignore[no-any-return]
        return self.branch_logits(images).mean(dim=0)

    @torch.no_grad()
    def branch_logits(self, images: Tensor) -> Tensor:
        """(branches, B, num_classes), float32."""
        check_images(images, self.config)
        count = len(images)
        given = images.to(self.dtype, memory_format=torch.channels_last)
        if self.compiled:
            self.largest = max(self.largest, count)
            given = (
                torch.cat((given, given[:1].expand(self.largest - count, -1, -1, -1)))
                if count < self.largest
                else given
            )
        return self._logits(given)[
            :, :count
        ].float()  # a copy: the next replay of a graph writes over its output
