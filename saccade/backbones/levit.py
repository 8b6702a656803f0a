"""LeViT, a Transformer that halves its map as it goes, after a stem of convolutions: https://arxiv.org/abs/2104.01136."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Backbone, Row
from saccade.backbones.features import Features
from saccade.layers.attention import attention
from saccade.layers.convolution import ConvNorm
from saccade.layers.encoder import drop_path

STEM = 16  # pixels a side that become one token
VALUES, VALUES_HALVING = 2, 4  # width of a value, in widths of a key
EXPANSION = 2  # of the feed-forward networks


@dataclass(frozen=True, kw_only=True)
class LeViTConfig(Row):
    """A stage's `dims`, `depths` and `heads`; `image_size` is also the grid of the learned attention biases.

    `summaries` is how many normalised copies of the mean make the summary: one for every classifier that was trained
    on it (two with distillation), none for the bare mean.
    """

    family: ClassVar[str] = "levit"
    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    heads: tuple[int, int, int]
    key_dim: int
    summaries: int = 2
    drop_path: float = 0.0

    @property
    def stride(self) -> int:
        return 2 * STEM  # the last stage takes odd grids, too

    @property
    def about(self) -> str:
        return f"conv stem, {'-'.join(map(str, self.depths))} blocks, {'-'.join(map(str, self.dims))} channels"


def _row(
    dims: tuple[int, int, int], depths: tuple[int, int, int], heads: tuple[int, int, int], key: int
) -> LeViTConfig:
    return LeViTConfig(dims=dims, depths=depths, heads=heads, key_dim=key)


LEVIT = {
    "levit_128s": _row((128, 256, 384), (2, 3, 4), (4, 6, 8), 16),
    "levit_128": _row((128, 256, 384), (4, 4, 4), (4, 8, 12), 16),
    "levit_192": _row((192, 288, 384), (4, 4, 4), (3, 5, 6), 32),
    "levit_256": _row((256, 384, 512), (4, 4, 4), (4, 6, 8), 32),
    "levit_384": _row((384, 512, 768), (4, 4, 4), (6, 9, 12), 32),
}


class OffsetBias(nn.Module):
    """A learned bias per head for every distance in rows and columns, whichever the direction.

    At another grid than the learned one the table is interpolated from end to end; the reference takes no other grid.
    """

    def __init__(self, heads: int, grid: tuple[int, int], stride: int):
        super().__init__()
        self.stride = stride  # of queries
        self.table = nn.Parameter(torch.zeros(heads, *grid))

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "1 H Q N"]:
        table = _resized(self.table, grid)
        return table.flatten(1)[None, :, _distances(grid, self.stride, table.device)]


def _resized(table: Float[Tensor, "H a b"], grid: tuple[int, int]) -> Float[Tensor, "H c d"]:
    if grid == tuple(table.shape[1:]):
        return table
    return F.interpolate(table[None], size=grid, mode="bilinear", align_corners=True)[0]


@lru_cache(maxsize=64)
def _distances(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """(Q, N): where in a flat table of distances the one between a query and a key is."""
    with torch.inference_mode(False):  # it is kept, perhaps for training
        rows, columns = (torch.arange(n, device=device) for n in grid)
        down = (rows[::stride, None] - rows).abs()  # (q, h)
        across = (columns[::stride, None] - columns).abs()  # (p, w)
        return (down[:, None, :, None] * grid[1] + across[None, :, None, :]).flatten(2).flatten(0, 1)


class Attention(nn.Module):
    """Attention with narrow keys, wide values, biases by distance and hard-swish before the last projection.

    With a stride, only every second token of every second row asks, and the map becomes as small.
    """

    def __init__(
        self, channels: int, out_channels: int, heads: int, key_dim: int, *, grid: tuple[int, int], stride: int = 1
    ):
        super().__init__()
        self.heads = heads
        self.key_dim, self.value_dim = key_dim, key_dim * (VALUES if stride == 1 else VALUES_HALVING)
        self.stride = stride
        if stride == 1:
            self.qkv = ConvNorm(channels, heads * (2 * key_dim + self.value_dim), 1)
        else:
            self.q = ConvNorm(channels, heads * key_dim, 1)
            self.kv = ConvNorm(channels, heads * (key_dim + self.value_dim), 1)
        self.bias = OffsetBias(heads, grid, stride)
        self.out = ConvNorm(heads * self.value_dim, out_channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        grid = (x.shape[2], x.shape[3])
        if self.stride == 1:
            q, k, v = self._by_head(self.qkv(x)).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        else:
            q = self._by_head(self.q(x[:, :, :: self.stride, :: self.stride]))
            k, v = self._by_head(self.kv(x)).split((self.key_dim, self.value_dim), dim=-1)
        mixed = attention(q, k, v, bias=self.bias(grid).to(q.dtype)).transpose(1, 2).flatten(2)  # (B, Q, C)
        smaller = [-(-n // self.stride) for n in grid]
        return self.out(F.hardswish(mixed).transpose(1, 2).unflatten(2, smaller))

    def _by_head(self, x: Tensor) -> Float[Tensor, "B H N D"]:
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)


class LeViTBlock(nn.Module):
    """Attention and a feed-forward network. One that halves the map has no shortcut around its attention."""

    def __init__(self, attention: Attention, channels: int, drop_path: float):
        super().__init__()
        self.attention = attention
        self.up = ConvNorm(channels, EXPANSION * channels, 1, activation=F.hardswish)
        self.down = ConvNorm(EXPANSION * channels, channels, 1)
        self.drop_path = drop_path
        zeroed = [self.down.norm, attention.out.norm] if attention.stride == 1 else [self.down.norm]
        for norm in zeroed:  # a block begins as nothing, as published
            nn.init.zeros_(norm.weight)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        mixed = self.attention(x)
        x = mixed if self.attention.stride > 1 else x + drop_path(mixed, self.drop_path, self.training)
        return x + drop_path(self.down(self.up(x)), self.drop_path, self.training)


class LeViT(Backbone):
    """Four strided convolutions -> three stages of blocks, at a half of the resolution each -> mean -> batch norms."""

    def __init__(self, config: LeViTConfig):
        super().__init__()
        c = self.config = config
        self.channels = c.dims
        self.strides = (STEM, 2 * STEM, 4 * STEM)
        self.summary_channels = c.dims[-1] * max(1, c.summaries)
        widths = [c.dims[0] // 8, c.dims[0] // 4, c.dims[0] // 2, c.dims[0]]
        activations = [F.hardswish] * 3 + [None]
        self.stem = nn.Sequential(
            *(
                ConvNorm(before, width, 3, 2, activation=activation)
                for before, width, activation in zip([3, *widths[:-1]], widths, activations, strict=True)
            )
        )
        self.stages = nn.ModuleList(_stage(c, i) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(c.dims[-1]) for _ in range(c.summaries))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                x = self.run(block, x)
            maps.append(x)
        mean = x.mean(dim=(2, 3))  # (B, C)
        summary = torch.cat([norm(mean) for norm in self.norms], dim=1) if self.norms else mean
        return Features(tuple(maps), self.strides, summary)

    def adapt(self, weights: dict[str, Tensor], row: Row) -> list[str]:
        notes = {}
        for name, ours in self.named_parameters():
            theirs = weights.get(name)
            if name.endswith("attention.bias.table") and theirs is not None and theirs.shape[1:] != ours.shape[1:]:
                (old, _), (new, _) = theirs.shape[1:], ours.shape[1:]
                weights[name] = _resized(theirs, (new, new))
                notes[old] = f"attention biases interpolated from {old}x{old} to {new}x{new}"
        return list(notes.values())

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def depth_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "stages":
            before = sum(len(list(stage.children())) for stage in self.stages[: int(rest[0])])
            return before + int(rest[1]) + 1
        return 0 if part == "stem" else len(self.layers) + 1


def _stage(config: LeViTConfig, i: int) -> nn.Sequential:
    counts = [depth + (stage > 0) for stage, depth in enumerate(config.depths)]  # with those that halve
    first = sum(counts[:i])
    rates = [config.drop_path * (first + b) / max(1, sum(counts) - 1) for b in range(counts[i])]
    grid = -(-config.image_size // STEM)
    before = grid
    for _ in range(i):
        before, grid = grid, -(-grid // 2)
    channels, wide, key = config.dims[i], config.dims[i - 1], config.key_dim
    kinds = [Attention(wide, channels, wide // key, key, grid=(before, before), stride=2)] if i else []
    kinds += [Attention(channels, channels, config.heads[i], key, grid=(grid, grid)) for _ in range(config.depths[i])]
    return nn.Sequential(*(LeViTBlock(kind, channels, rate) for kind, rate in zip(kinds, rates, strict=True)))
