"""Token merging: the most similar tokens become one, block by block; https://arxiv.org/abs/2210.09461.

In a block, between attention and MLP:

    q, k, v = attention.project(norm1(x), None, rotary)
    x = x + attention.out(attention_by_size(q, k, v, merged.sizes) ...)
    x, merged = merged.step(x, match(k.sum(dim=1), count, prefix))
    x = x + mlp(norm2(x))

The prefix (class token, registers) is never merged and stays in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.layers.attention import attention


@dataclass(frozen=True)
class Matching:
    """Which tokens become one: `stays[:, i]` comes to place i, and token `gone[:, j]` joins place `into[:, j]`."""

    stays: Int[Tensor, "B M"]
    gone: Int[Tensor, "B R"]
    into: Int[Tensor, "B R"]

    def place(self) -> Int[Tensor, "B N"]:
        """Where each token is afterwards."""
        B, M = self.stays.shape
        place = self.stays.new_empty(B, M + self.gone.shape[1])
        places = torch.arange(M, device=place.device).expand(B, -1)
        return place.scatter_(1, self.stays, places).scatter_(1, self.gone, self.into)


@torch.no_grad()
def match(metric: Float[Tensor, "B N D"], count: int, prefix: int = 0) -> Matching:
    """Bipartite soft matching by cosine: of the tokens at even places, the `count` that are nearest to one at an odd
    place join it; never more than half of the tokens after the prefix. Afterwards the prefix is first, then what is
    left of the even places, then the odd ones.
    """
    B, N, _ = metric.shape
    count = max(0, min(count, (N - prefix) // 2))
    index = torch.arange(N, device=metric.device)
    if count == 0:
        everything = index.expand(B, -1)
        return Matching(everything, everything[:, :0], everything[:, :0])
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first of each after the prefix
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min_(1e-12)
    nearness, partner = torch.bmm(metric[:, even::2], metric[:, odd::2].transpose(1, 2)).max(dim=-1)  # (B, A)
    order = nearness.argsort(dim=-1, descending=True)
    into = partner.gather(1, order[:, :count]).add_(prefix + order.shape[1] - count)
    order.mul_(2).add_(even)  # their places
    gone, left = order[:, :count], order[:, count:].sort(dim=-1).values
    return Matching(torch.cat((index[:prefix].expand(B, -1), left, index[odd::2].expand(B, -1)), dim=1), gone, into)


@dataclass(frozen=True)
class Merged:
    """What the M tokens are made of that are left of a sequence: how many original ones each, and how it came so."""

    sizes: Float[Tensor, "B M"]
    tokens: int  # originally
    before: Self | None = None  # and what was done to that:
    matching: Matching | None = None

    @classmethod
    def none_of(cls, x: Float[Tensor, "B N C"]) -> Self:
        """Before anything is merged."""
        B, N, _ = x.shape
        exact = torch.promote_types(x.dtype, torch.float32)
        return cls(torch.ones(B, N, dtype=exact, device=x.device), N)

    @property
    def started(self) -> bool:
        return self.before is not None

    # made only where they are asked for: a summary by a class token needs neither

    @cached_property
    def origin(self) -> Int[Tensor, "B N"]:
        """Of each original token: in which one it is now."""
        if self.before is None or self.matching is None:
            return torch.arange(self.tokens, device=self.sizes.device).expand(len(self.sizes), -1)
        return self.matching.place().gather(1, self.before.origin)

    @cached_property
    def anchor(self) -> Int[Tensor, "B M"]:
        """The original token that lends each its position."""
        if self.before is None or self.matching is None:
            return self.origin
        return self.before.anchor.gather(1, self.matching.stays)

    def step(self, x: Float[Tensor, "B M C"], matching: Matching) -> tuple[Float[Tensor, "B L C"], Self]:
        """Tokens that become one are averaged by their sizes."""
        if matching.gone.shape[1] == 0:
            return x, self
        of_stays, of_gone = self.sizes.gather(1, matching.stays), self.sizes.gather(1, matching.gone)
        sizes = of_stays.scatter_add(1, matching.into, of_gone)
        x = merge_rows(x, matching, of_stays / sizes, of_gone / sizes.gather(1, matching.into))
        return x, type(self)(sizes, self.tokens, self, matching)

    def unmerge(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B N C"]:
        """Each original token gets the value of the one that it is in: for dense maps."""
        return _rows(x, self.origin)

    def rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Tables (N, D) of original tokens -> (B, 1, M, D): a merged token turns by its anchor's position."""
        cos, sin = (table[self.anchor][:, None] for table in rotary)
        return cos, sin

    def spread(self, weights: Float[Tensor, "B H M M"]) -> Float[Tensor, "B H N N"]:
        """Attention weights between original tokens: those in one token share its row and divide its column."""
        B, H, M, _ = weights.shape
        shares = (weights / self.sizes[:, None, None, :].to(weights.dtype)).transpose(2, 3).flatten(0, 1)
        index = self.origin.repeat_interleave(H, dim=0)
        columns = _rows(shares, index).transpose(1, 2)  # (B H, M, N)
        return _rows(columns, index).unflatten(0, (B, H))


