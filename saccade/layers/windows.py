"""Windows of tokens: how a grid is cut, shifted and padded, and attention inside windows.

https://arxiv.org/abs/2103.14030 (learned position bias), https://arxiv.org/abs/2111.09883 (continuous position bias).

The usual way rolls, pads, cuts, mends, crops and rolls back around every attention: six copies. Here the tokens of a
batch are a matrix with a row per token, an order of its rows is a `Layout`, and going from one order to any other is
one gather. All else in a block looks at single tokens or inside one window, so a block needs one gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.attention import attention

Pair = tuple[int, int]
MASKED = -100.0  # as the authors: weights are trained with it, so it is not minus infinity


@dataclass(frozen=True, eq=False)
class Layout:
    """An order of the tokens of a batch, in windows of `length` slots. Tokens count row by row, picture by picture."""

    batch: int
    grid: Pair
    length: int  # slots in a window; of the plain order: one window is a picture
    token_of: Int[Tensor, " S"]  # the token in a slot; -1: padding
    slot_of: Int[Tensor, " T"]  # where a token is
    padding: Tensor | None = None  # slots without a token
    patterns: tuple[Tensor | None, ...] = (None,)  # (length, length) or None: who sees whom inside a kind of windows
    counts: tuple[int, ...] = ()  # windows of each kind; kinds follow each other
    _masks: dict[Pair, Tensor | None] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        return len(self.token_of) // self.length

    def kinds(self) -> list[Pair]:
        """The windows of each kind: from, to."""
        ends = [sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def mask(self, start: int, end: int) -> Tensor | None:
        """What is added to the scores of windows start..end: (1 or end - start, length, length), None: nothing."""
        if (start, end) not in self._masks:
            with torch.inference_mode(False):
                self._masks[start, end] = self._build_mask(start, end)
        return self._masks[start, end]

    def _build_mask(self, start: int, end: int) -> Tensor | None:
        inside = [(max(start, a), min(end, b), p) for (a, b), p in zip(self.kinds(), self.patterns, strict=True)]
        inside = [(a, b, pattern) for a, b, pattern in inside if a < b]
        if all(pattern is None for _, _, pattern in inside):
            return None
        nothing = torch.zeros(self.length, self.length, device=self.token_of.device)
        parts = [(nothing if pattern is None else pattern)[None] for _, _, pattern in inside]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.expand(b - a, -1, -1) for part, (a, b, _) in zip(parts, inside, strict=True)])


class Tokens(NamedTuple):
    x: Float[Tensor, "S C"]
    layout: Layout

    def arranged(self, layout: Layout) -> Tokens:
        """The same tokens in another order; slots of padding are zeros."""
        if layout is self.layout:
            return self
        return Tokens(_Gather.apply(self.x, route(self.layout, layout)), layout)  # type: ignore[arg-type]

    def rows(self) -> Float[Tensor, "B h w C"]:
        layout = self.layout
        plain = self.arranged(plain_layout(layout.batch, layout.grid, layout.token_of.device))
        return plain.x.view(layout.batch, *layout.grid, -1)

    def mean(self) -> Float[Tensor, "B C"]:
        """Over each picture."""
        B, length = self.layout.batch, self.layout.length
        if self.layout.padding is not None:
            return self.rows().mean(dim=(1, 2))
        return self.x.view(-1, B, length, self.x.shape[-1]).mean(dim=(0, 2))


P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Results are made once for each set of arguments, outside of what is compiled."""
    return cast(Callable[P, T], torch.compiler.disable(lru_cache(maxsize=256)(function)))


# Orders and routes are the same for every batch of one shape, so they are made once. They must never be inference
# tensors, which could not be used in training later; nor may a compiler's stand-ins get into the cache.


@kept
def plain_layout(batch: int, grid: Pair, device: torch.device) -> Layout:
    """Row by row, picture by picture."""
    with torch.inference_mode(False):
        tokens = torch.arange(batch * grid[0] * grid[1], device=device)
        length = grid[0] * grid[1]
        return Layout(batch, grid, length, tokens, tokens, counts=(batch,))


