"""The T2T tokeniser's attention, over thousands of tokens, by the faster of torch's two ways."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit.fast.eligibility import fused_form, why_not
from crossvit.fast.self_attention import attention_by_shape
from crossvit.model.t2t import TokenTransformer


@fused_form(TokenTransformer)
class FusedTokenTransformer(TokenTransformer):
    """`TokenTransformer` by two products and a softmax where they are faster: (B, n, C') -> (B, n, E)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, x):
            return super().forward(x)
        query, key, value = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, n, E)
        x = (value + self.out(attention_by_shape(query, key, value))).squeeze(1)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
