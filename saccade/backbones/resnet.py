"""ResNet: https://arxiv.org/abs/1512.03385. A bottleneck has its stride in the 3x3 convolution ("v1.5"), as everywhere.

The last normalisation of a block begins with zeros (https://arxiv.org/abs/1706.02677): at first, blocks pass on what
they get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Backbone, Row, computed_again
from saccade.backbones.features import Features
from saccade.layers.convolution import ConvNorm
from saccade.layers.encoder import drop_path

EXPANSION = 4  # a bottleneck's outer width, of its inner one


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(Row):
    """`widths` are those of the 3x3 convolutions of each stage."""

    family: ClassVar[str] = "resnet"
    depths: tuple[int, int, int, int]
    bottleneck: bool
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: int = 64
    dilated: bool = False  # the last stage keeps the resolution of the one before (DETR's DC5)
    frozen_norm: bool = False  # batch normalisation stays as it was loaded, for small batches of large pictures
    drop_path: float = 0.0

    @property
    def stride(self) -> int:
        return 16 if self.dilated else 32

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(width * (EXPANSION if self.bottleneck else 1) for width in self.widths)

    @property
    def about(self) -> str:
        kind = "bottleneck" if self.bottleneck else "basic"
        return f"{'-'.join(map(str, self.depths))} {kind} blocks, {self.channels[-1]} channels"


RESNET = {
    "resnet18": ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetConfig(depths=(3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3), bottleneck=True),
}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a 3x3 one between two 1x1 that narrow and widen; and the way around them."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        bottleneck: bool,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        frozen: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        out_channels = EXPANSION * width if bottleneck else width
        spatial = ConvNorm(
            width if bottleneck else in_channels,
            width,
            stride=stride,
            dilation=first_dilation,
            activation=torch.relu_,
            frozen=frozen,
        )
        if bottleneck:
            narrow = ConvNorm(in_channels, width, 1, activation=torch.relu_, frozen=frozen)
            self.convs = nn.Sequential(narrow, spatial, ConvNorm(width, out_channels, 1, frozen=frozen))
        else:
            self.convs = nn.Sequential(spatial, ConvNorm(width, width, dilation=dilation, frozen=frozen))
        fits = in_channels == out_channels and stride == 1
        self.shortcut = None if fits else ConvNorm(in_channels, out_channels, 1, stride, frozen=frozen)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        branch = drop_path(self.convs(x), self.drop_path, self.training)
        return branch.add_(x if self.shortcut is None else self.shortcut(x)).relu_()  # in place: nothing needs the rest


class ResNet(Backbone):
    """7x7 convolution, pooling, four stages of residual blocks; the summary is the mean of the last map."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig):
        super().__init__()
        c = self.config = config
        self.channels, self.strides = c.channels, (4, 8, 16, c.stride)
        self.summary_channels = self.channels[-1]
        self.stem = ConvNorm(3, c.stem, kernel=7, stride=2, activation=torch.relu_, frozen=c.frozen_norm)
        self.stages = nn.ModuleList(self._stage(i) for i in range(4))
        self._initialise()

    def _stage(self, stage: int) -> nn.ModuleList:
        c = self.config
        dilation = 2 if c.dilated and stage == 3 else 1
        stride = 1 if stage == 0 or dilation > 1 else 2
        before, last = sum(c.depths[:stage]), max(1, sum(c.depths) - 1)
        entry = c.channels[stage - 1] if stage else c.stem
        return nn.ModuleList(
            ResidualBlock(
                c.channels[stage] if i else entry,
                c.widths[stage],
                bottleneck=c.bottleneck,
                stride=1 if i else stride,
                first_dilation=dilation if i else 1,
                dilation=dilation,
                frozen=c.frozen_norm,
                drop_path=c.drop_path * (before + i) / last,
            )
            for i in range(c.depths[stage])
        )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.layers:
            assert isinstance(block, ResidualBlock)
            norm = block.convs[-1].norm
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.zeros_(norm.weight)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x = self._pooled(images)  # in any order: its weights' is taken, and no copy is kept for the backward pass
        maps: list[Tensor] = []
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = self.run(block, x)
            maps.append(x)
        return Features(tuple(maps), self.strides, x.mean(dim=(2, 3)))

    def _pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The stem. Of the largest map nothing but the convolution's result is kept for the backward pass, where it is
        normalised and pooled once more: that takes little time, and would be kept all the while."""
        if not self.stem.by_batch:
            return _pool(self.stem(images))
        return computed_again(lambda x: _pool(self.stem.finish(x)), self.stem, self.stem.convolve(images))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages if isinstance(stage, nn.ModuleList) for block in stage]

    def depth_of(self, parameter: str) -> int:
        if parameter.startswith("stem."):
            return 0
        _, stage, block, *_ = parameter.split(".")
        return sum(self.config.depths[: int(stage)]) + int(block) + 1


def _pool(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
