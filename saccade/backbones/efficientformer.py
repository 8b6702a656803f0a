"""EfficientFormer, blocks of pooling and then of attention: https://arxiv.org/abs/2206.01191.

In the reference the attention's biases belong to a grid of 7 x 7 tokens, so that it takes pictures of 224 pixels alone;
here they are interpolated for any other grid. The last map is normalised, as the summary is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from saccade.layers.feedforward import FeedForward

STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class EfficientFormerConfig(Row):
    """The last `attention_blocks` blocks of the last stage have attention, all others pooling."""

    family: ClassVar[str] = "efficientformer"
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    attention_blocks: int
    heads: int = 8
    head_dim: int = 32  # of queries and keys
    value_dim: int = 128  # of values, per head
    grid: int = 7  # tokens a side that the biases of attention are made for
    expansion: int = 4
    layer_scale: float = 1e-5
    drop_path: float = 0.0

    @property
    def stride(self) -> int:
        return STRIDE

    @property
    def about(self) -> str:
        return f"{'-'.join(map(str, self.depths))} blocks, {self.attention_blocks} attend, {self.widths[-1]} channels"


EFFICIENTFORMER = {
    "efficientformer_l1": EfficientFormerConfig(depths=(3, 2, 6, 4), widths=(48, 96, 224, 448), attention_blocks=1),
    "efficientformer_l3": EfficientFormerConfig(depths=(4, 4, 12, 6), widths=(64, 128, 320, 512), attention_blocks=4),
}


def offset_bias(
    table: Float[Tensor, "H O"], grid: tuple[int, int], wanted: tuple[int, int] | None = None
) -> Float[Tensor, "H N N"]:
    """What attention from token to token gets for the rows and columns between them.

    `table` has a value per offset, (|rows|, |columns|) in row-major order, of pictures of `grid`. For pictures of
    another size it is stretched to theirs, bilinearly: offset 0 stays itself, and the longest becomes the longest.
    """
    h, w = wanted or grid
    if (h, w) != grid:
        square = table.unflatten(1, grid)[None]  # (1, H, rows, columns)
        table = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)[0].flatten(1)
    return table.index_select(1, offset_indices((h, w), table.device).flatten()).unflatten(1, (h * w, h * w))


def offset_indices(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(N, N): the place in a row-major table of offsets of each pair of tokens."""
    rows, columns = (_distances(side, device) for side in grid)
    return (rows[:, None, :, None] * grid[1] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _distances(side: int, device: torch.device | None) -> Tensor:
    places = torch.arange(side, device=device)
    return (places[:, None] - places).abs()  # (side, side)


class PoolBlock(nn.Module):
    """Neighbours are mixed by taking their mean, channels by two 1x1 convolutions: https://arxiv.org/abs/2111.11418."""

    def __init__(self, dim: int, hidden: int, *, layer_scale: float, drop_path: float):
        super().__init__()
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.widen = ConvNorm(dim, hidden, 1, bias=True, activation=F.gelu)
        self.narrow = ConvNorm(hidden, dim, 1, bias=True)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        # x + scale (mean - x) in one pass. Under autocast it brings the residual stream to float32, where small scales
        # still show.
        weight = drop_path(self.scale1.expand(len(x), -1), self.drop_path, self.training)[..., None, None]
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        mean = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        x = torch.lerp(x, mean, weight)
        return x + drop_path(self.narrow(self.widen(x), self.scale2), self.drop_path, self.training)


class OffsetAttention(nn.Module):
    """Self-attention with a learned bias per head and offset, and values wider than queries and keys."""

    def __init__(self, config: EfficientFormerConfig):
        super().__init__()
        c = config
        self.heads, self.head_dim, self.value_dim = c.heads, c.head_dim, c.value_dim
        self.grid = (c.grid, c.grid)
        self.qkv = nn.Linear(c.widths[-1], c.heads * (2 * c.head_dim + c.value_dim))  # per head: query, key, value
        self.out = nn.Linear(c.heads * c.value_dim, c.widths[-1])
        self.bias_table = nn.Parameter(torch.zeros(c.heads, c.grid * c.grid))

    def forward(self, x: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B N C"]:
        qkv = self.qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, 2 D + E)
        q, k, v = qkv.split((self.head_dim, self.head_dim, self.value_dim), dim=3)
        bias = offset_bias(self.bias_table, self.grid, grid)
        mixed = attention(q, k, v, bias=bias.to(q.dtype)[None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """A pre-norm Transformer block with LayerScale."""

    def __init__(self, config: EfficientFormerConfig, *, drop_path: float):
        super().__init__()
        dim = config.widths[-1]
        self.norm1 = nn.LayerNorm(dim)
        self.attention = OffsetAttention(config)
        self.scale1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, config.expansion * dim)
        self.scale2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B N C"]:
        x = x + drop_path(self.scale1 * self.attention(self.norm1(x), grid), self.drop_path, self.training)
        return x + drop_path(self.scale2 * self.mlp(self.norm2(x)), self.drop_path, self.training)


class EfficientFormer(Backbone):
    """Stem, four stages with a strided convolution between each two, norm; the summary is the mean of the last map."""

    config: EfficientFormerConfig

    def __init__(self, config: EfficientFormerConfig):
        super().__init__()
        c = self.config = config
        if not 1 <= c.attention_blocks <= c.depths[-1]:
            raise ValueError(f"{c.attention_blocks} blocks with attention in a last stage of {c.depths[-1]}")
        self.channels, self.strides, self.summary_channels = c.widths, (4, 8, 16, STRIDE), c.widths[-1]
        self.stem = nn.Sequential(
            ConvNorm(3, c.widths[0] // 2, stride=2, bias=True, activation=torch.relu_),
            ConvNorm(c.widths[0] // 2, c.widths[0], stride=2, bias=True, activation=torch.relu_),
        )
        self.merges = nn.ModuleList(
            ConvNorm(fine, coarse, stride=2, bias=True)
            for fine, coarse in zip(c.widths[:-1], c.widths[1:], strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(self._block(stage, i) for i in range(c.depths[stage])) for stage in range(4)
        )
        self.norm = nn.LayerNorm(c.widths[-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _block(self, stage: int, index: int) -> nn.Module:
        c = self.config
        rate = c.drop_path * (sum(c.depths[:stage]) + index) / max(1, sum(c.depths) - 1)
        if stage == 3 and index >= c.depths[3] - c.attention_blocks:
            return AttentionBlock(c, drop_path=rate)
        width = c.widths[stage]
        return PoolBlock(width, c.expansion * width, layer_scale=c.layer_scale, drop_path=rate)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps: list[Tensor] = []
        for i, merge in enumerate((None, *self.merges)):
            x = x if merge is None else merge(x)
            for block in self._blocks(i, PoolBlock):
                x = self.run(block, x)
            maps.append(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for block in self._blocks(3, AttentionBlock):
            x = self.run(block, x, grid)
        x = self.norm(x)
        maps[-1] = x.transpose(1, 2).unflatten(2, grid)
        return Features(tuple(maps), self.strides, maps[-1].mean(dim=(2, 3)))

    def _blocks(self, stage: int, kind: type[nn.Module]) -> list[nn.Module]:
        blocks = self.stages[stage]
        assert isinstance(blocks, nn.ModuleList)
        return [block for block in blocks if isinstance(block, kind)]

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages if isinstance(stage, nn.ModuleList) for block in stage]

    def depth_of(self, parameter: str) -> int:
        part, *place = parameter.split(".")
        depths = self.config.depths
        if part == "stem":
            return 0
        if part == "merges":
            return sum(depths[: int(place[0]) + 1]) + 1
        return sum(depths[: int(place[0])]) + int(place[1]) + 1 if part == "stages" else sum(depths) + 1
