"""The form of a model that is exported: written in what engines compute fastest.

The engines are ONNX Runtime and OpenVINO; docs/performance.md says what each change gave.

Shapes: B batch, C channels, H x W pixels, n patches, N tokens, D width, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.errors import EngineError
from crossvit.fast.eligibility import why_not_exact
from crossvit.fast.form import own_copy, why_not_form
from crossvit.fast.packed_linear import Resize, scaled_qkv
from crossvit.model.crossvit import CrossViT
from crossvit.model.layers import EncoderBlock
from crossvit.model.tokens import Tokens


class GraphForm(nn.Module):
    """A model for export at its `config.image_size`.

    images: (B, C, H, W) float32, normalised -> (branches, B, num_classes). A copy: the branch's
    resize is products, an encoder block has its LayerNorms' weights and the scale of its scores
    in the linear layers behind them, cross-attention builds no keys. What has been changed, and
    all else, is the model's own code. Logits are the model's to 1e-5 of the largest.
    """

    def __init__(self, model: CrossViT) -> None:
        """
        Raises:
            EngineError: For a model whose logits may not be the mean of its branches' logits.
        """
        super().__init__()
        if (reason := why_not_exact(model, CrossViT)) is not None:
            raise EngineError(f"the model cannot be exported as it is changed: {reason}")
        replacements: dict[nn.Module, nn.Module] = {}
        for name, module in model.named_modules():
            if isinstance(module, Tokens) and not why_not_form(module, Tokens, name):
                replacements[module] = _GraphTokens(module, model.config.image_size)
            if isinstance(module, EncoderBlock) and not why_not_form(module, EncoderBlock, name):
                replacements[module] = _GraphBlock(module)
        self.model: CrossViT = own_copy(model, replacements)
        self.model.set_gradient_checkpointing(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.branch_logits(images)


class _GraphTokens(nn.Module):
    """`Tokens` at one image size. ONNX's bicubic Resize takes sixteen taps a pixel, in ONNX Runtime in one thread."""

    def __init__(self, embed: Tokens, image_size: tuple[int, int]) -> None:
        super().__init__()
        size = embed.branch.image_size(image_size)
        self.resize = nn.Identity() if size == image_size else Resize(image_size, size)
        self.stem = own_copy(embed.patches)
        positions = embed.positions.detach()
        self.first = (
            None if embed.class_token is None else embed.class_token.detach() + positions[:, :1]
        )  # (1, 1, D)
        self.positions = positions if self.first is None else positions[:, 1:].clone()  # (1, n, D)

    def forward(self, images: Tensor) -> Tensor:
        patches = (
            self.stem(self.resize(images)).flatten(2).transpose(1, 2) + self.positions
        )  # (B, n, D)
        if self.first is None:
            return patches  # type: ignore[no-any-return]
        return torch.cat(
            (self.first.expand(patches.shape[0], -1, -1), patches), dim=1
        )  # (B, 1 + n, D)


class _GraphBlock(nn.Module):
    """`EncoderBlock`: (B, N, D) -> (B, N, D).

    Query, key and value are a product each, so that they lie as OpenVINO's one kernel for both products and the softmax
    takes them: from one product they would first be parted by a copy.
    """

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__()
        attention = block.attention
        self.num_heads = attention.num_heads
        self.attention_eps, self.mlp_eps = block.attention_norm.eps, block.mlp_norm.eps
        weight, bias = _folded(block.attention_norm, attention.qkv)
        weight, bias = scaled_qkv(weight, bias, self.num_heads)
        parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
        self.query, self.key, self.value = (_linear(*part) for part in parts)
        self.out = own_copy(attention.out)
        self.hidden = _linear(*_folded(block.mlp_norm, block.mlp[0]))
        self.down = own_copy(block.mlp[3])

    def forward(self, x: Tensor) -> Tensor:
        normal = _standardised(x, self.attention_eps)
        heads = (self.num_heads, -1)
        query = self.query(normal).unflatten(-1, heads).permute(0, 2, 1, 3)  # (B, heads, N, K)
        key = self.key(normal).unflatten(-1, heads).permute(0, 2, 3, 1)  # (B, heads, K, N)
        value = self.value(normal).unflatten(-1, heads).permute(0, 2, 1, 3)  # (B, heads, N, K)
        context = (query @ key).softmax(dim=-1) @ value
        x = x + self.out(context.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.hidden(_standardised(x, self.mlp_eps))))  # type: ignore[no-any-return]


def _standardised(x: Tensor, eps: float) -> Tensor:
    """Each token to mean 0 and variance 1: a LayerNorm whose weights are in what reads it."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _folded(norm: nn.LayerNorm, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of W (γ z + β) + b as a linear layer of z: (W diag γ, b + W β), taken in float64."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().double()
    bias = linear.bias.detach().double() + weight @ norm.bias.detach().double()
    return (weight * norm.weight.detach().double()).float(), bias.float()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.contiguous())
    return linear
