"""The block of the encoder-decoder Transformer, https://arxiv.org/abs/1706.03762: post-norm as published, or pre-norm.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from saccade.layers.attention import MultiHeadAttention
from saccade.layers.dropout import dropout
from saccade.layers.feedforward import feed_forward


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context (`cross`; else it is an encoder's block), and a feed-forward network.

    Each has a residual connection, a LayerNorm and, after it, dropout. Positions, if any, are given to every block
    anew and are no part of what flows through it, as in DETR (https://arxiv.org/abs/2005.12872).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        cross: bool = True,
        mlp: str = "relu",
        norm_first: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.cross_attention = MultiHeadAttention(dim, heads) if cross else None
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if cross else None
        self.mlp = feed_forward(mlp, dim, hidden)
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps)
        self.norm_first = norm_first
        self.dropout = dropout

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        positions: Float[Tensor, "*B N C"] | None = None,
        context_positions: Float[Tensor, "*B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        context_bias: Tensor | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B N C"]:
        """`bias` is of the scores of self-attention, `context_bias` of those of the context; see `attention`."""
        h = self._before(x, self.norm1)
        x = self._after(x, self.self_attention(h, bias=bias, causal=causal, positions=positions), self.norm1)
        if self.cross_attention is not None:
            assert context is not None and self.norm2 is not None
            h = self._before(x, self.norm2)
            mixed = self.cross_attention(
                h, context, bias=context_bias, positions=positions, context_positions=context_positions
            )
            x = self._after(x, mixed, self.norm2)
        return self._after(x, self.mlp(self._before(x, self.norm3)), self.norm3)

    def with_weights(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"],
        positions: Float[Tensor, "*B N C"] | None = None,
        context_positions: Float[Tensor, "*B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        context_bias: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B H N M"]]:
        """`forward`, and how much each token took from each of the context, by the explicit path."""
        assert self.cross_attention is not None and self.norm2 is not None
        h = self._before(x, self.norm1)
        x = self._after(x, self.self_attention(h, bias=bias, causal=causal, positions=positions), self.norm1)
        h = self._before(x, self.norm2)
        mixed, weights = self.cross_attention.with_weights(
            h, context, bias=context_bias, positions=positions, context_positions=context_positions
        )
        x = self._after(x, mixed, self.norm2)
        return self._after(x, self.mlp(self._before(x, self.norm3)), self.norm3), weights

    def _before(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm(x) if self.norm_first else x

    def _after(self, x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
        if self.training and self.dropout:
            branch = dropout(branch, self.dropout, True)
        x = x + branch
        return x if self.norm_first else norm(x)


def xavier(module: nn.Module) -> None:
    """The initial weights of the published Transformer's code: matrices by width, no shift where attention begins."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.xavier_uniform_(each.weight)
        if isinstance(each, MultiHeadAttention):
            for part in (each.qkv, each.out):
                nn.init.zeros_(part.bias)