@kept
def window_layout(batch: int, grid: Pair, window: int, shift: Pair, *, pad_first: bool, device: torch.device) -> Layout:
    """Windows one after the other, those with the same mask together; each for all pictures, then the next one.

    Where the grid is no multiple of the window, zeros are appended, before the shift or after it.
    """
    with torch.inference_mode(False), torch.device("cpu"):  # also while a model without memory is counted
        axes = [_axis(n, window, s, pad_first) for n, s in zip(grid, shift, strict=True)]
        (rows, row_zone), (columns, column_zone) = axes
        tokens = rows[:, None] * grid[1] + columns
        tokens = tokens.masked_fill((rows < 0)[:, None] | (columns < 0), -1)
        zones = 3 * row_zone[:, None] + column_zone
        tokens, zones = _cut(tokens, window), _cut(zones, window)  # (nW, N)
        zones = zones - zones.amin(dim=1, keepdim=True)
        kinds, kind_of, counts = zones.unique(dim=0, return_inverse=True, return_counts=True)  # all-zero comes first
        tokens = tokens[kind_of.argsort(stable=True)]
        first = torch.arange(batch)[:, None] * grid[0] * grid[1]  # of each picture
        tokens = torch.where(tokens[:, None] < 0, -1, tokens[:, None] + first).flatten()  # (nW * B * N)
        slots = torch.arange(len(tokens))
        full = tokens >= 0
        slot_of = torch.empty(batch * grid[0] * grid[1], dtype=torch.long)
        slot_of[tokens[full]] = slots[full]
        apart = (kinds[:, :, None] != kinds[:, None]).float() * MASKED
        return Layout(
            batch,
            grid,
            window**2,
            tokens.to(device),
            slot_of.to(device),
            None if bool(full.all()) else slots[~full].to(device),
            tuple(mask.to(device) if bool(mask.any()) else None for mask in apart),
            tuple(count * batch for count in counts.tolist()),
        )


def _axis(size: int, window: int, shift: int, pad_first: bool) -> tuple[Tensor, Tensor]:
    """Per place along an axis: where its token comes from (-1: padding), and which of up to three zones it is in."""
    padded = math.ceil(size / window) * window
    places = torch.arange(padded)
    if pad_first:
        source = (places + shift) % padded
        source = source.masked_fill(source >= size, -1)
    else:
        source = ((places + shift) % size).masked_fill(places >= size, -1)
    zone = (places >= padded - window).long() + (places >= padded - shift) if shift else torch.zeros_like(places)
    return source, zone


