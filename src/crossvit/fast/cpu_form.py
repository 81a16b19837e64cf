"""The inference form of a model on a CPU: the same function, computed the way processors do it fastest.

docs/performance.md says what each change gave. Shapes: B batch, C channels, H x W pixels, N tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.native.bindings import Native
from crossvit.fast.native.build import native
from crossvit.fast.native_form import KernelBlock, KernelTokens, kernels_for, takes_stem
from crossvit.fast.packed_linear import PackedLinear, Resize, attention_of, scaled_qkv
from crossvit.model.crossvit import CrossViT, EncoderBlock, MultiScaleEncoder, check_images
from crossvit.model.fusion import NORM_EPS, CrossAttentionFusion, CrossRead, Grid, summary
from crossvit.model.tokens import Tokens, resample_positions, resize

CACHE_TOKENS = 6500  # tokens a pass takes at most: with our kernels 16 images a pass beat 6 and 8 of both models; see dev/LOG.md


class CpuForm(nn.Module):
    """A model for inference. images: (B, C, H, W) float32, normalised. Batches are cut to what the caches hold.

    dtype: of what goes into products, float32 or bfloat16; LayerNorm, sums and softmax compute in float32 either way. Tokens
    are in float32 where our kernels compute the blocks, else in dtype.
    """

    def __init__(self, model: CrossViT, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.has_class_token = self.config.branches[0].class_token
        grids = [branch.grid(self.config.image_size) for branch in self.config.branches]
        tokens = max(rows * columns for rows, columns in grids)
        self.images_a_pass = max(1, CACHE_TOKENS // tokens)
        rows = self.images_a_pass * tokens
        kernels = kernels_for(model, dtype)
        self.tokens = nn.ModuleList(
            _fast_tokens(embed, self.config.image_size, dtype, kernels)  # type: ignore[arg-type]
            for embed in model.tokens
        )
        self.encoders = nn.ModuleList(
            _FastEncoder(encoder, rows, dtype, kernels)  # type: ignore[arg-type]
            for encoder in model.encoders
        )
        self.norms = nn.ModuleList(_FastNorm(norm) for norm in model.norms)  # type: ignore[arg-type]
        self.heads = copy.deepcopy(
            model.heads
        ).float()  # a head reads one token: precision costs nothing there
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches'."""
        return self.branch_logits(images).mean(dim=0)

    @torch.inference_mode()
    def branch_logits(self, images: Tensor) -> Tensor:
        """(branches, B, num_classes), float32."""
        check_images(images, self.config)
        return torch.cat(
            [self._pass(part) for part in images.float().split(self.images_a_pass)], dim=1
        )

    def _pass(self, images: Tensor) -> Tensor:
        grids = [
            branch.grid((images.shape[-2], images.shape[-1])) for branch in self.config.branches
        ]
        tokens = [embed(images) for embed in self.tokens]
        for encoder in self.encoders:
            tokens = encoder(tokens, grids)
        logits = []
        for norm, head, own in zip(self.norms, self.heads, tokens, strict=True):
            read = (
                norm(own[:, :1])
                if self.has_class_token
                else summary(norm(own), has_class_token=False)
            )
            logits.append(head(read[:, 0].float()))
        return torch.stack(logits)


def _fast_tokens(
    embed: Tokens, image_size: tuple[int, int], dtype: torch.dtype, kernels: Native | None
) -> nn.Module:
    if kernels and takes_stem(embed, dtype, kernels):
        return KernelTokens(embed, dtype, kernels)
    return _FastTokens(embed, image_size, dtype, dtype if kernels is None else torch.float32)


