"""The block of a Transformer encoder, pre-norm (ViT) or post-norm (as first published)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.layers.attention import attention as attend
from saccade.layers.attention import attention_with_weights
from saccade.layers.efficient_attention import ATTENTION
from saccade.layers.feedforward import feed_forward
from saccade.layers.mixing import Layout
from saccade.layers.token_merging import Merged, attention_by_size, log_sizes, match

Rotary = tuple[Tensor, Tensor]


class LayerScale(nn.Module):
    """A learned factor per channel, small at first: https://arxiv.org/abs/2103.17239."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drop a residual branch for whole samples, https://arxiv.org/abs/1603.09382."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *([1] * (x.ndim - 1)), device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1.0 - rate))


class EncoderBlock(nn.Module):
    """Attention and a feed-forward network, each with a residual connection and a LayerNorm."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        mlp: str = "gelu",
        norm_first: bool = True,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention: str = "full",
        layout: Layout | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = ATTENTION[attention](dim, heads, layout=layout, qkv_bias=qkv_bias, key_bias=key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = feed_forward(mlp, dim, hidden, dropout=dropout)
        self.scale1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm_first = norm_first
        self.drop_path = drop_path

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        *,
        queries: int | None = None,
        rotary: Rotary | None = None,
        layout: Layout | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """All tokens attend to all. With `queries`, only the first so many are computed; they still see every token.

        Forms of attention that need to know where tokens lie are told by `layout`.
        """
        h = self.norm1(x) if self.norm_first else x
        if queries is None:
            mixed = self.attention(h, rotary=rotary, layout=layout)
        elif self.attention.independent_queries:
            mixed = self.attention(h[:, :queries], h, rotary=rotary, layout=layout)
        else:
            mixed = self.attention(h, rotary=rotary, layout=layout)[:, :queries]
        first = x if queries is None else x[:, :queries]
        x = first + self._branch(mixed, self.scale1)
        if self.norm_first:
            return x + self._branch(self.mlp(self.norm2(x)), self.scale2)
        x = self.norm1(x)
        return self.norm2(x + self._branch(self.mlp(x), self.scale2))

    def merging(
        self,
        x: Float[Tensor, "B M C"],
        merged: Merged,
        *,
        count: int,
        prefix: int,
        queries: int | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Tensor, "B L C"], Merged]:
        """`forward` of a pre-norm block with full attention, where `count` tokens join others before the MLP."""
        q, k, v = self.attention.project(self.norm1(x), None, None if rotary is None else merged.rotary(rotary))
        q = q if queries is None else q[:, :, :queries]
        mixed = attention_by_size(q, k, v, merged.sizes) if merged.started else attend(q, k, v)
        mixed = self.attention.out(mixed.transpose(1, 2).flatten(2))
        x = (x if queries is None else x[:, :queries]) + self._branch(mixed, self.scale1)
        if queries is None:
            x, merged = merged.step(x, match(k.sum(dim=1), count, prefix))
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2), merged

    def merging_with_weights(
        self, x: Float[Tensor, "B M C"], merged: Merged, *, count: int, prefix: int, rotary: Rotary | None = None
    ) -> tuple[Tensor, Merged, Tensor]:
        """`merging` by the explicit path; also returns the weights between original tokens (B, H, N, N)."""
        q, k, v = self.attention.project(self.norm1(x), None, None if rotary is None else merged.rotary(rotary))
        mixed, weights = attention_with_weights(q, k, v, bias=log_sizes(merged.sizes, q.dtype))
        x = x + self._branch(self.attention.out(mixed.transpose(1, 2).flatten(2)), self.scale1)
        spread = merged.spread(weights)
        x, merged = merged.step(x, match(k.sum(dim=1), count, prefix))
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2), merged, spread

    def with_weights(
        self, x: Float[Tensor, "B N C"], *, rotary: Rotary | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` by the explicit path; also returns the attention weights (B, H, N, N)."""
        h = self.norm1(x) if self.norm_first else x
        mixed, weights = self.attention.with_weights(h, rotary=rotary, layout=layout)
        x = x + self._branch(mixed, self.scale1)
        if self.norm_first:
            return x + self._branch(self.mlp(self.norm2(x)), self.scale2), weights
        x = self.norm1(x)
        return self.norm2(x + self._branch(self.mlp(x), self.scale2)), weights

    def _branch(self, x: Tensor, scale: LayerScale | None) -> Tensor:
        return drop_path(x if scale is None else scale(x), self.drop_path, self.training)
