"""CrossViT (Chen, Fan, Panda, ICCV 2021, arXiv 2103.14899): read it beside the paper's Figure 2.

    image ─► Tokens per branch ─► K x MultiScaleEncoder (blocks, fusion)
          ─► LayerNorm and head per branch ─► mean of the logits

Shapes: B batch, C channels, H x W pixels, n patches, D width; one entry a branch, S (small
patches) first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit.model.attention import attention_kernel, chosen_kernel
from crossvit.model.config import CrossViTConfig
from crossvit.model.fusion import Grid, summary
from crossvit.model.layers import NORM_EPS, drop_path_rates
from crossvit.model.registry import BLOCKS, FUSIONS
from crossvit.model.tokens import Tokens

Context = contextlib.AbstractContextManager[Any]


class MultiScaleEncoder(nn.Module):
    """One of the K encoders: each branch's own blocks (N for S, M for L), then the fusion.

    Tokens and grids of every branch in, tokens out. With `checkpointing` a block keeps its input
    only and computes the rest again in the backward pass.
    """

    def __init__(self, config: CrossViTConfig, *, drop_path: Sequence[float]) -> None:
        super().__init__()
        block = BLOCKS[config.block]
        drops = {"drop": config.drop, "attention_drop": config.attention_drop}
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                block(branch, drop_path=drop_path[index], **drops) for index in range(branch.depth)
            )
            for branch in config.branches
        )
        self.fusion = FUSIONS[config.fusion](config, drop_path=drop_path[-1])
        self.checkpointing = False

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        encoded = []
        for blocks, x in zip(self.blocks, tokens, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = self.run(block, x)  # noqa: PLW2901  # block after block
            encoded.append(x)
        return self.fusion(encoded, grids)  # type: ignore[no-any-return]

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """`block(x)`, checkpointed where that is on and no listener would hear it twice."""
        if not (self.checkpointing and torch.is_grad_enabled()) or _is_recorded(block):
            return block(x)  # type: ignore[no-any-return]
        return checkpoint(block, x, use_reentrant=False, context_fn=self.contexts)  # type: ignore[no-any-return]

    def contexts(self) -> tuple[Context, Context]:
        """In what a checkpointed block is computed, and computed again in the backward pass."""
        return contextlib.nullcontext(), attention_kernel(chosen_kernel())


def _is_recorded(block: nn.Module) -> bool:
    return any(getattr(module, "listener", None) is not None for module in block.modules())


class CrossViT(nn.Module):
    """The multi-scale vision transformer. `model(images)` gives logits (B, num_classes).

    Images are (B, C, H, W) float, normalised as the weights expect, at `config.image_size`, or of
    any size whose sides are no shorter than a patch with `config.dynamic_size`.

    Args:
        config: Is kept as `config`.
    """

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.config = config
        branches = config.branches
        sizes = {"in_channels": config.in_channels, "image_size": config.image_size}
        self.tokens = nn.ModuleList(Tokens(b, drop=config.drop, **sizes) for b in branches)  # type: ignore[arg-type]
        steps = max(1, *(b.depth for b in branches))  # blocks of the deepest branch in an encoder
        rates = drop_path_rates(config.drop_path, config.stages * steps)
        self.encoders = nn.ModuleList(
            MultiScaleEncoder(config, drop_path=rates[stage * steps : (stage + 1) * steps])
            for stage in range(config.stages)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(b.dim, eps=NORM_EPS) for b in branches)
        self.heads = nn.ModuleList(nn.Linear(b.dim, config.num_classes) for b in branches)
        initialise(self, config.init)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Whether each encoder block trades its activations for a second forward pass."""
        for encoder in self.encoders:
            assert isinstance(encoder, MultiScaleEncoder)
            encoder.checkpointing = enabled

    def intermediate_tokens(self, images: Tensor) -> list[list[Tensor]]:
        """The tokens after each encoder, before any final LayerNorm.

        Returns:
            `[stage][branch]` of (B, 1 + n, D), the class token first.

        Raises:
            ValueError: For images of another shape than the model takes.
        """
        check_images(images, self.config)
        size = (images.shape[-2], images.shape[-1])
        grids = [branch.grid(size) for branch in self.config.branches]
        tokens = [embed(images) for embed in self.tokens]
        stages = []
        for encoder in self.encoders:
            tokens = encoder(tokens, grids)
            stages.append(tokens)
        return stages

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The last encoder's tokens after each branch's LayerNorm: a (B, 1 + n, D) a branch."""
        tokens = self.intermediate_tokens(images)[-1]
        return [norm(x) for norm, x in zip(self.norms, tokens, strict=True)]

    def branch_logits(self, images: Tensor) -> Tensor:
        """Each branch's logits, (branches, B, num_classes): "L only" and "S only" of Table 6.

        The last LayerNorm is taken of what is read alone: it treats every token by itself.
        """
        tokens = self.intermediate_tokens(images)[-1]
        if self.config.branches[0].class_token:
            tokens = [x[:, :1] for x in tokens]
        return self.branch_logits_of([n(x) for n, x in zip(self.norms, tokens, strict=True)])

    def branch_logits_of(self, tokens: Sequence[Tensor]) -> Tensor:
        """The heads alone: `forward_features`'s tokens -> (branches, B, num_classes).

        A head reads the class token, or the mean of the patches where there is none.
        """
        has_class_token = self.config.branches[0].class_token
        read = [summary(x, has_class_token)[:, 0] for x in tokens]
        return torch.stack([head(x) for head, x in zip(self.heads, read, strict=True)])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches' logits, as released."""
        return self.branch_logits(images).mean(dim=0)


def check_images(images: Tensor, config: CrossViTConfig) -> None:
    """ValueError for images that a model of `config` does not take."""
    height, width = config.image_size
    channels, shape = config.in_channels, tuple(images.shape)
    if config.dynamic_size:
        patch = max(branch.patch for branch in config.branches)
        if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < patch:
            raise ValueError(
                f"images are {shape}: this model takes (B, {channels}, H, W) "
                f"with sides of {patch} or more"
            )
    elif len(shape) != 4 or shape[1:] != (channels, height, width):
        raise ValueError(
            f"images are {shape}: this model takes (B, {channels}, {height}, {width}); resize "
            f"them, or build the model with image_size=(height, width) or dynamic_size=True"
        )


def initialise(model: nn.Module, scheme: str) -> None:
    """Fill the parameters of linear layers, convolutions and tokens; others keep their own values.

    A model on the meta device has nothing to fill.

    Args:
        model: Whose modules are gone through, in order.
        scheme: `paper`: truncated normal 0.02 for linear weights, class tokens and positions,
            zero biases, torch's own default for convolutions (as released). `xavier`:
            Xavier-uniform linear weights and He-normal convolutions, zero biases, so that small
            data trains from scratch (dev/LOG.md).
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # drawing nothing, torch would import its compiler: seconds
    for module in model.modules():
        match module:
            case nn.Linear():
                if scheme == "paper":
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.Conv2d() if scheme == "xavier":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case Tokens():
                nn.init.trunc_normal_(module.positions, std=0.02)
                if module.class_token is not None:
                    nn.init.trunc_normal_(module.class_token, std=0.02)