class _FastTokens(nn.Module):
    """`Tokens` with the stem in `dtype`, channels last. kept: the dtype of the tokens."""

    def __init__(
        self, embed: Tokens, image_size: tuple[int, int], dtype: torch.dtype, kept: torch.dtype
    ) -> None:
        super().__init__()
        self.branch, self.grid, self.kept = embed.branch, embed.grid, kept
        size = embed.branch.image_size(image_size)
        # Without kernels products are the faster way.
        self.products = (
            None if size == image_size or native() is not None else Resize(image_size, size)
        )
        self.given = image_size
        # The T2T tokeniser is attention over thousands of tokens, and not worth a form of its own.
        self.stem_dtype = dtype if embed.branch.tokeniser != "t2t" else torch.float32
        self.stem = (
            copy.deepcopy(embed.patches).to(self.stem_dtype).to(memory_format=torch.channels_last)
        )
        self.class_token = None if embed.class_token is None else embed.class_token.detach().clone()
        self.positions = embed.positions.detach().clone()

    def forward(self, images: Tensor) -> Tensor:
        given = (images.shape[-2], images.shape[-1])
        if self.products is not None and given == self.given:
            own = self.products(images)
        else:
            own = resize(images, self.branch.image_size(given))
        own = own.to(self.stem_dtype, memory_format=torch.channels_last)
        patches = self.stem(own).flatten(2).transpose(1, 2)  # (B, n, D)
        positions = resample_positions(self.positions, self.grid, self.branch.grid(given))
        tokens = torch.empty(
            patches.shape[0], positions.shape[1], patches.shape[2], dtype=self.kept
        )
        if self.class_token is not None:
            tokens[:, :1] = self.class_token + positions[:, :1]
        first = positions.shape[1] - patches.shape[1]
        torch.add(patches, positions[:, first:], out=tokens[:, first:])
        return tokens


class _FastNorm(nn.Module):
    """LayerNorm of tokens in any dtype, its weights and sums in fp32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = (
            norm.weight.detach().float().clone(),
            norm.bias.detach().float().clone(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, NORM_EPS)


class _FastBlock(nn.Module):
    """`EncoderBlock` on packed weights; both residuals are added by the product before them. (B, N, D) -> (B, N, D)."""

    def __init__(self, block: nn.Module, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(block, EncoderBlock)
        attention = block.attention
        self.num_heads = attention.num_heads
        self.kernels = native()
        self.attention_norm, self.mlp_norm = (
            _FastNorm(block.attention_norm),
            _FastNorm(block.mlp_norm),
        )
        weight, bias = scaled_qkv(
            attention.qkv.weight.detach(), attention.qkv.bias.detach(), self.num_heads
        )
        self.qkv = PackedLinear(weight.to(dtype), bias.to(dtype), rows=rows)
        self.out = _packed(attention.out, rows, dtype)
        self.hidden, self.down = (_packed(block.mlp[index], rows, dtype) for index in (0, 3))

    def forward(self, x: Tensor) -> Tensor:
        mixed = attention_of(self.qkv(self.attention_norm(x)), self.num_heads, self.kernels)
        x = self.out.add(mixed, x)
        return self.down.add(self.hidden.gelu(self.mlp_norm(x)), x)


def _packed(linear: nn.Module, rows: int, dtype: torch.dtype) -> PackedLinear:
    assert isinstance(linear, nn.Linear)
    return PackedLinear(linear.weight.to(dtype), linear.bias.to(dtype), rows=rows)


def _pack_inside(module: nn.Module, rows: int, dtype: torch.dtype) -> None:
    """Every linear layer in `module` as a packed one, but keys and values, whose weights lazy cross-attention multiplies."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _pack_inside(child, rows, dtype)
        elif name not in ("key", "value"):
            setattr(module, name, _packed(child, rows, dtype))


class _FastEncoder(nn.Module):
    """`MultiScaleEncoder`: every branch's blocks, then the fusion, which writes class tokens in place where it may."""

    def __init__(
        self, encoder: MultiScaleEncoder, rows: int, dtype: torch.dtype, kernels: Native | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for own in encoder.blocks:
            assert isinstance(own, nn.ModuleList)
            fast = (
                KernelBlock(block, dtype, kernels) if kernels else _FastBlock(block, rows, dtype)
                for block in own
            )
            self.blocks.append(nn.Sequential(*fast))
        self.fusion = copy.deepcopy(encoder.fusion)
        kept = torch.float32 if kernels else dtype
        _pack_inside(self.fusion, rows, kept)
        self.fusion.to(kept)
        reads = list(self.fusion.reads) if isinstance(self.fusion, CrossAttentionFusion) else []
        self.in_place = bool(reads) and all(
            isinstance(read, CrossRead) and read.has_class_token for read in reads
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        encoded = [blocks(own) for blocks, own in zip(self.blocks, tokens, strict=True)]
        if not self.in_place:
            return self.fusion(encoded, grids)  # type: ignore[no-any-return]
        others = [*encoded[1:], *encoded[:1]]
        reads = self.fusion.reads
        # A read takes its own class token and the other's patches, so all are made before any is written.
        read = [
            read.read(own[:, :1], other)
            for read, own, other in zip(reads, encoded, others, strict=True)
        ]
        for own, new in zip(encoded, read, strict=True):
            own[:, :1] = new
        return encoded