def merge_rows(
    x: Float[Tensor, "B N C"], matching: Matching, of_stays: Float[Tensor, "B M"], of_gone: Float[Tensor, "B R"]
) -> Float[Tensor, "B M C"]:
    """Sums of the tokens that become one, each times its share. No gradient goes to the shares."""
    M, N = matching.stays.shape[1], x.shape[1]
    stays, gone, into = _flat(matching.stays, N), _flat(matching.gone, N), _flat(matching.into, M)
    of_stays, of_gone = of_stays.to(x.dtype).reshape(-1, 1), of_gone.to(x.dtype).reshape(-1, 1)
    given = (x.flatten(0, 1), of_stays, of_gone, stays, gone, into)
    merged = _MergeRows.apply(*given) if x.requires_grad and torch.is_grad_enabled() else _merge_rows(*given)
    return merged.unflatten(0, (-1, M))


def _merge_rows(x: Tensor, of_stays: Tensor, of_gone: Tensor, stays: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    return x.index_select(0, stays).mul_(of_stays).index_add_(0, into, x.index_select(0, gone).mul_(of_gone))


class _MergeRows(torch.autograd.Function):
    """Each row goes to one place, so the gradient is a gather; autograd's own sums into rows, twice as slow."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, of_stays: Tensor, of_gone: Tensor, stays: Tensor, gone: Tensor, into: Tensor
    ) -> Tensor:
        ctx.save_for_backward(of_stays, of_gone, stays, gone, into)
        return _merge_rows(x, of_stays, of_gone, stays, gone, into)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_stays, of_gone, stays, gone, into = ctx.saved_tensors
        place, share = stays.new_empty(len(stays) + len(gone)), of_stays.new_empty(len(stays) + len(gone), 1)
        place[stays], place[gone] = torch.arange(len(stays), device=place.device), into
        share[stays], share[gone] = of_stays, of_gone
        return gradients[0].index_select(0, place).mul_(share), None, None, None, None, None


def attention_by_size(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H M D"], v: Float[Tensor, "B H M E"], sizes: Float[Tensor, "B M"]
) -> Float[Tensor, "B H N E"]:
    """Proportional attention: a key that stands for s tokens counts s times, by log s on its scores."""
    # one row for all queries and heads, which the fused kernel adds almost for nothing
    return attention(q, k, v, bias=log_sizes(sizes, q.dtype))


def log_sizes(sizes: Float[Tensor, "B M"], dtype: torch.dtype) -> Float[Tensor, "B 1 1 M"]:
    """What proportional attention adds to the scores of the keys."""
    return sizes.log()[:, None, None].to(dtype)


def _flat(index: Int[Tensor, "B M"], rows: int) -> Int[Tensor, " BM"]:
    """Of rows of each sample to rows of all samples in a line."""
    if len(index) == 1:
        return index[0]
    return (index + torch.arange(len(index), device=index.device)[:, None] * rows).flatten()


def _rows(x: Float[Tensor, "B M C"], index: Int[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
    B, M, C = x.shape
    return x.reshape(B * M, C).index_select(0, _flat(index, M)).view(B, -1, C)
