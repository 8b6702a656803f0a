"""Exact attention to a chosen few: the tokens of the same window, or those of the same hash."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.attention import attention, rotate
from saccade.layers.mixing import EfficientAttention, Layout, Rotary


class WindowAttention(EfficientAttention):
    """Each token attends to the tokens of its window and to the prefix; the prefix attends to all tokens.

    Windows as in https://arxiv.org/abs/2103.14030, without shifts: windows exchange nothing but through the prefix. A
    side that is no multiple of `window` is cut into windows whose lengths differ by one at most, none above `window`,
    so there is neither padding nor a mask, and a window that covers the grid gives exact attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        window: int | tuple[int, int] = 7,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        self.window = (window, window) if isinstance(window, int) else window

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        p = layout.prefix
        of_prefix = [attention(q[:, :, :p], k, v)] if p else []
        if q.shape[2] == p:  # the prefix alone was asked for, with all tokens as context
            return of_prefix[0]
        if q.shape[2] != k.shape[2]:
            raise ValueError("WindowAttention: with a context, the queries can only be the prefix tokens")
        prefix_k, prefix_v = k[:, :, :p], v[:, :, :p]
        grids = [x[:, :, p:].unflatten(2, layout.grid) for x in (q, k, v)]  # (B, H, h, w, D)
        bands = [even_bands(size, window) for size, window in zip(layout.grid, self.window, strict=True)]
        rows = []
        for top, height, count_down in bands[0]:
            row = []
            for left, width, count_across in bands[1]:
                area = [x[:, :, top : top + height * count_down, left : left + width * count_across] for x in grids]
                cut = [to_windows(x, height, width) for x in area]
                if p:
                    cut[1] = _with_prefix(prefix_k, cut[1])
                    cut[2] = _with_prefix(prefix_v, cut[2])
                row.append(from_windows(attention(*cut), len(q), count_down, count_across, height))
            rows.append(torch.cat(row, dim=3) if len(row) > 1 else row[0])
        patches = (torch.cat(rows, dim=2) if len(rows) > 1 else rows[0]).flatten(2, 3)
        return torch.cat((*of_prefix, patches), dim=2) if p else patches


def even_bands(size: int, window: int) -> list[tuple[int, int, int]]:
    """(start, length, count) of one or two runs of equal windows, as few as possible with none over `window` long."""
    count = -(-size // window)
    length, longer = divmod(size, count)
    bands = [(0, length + 1, longer), (longer * (length + 1), length, count - longer)]
    return [band for band in bands if band[2]]


def to_windows(x: Float[Tensor, "B H h w D"], height: int, width: int) -> Float[Tensor, "W H n D"]:
    """Windows beside one another in the batch: W = B h/height w/width, n = height width."""
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, H, down, height, across, width, D)
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def from_windows(
    x: Float[Tensor, "W H n D"], batch: int, down: int, across: int, height: int
) -> Float[Tensor, "B H h w D"]:
    x = x.unflatten(2, (height, -1)).unflatten(0, (batch, down, across))  # (B, down, across, H, height, width, D)
    return x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


