"""From tokens to one vector by a learned query."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.layers.attention import MultiHeadAttention
from saccade.layers.feedforward import feed_forward


class AttentionPooling(nn.Module):
    """One learned query attends to all tokens, then a feed-forward network: https://arxiv.org/abs/1810.00825.

    The head of SigLIP (https://arxiv.org/abs/2303.15343). The attention itself has no residual connection.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, mlp: str = "gelu", norm_eps: float = 1e-6):
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.attention = MultiHeadAttention(dim, heads)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = feed_forward(mlp, dim, hidden)
        nn.init.trunc_normal_(self.query, std=dim**-0.5)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C"]:
        return self._refine(self.attention(self._queries(x), x))

    def with_weights(self, x: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
        """`forward` by the explicit path; also returns the share of each token, the mean over heads."""
        mixed, weights = self.attention.with_weights(self._queries(x), x)  # (B, 1, C), (B, H, 1, N)
        return self._refine(mixed), weights[:, :, 0].mean(dim=1)

    def _queries(self, x: Tensor) -> Tensor:
        return self.query.to(x.dtype).expand(len(x), 1, -1)

    def _refine(self, mixed: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B C"]:
        return (mixed + self.mlp(self.norm(mixed)))[:, 0]
