"""Cross-entropy over a large vocabulary without a table of all scores.

What a token scores costs little to compute, but in float32 a batch of 4,000 tokens and a vocabulary of 6,000 is 96 MB,
which the loss reads and writes about ten times. Here some rows at a time are scored, compared, turned into their
gradient and forgotten, all in the processor's cache. The sums are the same but for their order.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

PIECE = 2**21  # scores at a time


def linear_cross_entropy(
    hidden: Float[Tensor, "M C"],
    table: Float[Tensor, "V C"],
    bias: Float[Tensor, " V"] | None,
    wanted: Int[Tensor, " M"],
    smoothing: float = 0.0,
    precision: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """`F.cross_entropy(F.linear(hidden, table, bias), wanted, label_smoothing=smoothing)`: a mean over M rows.

    Products are of `precision`, by default that of `hidden`.
    """
    dtype = hidden.dtype if precision is None else precision
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        scores = linear_in(dtype, hidden, table, bias)
        return F.cross_entropy(scores.float(), wanted, label_smoothing=smoothing)
    learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (hidden, table, bias))
    with torch.autocast("cpu", enabled=False):
        return _ByPieces.apply(hidden, table, bias, wanted, smoothing, learns, dtype)  # type: ignore[return-value]


def linear_in(
    dtype: torch.dtype, x: Float[Tensor, "*B C"], weight: Float[Tensor, "V C"], bias: Tensor | None
) -> Float[Tensor, "*B V"]:
    """`F.linear` in this precision."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class _ByPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor | None,
        wanted: Tensor,
        smoothing: float,
        learns: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Products are of `dtype`, all else at least of float32."""
        M, V = len(hidden), len(table)
        rows = max(1, PIECE // V)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        scores = torch.empty(min(rows, M), V, dtype=exact)
        narrow = table.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float64)
        of_hidden = torch.empty_like(hidden) if learns else None
        of_table = torch.zeros_like(table, dtype=exact) if learns else None
        of_bias = torch.zeros_like(bias, dtype=exact) if learns and bias is not None else None
        for first in range(0, M, rows):
            h, right = hidden[first : first + rows].to(dtype), wanted[first : first + rows, None]
            s = scores[: len(h)]
            _multiply(h, narrow.T, s)
            if bias is not None:
                s += bias
            s.sub_(s.amax(dim=1, keepdim=True))
            reward = (1 - smoothing) * s.gather(1, right)
            if smoothing:
                reward += smoothing / V * s.sum(dim=1, keepdim=True)
            norm = s.exp_().sum(dim=1, keepdim=True)
            total += (norm.log() - reward).sum(dtype=torch.float64)
            if of_hidden is not None and of_table is not None:
                s.mul_(1 / (M * norm))
                if smoothing:
                    s.sub_(smoothing / (M * V))
                s.scatter_add_(1, right, torch.full_like(norm, -(1 - smoothing) / M))
                upstream = s.to(dtype)
                _multiply(upstream, narrow, of_hidden[first : first + rows])
                if dtype == of_table.dtype:
                    of_table.addmm_(upstream.T, h)
                else:
                    of_table += upstream.T @ h
                if of_bias is not None:
                    of_bias += s.sum(dim=0)
        found = ((of_hidden, hidden), (of_table, table), (of_bias, bias))
        ctx.save_for_backward(*(part.to(of.dtype) for part, of in found if part is not None and of is not None))
        return (total / M).to(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = [part * gradients[0].to(part.dtype) for part in ctx.saved_tensors]
        return (*parts, *(None,) * (7 - len(parts)))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