def _with_prefix(prefix: Float[Tensor, "B H p D"], windows: Float[Tensor, "W H n D"]) -> Float[Tensor, "W H m D"]:
    return torch.cat((prefix.repeat_interleave(len(windows) // len(prefix), dim=0), windows), dim=2)


NOT_ITSELF = -5e4  # added to a token's score for itself, so that it attends to itself only where nothing else is left


class LSHAttention(EfficientAttention):
    """Reformer: each token attends to those that its hash sorts near it, https://arxiv.org/abs/2001.04451.

    Queries and keys are one (keys at unit length), so the packed projection is two widths wide, not three. In each of
    `rounds` rounds tokens are sorted by hash and cut into chunks of `chunk`, which attend to themselves and to the
    chunk before; the rounds count by the sum of their scores' exponentials, a key that is met twice counting twice. One
    chunk for all tokens gives exact attention with shared queries and keys. Prefix tokens are keys of every chunk and
    attend to all tokens.

    Hashes are drawn from `seed`, the same in every call. Where the paper splits a large hash into two factors, here it
    is split into factors of at most 16 buckets, so that hashing N tokens takes N log N. Since the bias of keys is that
    of queries, `key_bias` is not looked at.
    """

    independent_queries = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        chunk: int = 64,
        rounds: int = 4,
        seed: int = 0,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        self.qkv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.chunk = chunk
        self.rounds = rounds
        self.seed = seed

    def project(self, x: Tensor, context: Tensor | None, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q, v = self.qkv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q if rotary is None else rotate(q, rotary)
        return q, F.normalize(q, dim=-1), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        p = layout.prefix
        prefix_kv = (k[:, :, :p], v[:, :, :p])
        patches = q[:, :, p:], k[:, :, p:], v[:, :, p:]
        one_chunk = q.shape[2] - p <= self.chunk
        mixed = _attend_to_others(*patches, *prefix_kv)[0] if one_chunk else self._by_hash(*patches, *prefix_kv)
        if not p:
            return mixed
        not_itself = torch.zeros(p, q.shape[2], dtype=q.dtype, device=q.device).fill_diagonal_(NOT_ITSELF)
        return torch.cat((attention(q[:, :, :p], k, v, bias=not_itself), mixed), dim=2)

    def _by_hash(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        N, R, c = q.shape[2], self.rounds, self.chunk
        missing = -N % c
        padded = [F.pad(x, (0, 0, 0, missing)) for x in (q, k, v)] if missing else [q, k, v]
        hashes = lsh(q.detach(), -(-N // c), R, self.seed)  # (B, H, R, N)
        order = F.pad(hashes, (0, missing), value=2**62).argsort(dim=-1, stable=True)  # what fills up comes last
        places = torch.arange(N + missing, device=q.device).expand_as(order)
        inverse = torch.empty_like(order).scatter_(-1, order, places)

        q, k, v = (_Reorder.apply(x, order, inverse).unflatten(3, (-1, c)) for x in padded)  # (B, H, R, n, c, D)
        k, v = (torch.cat((x.roll(1, dims=3), x), dim=4) for x in (k, v))  # (B, H, R, n, 2 c, D)
        absent = None
        if missing:
            is_absent = (order >= N).unflatten(3, (-1, c))
            absent = torch.cat((is_absent.roll(1, dims=3), is_absent), dim=4)  # (B, H, R, n, 2 c)
        mixed, logs = _attend_to_others(q, k, v, prefix_k[:, :, None, None], prefix_v[:, :, None, None], absent)

        order, inverse = (x.flatten(1, 2)[:, :, None] for x in (order, inverse))  # a round beside another, as heads
        mixed = _Reorder.apply(mixed.flatten(3, 4).flatten(1, 2), inverse, order)  # (B, H R, 1, N, E)
        logs = _Reorder.apply(logs.flatten(3, 4).flatten(1, 2), inverse, order)  # (B, H R, 1, N, 1)
        mixed, logs = (x.squeeze(2).unflatten(1, (-1, R)) for x in (mixed, logs))  # (B, H, R, N, E)
        return (logs.softmax(dim=2) * mixed).sum(dim=2)[:, :, :N]


def _attend_to_others(
    q: Float[Tensor, "*batch n D"],
    k: Float[Tensor, "*batch m D"],
    v: Float[Tensor, "*batch m E"],
    prefix_k: Tensor,
    prefix_v: Tensor,
    absent: Tensor | None = None,
) -> tuple[Float[Tensor, "*batch n E"], Float[Tensor, "*batch n 1"]]:
    """Attention, and the logarithm of the sum of the scores' exponentials. The last n keys are the queries themselves.

    `absent` (*batch, m) marks keys that are only there to fill a chunk.
    """
    n, m = q.shape[-2], k.shape[-2]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (*batch, n, m)
    scores = scores + torch.zeros(n, m, dtype=q.dtype, device=q.device).fill_diagonal_(NOT_ITSELF).roll(m - n, dims=1)
    if absent is not None:
        scores = scores.masked_fill(absent[..., None, :], -torch.inf)
    if prefix_k.shape[-2]:
        prefix_scores = (q * q.shape[-1] ** -0.5) @ prefix_k.transpose(-2, -1)
        scores = torch.cat((prefix_scores, scores), dim=-1)
        v = torch.cat((prefix_v.expand(*v.shape[:-2], -1, -1), v), dim=-2)
    logs = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - logs).exp() @ v, logs


def lsh(x: Float[Tensor, "B H N D"], buckets: int, rounds: int, seed: int) -> Int[Tensor, "B H R N"]:
    """Hashes under 2^n, the next power of two from `buckets`: near directions are likely to fall together.

    Each factor is the index of the largest of [x w, -x w] for random directions w: https://arxiv.org/abs/1509.02897.
    """
    bits = max(1, (buckets - 1).bit_length())
    widths = [4] * (bits // 4) + ([bits % 4] if bits % 4 else [])  # bits of each factor
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    hashes = torch.zeros(*x.shape[:3], rounds, dtype=torch.int64, device=x.device)
    for width in widths:
        directions = torch.randn(x.shape[-1], rounds * 2 ** (width - 1), generator=generator).to(x)
        with torch.autocast(x.device.type, enabled=False):  # lower precision would tie many of the largest
            along = (x @ directions).unflatten(-1, (rounds, -1))  # (B, H, N, R, 2^width / 2)
        hashes = hashes * 2**width + torch.cat((along, -along), dim=-1).argmax(dim=-1)
    return hashes.transpose(2, 3)


class _Reorder(torch.autograd.Function):
    """(B, H, N, D) by R orders (B, H, R, N) to (B, H, R, N, D). Its gradient is the inverse order, no scattered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        by_round = gradients[0].flatten(1, 2)  # (B, H R, N, D)
        undone = _take(by_round, inverse.flatten(1, 2)[:, :, None]).squeeze(2)
        return undone.unflatten(1, inverse.shape[1:3]).sum(dim=2), None, None


def _take(x: Float[Tensor, "B H N D"], order: Int[Tensor, "B H R N"]) -> Float[Tensor, "B H R N D"]:
    B, H, N, D = x.shape
    first = torch.arange(B * H, device=x.device).mul_(N).view(B, H, 1, 1)
    return x.reshape(B * H * N, D).index_select(0, (order + first).flatten()).view(*order.shape, D)
