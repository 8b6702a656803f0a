"""Attention on queries, keys and values: https://arxiv.org/abs/1706.03762."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.linear import Linear, linear


def attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M E"],
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "B H N E"]:
    """softmax(q k^T / sqrt(D) + bias) v through PyTorch's fused kernels. `bias` is added to the scores (or bool: keep).

    A query that may attend to nothing gets zeros.
    """
    slow = dropout == 0.0 and _is_slow_when_fused(q, k)
    if causal and (bias is not None or slow):  # the kernels take only one of the two
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        bias = keep if bias is None else bias & keep if bias.dtype == torch.bool else bias.masked_fill(~keep, -math.inf)
        causal = False
    if slow and (bias is None or bias.dtype == torch.bool or _is_of_keys(bias)):
        return _attention_by_products(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, dropout_p=dropout)


FUSED_FROM = 512  # tokens
MATRIX_UNITS = torch.cpu._is_amx_tile_supported()


def _is_slow_when_fused(q: Tensor, k: Tensor) -> bool:
    """On processors, the fused backward pass for bfloat16 is up to eight times slower than products on short rows; the
    forward pass twice, without matrix units."""
    short = q.shape[2] * k.shape[2] <= FUSED_FROM**2
    if not short or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    return (torch.is_grad_enabled() and q.requires_grad) or not MATRIX_UNITS


def _is_of_keys(bias: Tensor) -> bool:
    """(B, 1, 1, M)"""
    return bias.dim() == 4 and bias.shape[1:3] == (1, 1)


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """With no bias, a boolean one, or one that is added for each key alone."""
    B, H, N, D = q.shape
    M = k.shape[2]
    keep, lowest = None, torch.finfo(q.dtype).min / 2
    if bias is not None and bias.dtype == torch.bool and not _is_of_keys(bias):
        keep, bias = bias, None
    elif bias is not None:
        hidden = ~bias if bias.dtype == torch.bool else bias == -math.inf
        v = v.masked_fill(hidden.transpose(2, 3), 0.0)  # for those who may see nothing, whose weights are all alike
        shown = torch.zeros(bias.shape, dtype=q.dtype, device=q.device) if bias.dtype == torch.bool else bias
        bias = shown.masked_fill(hidden, lowest)
    q, k, v = q.reshape(B * H, N, D), k.reshape(B * H, M, D), v.reshape(B * H, M, v.shape[-1])
    if bias is None:
        start, beta = q.new_empty(1, 1, 1).expand(B * H, N, M), 0  # with beta=0 it is never read
    else:
        start, beta = bias.expand(B, H, -1, -1).flatten(0, 1), 1  # (B H, 1, M)
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=beta, alpha=1 / math.sqrt(D))
    if keep is None:
        weights = scores.softmax(dim=-1)
    else:
        weights = scores.unflatten(0, (B, H)).masked_fill(~keep, lowest).softmax(dim=-1)
        weights = weights.masked_fill(~keep, 0.0).flatten(0, 1)  # also for those who may see nothing
    return torch.bmm(weights, v).unflatten(0, (B, H))


def attention_with_weights(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M E"],
    *,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Float[Tensor, "B H N E"], Float[Tensor, "B H N M"]]:
    """The same written out, for explanations: also returns the weights, whose rows sum to one. O(N M) memory.

    The rows of queries that may attend to nothing are zeros.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, H, N, M)
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        empty = (scores == -math.inf).all(dim=-1, keepdim=True)  # their softmax, and its gradient, would be NaN
        weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    else:
        weights = scores.softmax(dim=-1)
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention where a context is given. Queries, keys and values share one packed matrix.

    Without `key_bias` only queries and values are shifted, as in DINOv3 (https://arxiv.org/abs/2508.10104).
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = True, key_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and key_bias)
        self.query_value_bias = nn.Parameter(torch.zeros(2 * dim)) if qkv_bias and not key_bias else None
        self.out = Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        positions: Float[Tensor, "*B N C"] | None = None,
        context_positions: Float[Tensor, "*B M C"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """`positions` are added to what queries are made of, and in self-attention keys; `context_positions` to what
        keys are made of where there is a context. Values have none. https://arxiv.org/abs/2005.12872
        """
        q, k, v = self.project(x, context, rotary, positions, context_positions)
        mixed = attention(q, k, v, bias=bias, causal=causal, dropout=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def with_weights(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        positions: Float[Tensor, "*B N C"] | None = None,
        context_positions: Float[Tensor, "*B M C"] | None = None,
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B H N M"]]:
        """`forward` by the explicit path; also returns the attention weights. Without dropout."""
        q, k, v = self.project(x, context, rotary, positions, context_positions)
        mixed, weights = attention_with_weights(q, k, v, bias=bias, causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights

    def project(
        self,
        x: Tensor,
        context: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of the context: (B, H, N, D), (B, H, M, D), (B, H, M, D)."""
        if context is None:
            if positions is None:
                q, k, v = self._parts(x, 0, 3)
            else:
                (q, k), (v,) = self._parts(x + positions, 0, 2), self._parts(x, 2, 3)
        else:
            (q,) = self._parts(x if positions is None else x + positions, 0, 1)
            if context_positions is None:
                k, v = self._parts(context, 1, 3)
            else:
                (k,), (v,) = self._parts(context + context_positions, 1, 2), self._parts(context, 2, 3)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def _parts(self, x: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
        """Of queries (0), keys (1) and values (2) those from `start` up to `end`, by one product: (B, H, N, D) each."""
        C = x.shape[-1]
        weight, bias = self.qkv.weight, self.bias()
        if (start, end) != (0, 3):
            weight, bias = weight[start * C : end * C], None if bias is None else bias[start * C : end * C]
        return linear(x, weight, bias).unflatten(-1, (end - start, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def bias(self) -> Tensor | None:
        """Of queries, keys and values (3 C,)."""
        if self.query_value_bias is None:
            return self.qkv.bias
        q, v = self.query_value_bias.chunk(2)
        return torch.cat((q, torch.zeros_like(q), v))


def rotate(x: Float[Tensor, "B H N D"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B H N D"]:
    """Turn each pair (x_i, x_{i + D/2}) by its angle; `rotary` is (cos, sin), each (>= N, D) or (B, 1, N, D)."""
    cos, sin = (table[..., : x.shape[2], :].to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