def _cut(x: Int[Tensor, "h w"], window: int) -> Int[Tensor, "nW N"]:
    h, w = x.shape
    return x.view(h // window, window, w // window, window).transpose(1, 2).reshape(-1, window**2)


@dataclass(frozen=True, eq=False)
class Route:
    """From one order to another: for each new slot the old one, and back. Empty slots become zeros."""

    there: Int[Tensor, " S"]
    empty: Tensor | None
    back: Int[Tensor, " R"]
    empty_back: Tensor | None


@kept
def route(old: Layout, new: Layout) -> Route:
    with torch.inference_mode(False):
        there = old.slot_of[new.token_of.clamp(min=0)]
        back = new.slot_of[old.token_of.clamp(min=0)]
        return Route(there, new.padding, back, old.padding)


@kept
def merge_route(old: Layout, new: Layout) -> Route:
    """To groups of 2x2 neighbours, down the columns first, in the order of a grid of half the size."""
    with torch.inference_mode(False):
        (H, W), (h, w) = old.grid, new.grid
        token = new.token_of
        picture, row, column = token // (h * w), token // w % h, token % w
        corner = torch.arange(4, device=token.device)
        rows = 2 * row[:, None] + corner % 2
        columns = 2 * column[:, None] + corner // 2
        outside = ((rows >= H) | (columns >= W) | (token < 0)[:, None]).flatten()
        tokens = (picture[:, None] * H + rows) * W + columns
        there = old.slot_of[tokens.flatten().masked_fill(outside, 0)]
        full = (~outside).nonzero()[:, 0]
        back = torch.zeros(len(old.token_of), dtype=torch.long, device=token.device)
        back[there[full]] = full
        return Route(there, outside.nonzero()[:, 0] if bool(outside.any()) else None, back, old.padding)


class _Gather(torch.autograd.Function):
    """Rows by number. Since every token has one place, the gradient is a gather, too, and no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Route) -> Tensor:
        ctx.way = way
        return _pick(x, way.there, way.empty)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _pick(gradient, ctx.way.back, ctx.way.empty_back), None


def _pick(x: Tensor, rows: Tensor, empty: Tensor | None) -> Tensor:
    picked = x.index_select(0, rows)
    return picked if empty is None else picked.index_fill_(0, empty, 0)


def merged(tokens: Tokens, new: Layout) -> Float[Tensor, "S 4C"]:
    """Each 2x2 neighbours side by side, in the order of a layout of half the grid. Odd edges are filled with zeros."""
    x = _Gather.apply(tokens.x, merge_route(tokens.layout, new))
    return x.view(len(new.token_of), -1)  # type: ignore[union-attr]


class RelativeBias(nn.Module):
    """A learned number per head and offset between two places of a window."""

    def __init__(self, window: int, heads: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Float[Tensor, "H N N"]:
        # As an embedding: its gradient is much faster than that of indexing.
        return F.embedding(offsets(self.window, self.table.device), self.table).permute(2, 0, 1).contiguous()


class ContinuousBias(nn.Module):
    """A small network from log-spaced offsets to a number per head: the same weights for any window.

    With `trained_window`, offsets are measured in units of the window that the weights were trained with.
    """

    def __init__(self, window: int, heads: int, trained_window: int | None = None, hidden: int = 512):
        super().__init__()
        self.window = window
        self.unit = max(1, (trained_window or window) - 1)
        self.up = nn.Linear(2, hidden)
        self.down = nn.Linear(hidden, heads, bias=False)

    def forward(self) -> Float[Tensor, "H N N"]:
        places = log_offsets(self.window, self.unit, self.up.weight.device).to(self.up.weight.dtype)
        table = 16 * self.down(F.relu(self.up(places))).sigmoid()
        return F.embedding(offsets(self.window, table.device), table).permute(2, 0, 1).contiguous()


@kept
def offsets(window: int, device: torch.device) -> Int[Tensor, "N N"]:
    """For each pair of places of a window, the number of their offset."""
    with torch.inference_mode(False):
        places = torch.arange(window)
        rows, columns = places.repeat_interleave(window), places.repeat(window)
        down = rows[:, None] - rows + window - 1
        right = columns[:, None] - columns + window - 1
        return (down * (2 * window - 1) + right).to(device)


@kept
def log_offsets(window: int, unit: int, device: torch.device) -> Float[Tensor, "O 2"]:
    """Every offset in a window as sign * log2(1 + 8 |offset| / unit) / 3; in float32, as trained weights know it."""
    with torch.inference_mode(False):
        steps = torch.arange(1 - window, window, dtype=torch.float32) / unit * 8
        steps = steps.sign() * torch.log2(steps.abs() + 1.0) / 3.0
        return torch.cartesian_prod(steps, steps).to(device)


def resize_bias_table(table: Float[Tensor, "O H"], window: int) -> Float[Tensor, "P H"]:
    """A learned table of offsets for another window, interpolated (bicubic)."""
    old, new = math.isqrt(len(table)), 2 * window - 1
    if old * old != len(table) or old % 2 == 0:
        raise ValueError(f"a bias table of {len(table)} offsets belongs to no square window")
    if old == new:
        return table
    image = table.float().T.unflatten(1, (old, old))[None]
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.contiguous().to(table.dtype)


def window_attention(
    qkv: Float[Tensor, "M N 3C"], bias: Float[Tensor, "H N N"], mask: Tensor | None, scale: float
) -> Float[Tensor, "M N C"]:
    """Attention inside each of M windows: softmax(scale q k^T + bias + mask) v. `mask` is (1 or M, N, N)."""
    M, N, _ = qkv.shape
    bias = bias.to(qkv.dtype)
    learns = torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)
    if learns and qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return _WindowAttention.apply(qkv, bias, mask, scale)  # type: ignore[return-value]
    q, k, v = qkv.view(M, N, 3, len(bias), -1).permute(2, 0, 3, 1, 4).unbind(0)  # (M, H, N, D)
    change = scale * math.sqrt(q.shape[-1])
    both = bias[None] if mask is None else bias + mask[:, None].to(bias.dtype)
    return attention(q if change == 1.0 else q * change, k, v, bias=both).transpose(1, 2).reshape(M, N, -1)


class _WindowAttention(torch.autograd.Function):
    """By products, for learning on processors: PyTorch's fused kernel gives no gradient of the bias there."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        (M, N, _), H = qkv.shape, len(bias)
        q, k, v = packed = qkv.view(M, N, 3, H, -1).permute(2, 0, 3, 1, 4).reshape(3, M * H, N, -1)
        scores = q.new_empty(M * H, N, N)
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        scores.view(M, H, N, N).add_(bias if mask is None else bias + mask[:, None].to(bias.dtype))
        shares = scores.softmax(dim=-1)
        if mask is not None:  # exp(-100) is below the normal numbers, with which processors are ten times slower
            shares = torch.threshold_(shares, torch.finfo(shares.dtype).tiny, 0.0)
        ctx.save_for_backward(packed, shares)
        ctx.scale, ctx.heads = scale, H
        return torch.bmm(shares, v).view(M, H, N, -1).transpose(1, 2).reshape(M, N, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        packed, shares = ctx.saved_tensors
        q, k, v = packed
        H, (MH, N, D) = ctx.heads, q.shape
        upstream = gradient.view(-1, N, H, D).transpose(1, 2).reshape(MH, N, D)
        of_shares = torch.bmm(upstream, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_packed = torch.empty_like(packed)
        torch.baddbmm(of_packed[0], of_scores, k, beta=0, alpha=ctx.scale, out=of_packed[0])
        torch.baddbmm(of_packed[1], of_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=of_packed[1])
        torch.bmm(shares.transpose(1, 2), upstream, out=of_packed[2])
        of_qkv = of_packed.view(3, -1, H, N, D).permute(1, 3, 0, 2, 4).reshape(-1, N, 3 * H * D)
        return of_qkv, of_scores.view(-1, H, N, N).sum(dim=0), None, None
