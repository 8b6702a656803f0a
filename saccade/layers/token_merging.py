"""Token merging: the most similar tokens become one, block by block; https://arxiv.org/abs/2210.09461.

In a block, between attention and MLP:

    q, k, v = attention.project(norm1(x), None, rotary)
    x = x + attention.out(attention_by_size(q, k, v, merged.sizes) ...)
    x, merged = merged.step(x, match(k.mean(dim=1), count, prefix))
    x = x + mlp(norm2(x))

The prefix (class token, registers) is never merged and stays in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

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
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first of each after the prefix
    metric = F.normalize(metric[:, prefix:], dim=-1)
    a, b = metric[:, even - prefix :: 2], metric[:, odd - prefix :: 2]
    if count == 0:
        everything = torch.arange(N, device=metric.device).expand(B, -1)
        return Matching(everything, everything[:, :0], everything[:, :0])
    nearness, partner = (a @ b.transpose(1, 2)).max(dim=-1)  # (B, A)
    order = nearness.argsort(dim=-1, descending=True)
    gone, left = order[:, :count], order[:, count:].sort(dim=-1).values
    front, of_odd = (torch.arange(n, device=metric.device).expand(B, -1) for n in (prefix, b.shape[1]))
    stays = torch.cat((front, left * 2 + even, of_odd * 2 + odd), dim=1)
    return Matching(stays, gone * 2 + even, partner.gather(1, gone) + prefix + left.shape[1])


@dataclass(frozen=True)
class Merged:
    """What the tokens of a sequence are made of: `sizes` counts the original tokens in each of the M that are left,
    `origin` says for each of the N original ones in which it is now, `anchor` which of them lends it its position.
    """

    sizes: Float[Tensor, "B M"]
    origin: Int[Tensor, "B N"]
    anchor: Int[Tensor, "B M"]

    @classmethod
    def none_of(cls, x: Float[Tensor, "B N C"]) -> Self:
        """Before anything is merged."""
        B, N, _ = x.shape
        index = torch.arange(N, device=x.device).expand(B, -1)
        exact = torch.promote_types(x.dtype, torch.float32)
        return cls(torch.ones(B, N, dtype=exact, device=x.device), index, index)

    @property
    def started(self) -> bool:
        return self.sizes.shape[1] < self.origin.shape[1]

    def step(self, x: Float[Tensor, "B M C"], matching: Matching) -> tuple[Float[Tensor, "B L C"], Self]:
        """Tokens that become one are averaged by their sizes."""
        if matching.gone.shape[1] == 0:
            return x, self
        stays, gone, into = matching.stays, matching.gone, matching.into
        joining = self.sizes.gather(1, gone)
        staying = self.sizes.gather(1, stays)
        sizes = staying.scatter_add(1, into, joining)
        x = merge_rows(x, matching, staying / sizes, joining / sizes.gather(1, into))
        return x, type(self)(sizes, matching.place().gather(1, self.origin), self.anchor.gather(1, stays))

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
    x: Float[Tensor, "B N C"],
    matching: Matching,
    staying: Float[Tensor, "B M"],
    joining: Float[Tensor, "B R"],
) -> Float[Tensor, "B M C"]:
    """Sums of the tokens that become one, weighted by `staying` and `joining`."""
    B, N, C = x.shape
    M = matching.stays.shape[1]
    flat = x.flatten(0, 1)
    merged = flat.index_select(0, _flat(matching.stays, N)) * staying.to(x.dtype).reshape(-1, 1)
    added = flat.index_select(0, _flat(matching.gone, N)) * joining.to(x.dtype).reshape(-1, 1)
    return merged.index_add_(0, _flat(matching.into, M), added).view(B, M, C)


def attention_by_size(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M E"],
    sizes: Float[Tensor, "B M"],
) -> Float[Tensor, "B H N E"]:
    """Proportional attention: a key that stands for s tokens counts s times."""
    return attention(q, k, v, bias=sizes.log()[:, None, None].to(q.dtype))


def _flat(index: Int[Tensor, "B M"], rows: int) -> Int[Tensor, " BM"]:
    """Of rows of each sample to rows of all samples in a line."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * rows).flatten()


def _rows(x: Float[Tensor, "B M C"], index: Int[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
    B, M, C = x.shape
    return x.reshape(B * M, C).index_select(0, _flat(index, M)).view(B, -1, C)
