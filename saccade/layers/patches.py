"""From pixels to tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Cut the picture into squares and project each: https://arxiv.org/abs/2010.11929. Down to a pixel a token."""

    def __init__(self, patch_size: int, dim: int, in_channels: int = 3, *, bias: bool = True):
        super().__init__()
        self.stride = patch_size
        # A convolution's parameters, used as one matrix product: the same numbers, without its layout changes.
        self.projection = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        nn.init.trunc_normal_(self.projection.weight, std=(1.0 / (in_channels * patch_size**2)) ** 0.5)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        weight, bias = self.projection.weight.flatten(1), self.projection.bias
        learns = torch.is_grad_enabled() and weight.requires_grad and not images.requires_grad
        kind = images.device.type
        plain = kind in ("cpu", "cuda") and images.dtype == weight.dtype and not torch.is_autocast_enabled(kind)
        if learns and plain and not torch.compiler.is_compiling():
            return _Project.apply(images, weight, bias, self.stride).permute(0, 3, 1, 2)  # type: ignore[union-attr]
        return F.linear(_cut(images, self.stride), weight, bias).permute(0, 3, 1, 2)


def _cut(images: Float[Tensor, "B C H W"], p: int) -> Float[Tensor, "B h w Cpp"]:
    B, C, H, W = images.shape
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)


class _Project(torch.autograd.Function):
    """Patches are cut out once more for the backward pass, which costs less than keeping them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, p: int) -> Tensor:
        ctx.save_for_backward(images)
        ctx.patch_size = p
        return F.linear(_cut(images, p), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        upstream = gradients[0].flatten(0, 2)
        of_bias = upstream.sum(dim=0) if ctx.needs_input_grad[2] else None
        return None, upstream.T @ _cut(images, ctx.patch_size).flatten(0, 2), of_bias, None


class ConvStem(nn.Module):
    """Strided 3x3 convolutions in place of large patches: https://arxiv.org/abs/2106.14881, https://arxiv.org/abs/2104.05704.

    They bring the bias towards neighbouring pixels that a small set cannot teach. Each width halves the resolution;
    `repeats` further convolutions of the same width follow, with a residual connection.
    """

    def __init__(self, widths: tuple[int, ...], dim: int, repeats: tuple[int, ...] = (), in_channels: int = 3):
        super().__init__()
        self.stride = 2 ** len(widths)
        stages: list[nn.Module] = []
        for i, width in enumerate(widths):
            stages.append(_conv_norm_relu(in_channels, width, stride=2))
            stages += [_ResidualConv(width) for _ in range(repeats[i] if i < len(repeats) else 0)]
            in_channels = width
        self.stages = nn.Sequential(*stages)
        self.projection = nn.Linear(in_channels, dim)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        maps = self.stages(images.contiguous(memory_format=torch.channels_last))
        return self.projection(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ResidualConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            _conv_norm_relu(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _conv_norm_relu(in_channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
