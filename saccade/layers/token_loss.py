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
) -> Float[Tensor, ""]:
    """`F.cross_entropy(F.linear(hidden, table, bias), wanted, label_smoothing=smoothing)`: a mean over M rows."""
    whole = hidden.device.type != "cpu" or hidden.dtype != table.dtype or torch.is_autocast_enabled(hidden.device.type)
    if whole or torch.compiler.is_compiling():
        return F.cross_entropy(F.linear(hidden, table, bias).float(), wanted, label_smoothing=smoothing)
    learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (hidden, table, bias))
    return _ByPieces.apply(hidden, table, bias, wanted, smoothing, learns)  # type: ignore[return-value]


class _ByPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor | None, wanted: Tensor, smoothing: float, learns: bool
    ) -> Tensor:
        M, V = len(hidden), len(table)
        rows = max(1, PIECE // V)
        scores = hidden.new_empty(min(rows, M), V)
        total = hidden.new_zeros((), dtype=torch.float64)
        of_hidden, of_table = (torch.empty_like(hidden), torch.zeros_like(table)) if learns else (None, None)
        of_bias = torch.zeros_like(bias) if learns and bias is not None else None
        for first in range(0, M, rows):
            h, right = hidden[first : first + rows], wanted[first : first + rows, None]
            s = scores[: len(h)]
            if bias is None:
                torch.mm(h, table.T, out=s)
            else:
                torch.addmm(bias, h, table.T, out=s)
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
                torch.mm(s, table, out=of_hidden[first : first + rows])
                of_table.addmm_(s.T, h)
                if of_bias is not None:
                    of_bias += s.sum(dim=0)
        ctx.save_for_backward(*(part for part in (of_hidden, of_table, of_bias) if part is not None))
        return (total / M).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = [part * gradients[0] for part in ctx.saved_tensors]
        return (*parts, *(None,) * (6 - len(parts)))
