"""The block of a Transformer encoder, pre-norm (ViT) or post-norm (as first published)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.layers.attention import MultiHeadAttention
from saccade.layers.feedforward import feed_forward

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
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = MultiHeadAttention(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = feed_forward(mlp, dim, hidden, dropout=dropout)
        self.scale1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm_first = norm_first
        self.drop_path = drop_path

    def forward(
        self, x: Float[Tensor, "B N C"], *, queries: int | None = None, rotary: Rotary | None = None
    ) -> Float[Tensor, "B Q C"]:
        """All tokens attend to all. With `queries`, only the first so many are computed; they still see every token."""
        if self.norm_first:
            h = self.norm1(x)
            first = x if queries is None else x[:, :queries]
            if queries is None:
                mixed = self.attention(h, rotary=rotary)
            else:
                mixed = self.attention(h[:, :queries], h, rotary=rotary)
            x = first + self._branch(mixed, self.scale1)
            return x + self._branch(self.mlp(self.norm2(x)), self.scale2)
        first = x if queries is None else x[:, :queries]
        mixed = self.attention(first, None if queries is None else x, rotary=rotary)
        x = self.norm1(first + self._branch(mixed, self.scale1))
        return self.norm2(x + self._branch(self.mlp(x), self.scale2))

    def with_weights(self, x: Float[Tensor, "B N C"], *, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """`forward` by the explicit path; also returns the attention weights (B, H, N, N)."""
        mixed, weights = self.attention.with_weights(self.norm1(x) if self.norm_first else x, rotary=rotary)
        x = x + self._branch(mixed, self.scale1)
        if self.norm_first:
            return x + self._branch(self.mlp(self.norm2(x)), self.scale2), weights
        x = self.norm1(x)
        return self.norm2(x + self._branch(self.mlp(x), self.scale2)), weights

    def _branch(self, x: Tensor, scale: LayerScale | None) -> Tensor:
        return drop_path(x if scale is None else scale(x), self.drop_path, self.training)
