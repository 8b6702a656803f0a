"""From maps of one size, as a plain ViT has them, to a map of a detector's width at any scale.

https://arxiv.org/abs/2406.03459, with the C2f block of YOLOv8. No block here has a residual connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.convolution import ConvNorm

SCALES = (0.5, 1.0, 2.0)
WIDE = 512  # channels of a map; wider ones are narrowed before they are enlarged


def norm_of_channels(x: Float[Tensor, "B C H W"], norm: nn.LayerNorm) -> Float[Tensor, "B C H W"]:
    """LayerNorm of every place."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvLayerNorm(nn.Module):
    """A convolution that pads to keep the size, LayerNorm of every place, and an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        activation: Callable[[Tensor], Tensor],
        eps: float = 1e-6,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)
        self.conv.to(memory_format=torch.channels_last)  # as the maps are, or each call would copy the weights
        self.norm = nn.LayerNorm(out_channels, eps=eps)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.activation(norm_of_channels(self.conv(x), self.norm))


# (in_channels, out_channels, kernel, stride, activation=) -> the layer
Conv = Callable[..., ConvNorm | ConvLayerNorm]


def convolution(norm: str, eps: float) -> Conv:
    """A kind of layer by its normalisation: `batch`, or `layer` with this `eps`."""
    return {"batch": ConvNorm, "layer": partial(ConvLayerNorm, eps=eps)}[norm]


class C2f(nn.Module):
    """Half of the channels go through pairs of convolutions; all that was on the way is joined at the end."""

    def __init__(self, in_channels: int, out_channels: int, pairs: int, conv: Conv):
        super().__init__()
        half = out_channels // 2
        self.entry = conv(in_channels, 2 * half, 1, activation=F.silu)
        self.pairs = nn.ModuleList(
            nn.Sequential(conv(half, half, 3, activation=F.silu), conv(half, half, 3, activation=F.silu))
            for _ in range(pairs)
        )
        self.out = conv((2 + pairs) * half, out_channels, 1, activation=F.silu)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        parts = list(self.entry(x).chunk(2, dim=1))
        for pair in self.pairs:
            parts.append(pair(parts[-1]))
        return self.out(torch.cat(parts, dim=1))


class Projector(nn.Module):
    """Maps of one size -> resized by `scale` -> side by side -> C2f -> LayerNorm."""

    def __init__(
        self,
        channels: Sequence[int],
        dim: int,
        *,
        scale: float = 1.0,
        pairs: int = 3,
        norm: str = "batch",
        eps: float = 1e-6,
    ):
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale {scale}: not one of {', '.join(map(str, SCALES))}")
        conv = convolution(norm, eps)
        self.resizes = nn.ModuleList(_resize(width, scale, conv) for width in channels)
        width = sum(_width(width, scale) for width in channels)
        self.mix = C2f(width, dim, pairs, conv)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, maps: Sequence[Float[Tensor, "B C H W"]]) -> Float[Tensor, "B D h w"]:
        x = torch.cat([resize(each) for resize, each in zip(self.resizes, maps, strict=True)], dim=1)
        return norm_of_channels(self.mix(x), self.norm)


def _width(channels: int, scale: float) -> int:
    """Of a map that was resized."""
    return channels if scale <= 1 else channels // (4 if channels > WIDE else 2)


def _resize(channels: int, scale: float, conv: Conv) -> nn.Sequential:
    if scale == 0.5:
        return nn.Sequential(conv(channels, channels, 3, 2, activation=F.relu))
    if scale == 1.0:
        return nn.Sequential()
    first = [conv(channels, channels // 2, 1, activation=F.relu)] if channels > WIDE else []
    narrow, width = channels // (2 if first else 1), _width(channels, scale)
    enlarge = nn.ConvTranspose2d(narrow, width, kernel_size=2, stride=2)
    enlarge.to(memory_format=torch.channels_last)
    return nn.Sequential(*first, enlarge)
