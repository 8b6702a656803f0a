"""EfficientViT, convolutions and multi-scale linear attention: https://arxiv.org/abs/2205.14756."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from saccade.backbones.base import Backbone, Row
from saccade.backbones.features import Features
from saccade.layers.convolution import ConvNorm, convolve
from saccade.layers.encoder import drop_path

AGGREGATION = 5  # pixels a side that the second scale of attention gathers


@dataclass(frozen=True, kw_only=True)
class EfficientViTConfig(Row):
    """`widths` and `depths` begin with the stem's; the last two stages have attention."""

    family: ClassVar[str] = "efficientvit"
    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int, int]
    head_dim: int
    summary_widths: tuple[int, int]  # before and after the mean over the picture
    expansion: int = 4
    attention_eps: float = 1e-5
    drop_path: float = 0.0

    @property
    def stride(self) -> int:
        return 2 ** len(self.widths)

    @property
    def about(self) -> str:
        return f"linear attention, {'-'.join(map(str, self.depths[1:]))} blocks, {self.widths[-1]} channels"


EFFICIENTVIT = {
    "efficientvit_b0": EfficientViTConfig(
        widths=(8, 16, 32, 64, 128), depths=(1, 2, 2, 2, 2), head_dim=16, summary_widths=(1024, 1280)
    ),
    "efficientvit_b1": EfficientViTConfig(
        widths=(16, 32, 64, 128, 256), depths=(1, 2, 3, 3, 4), head_dim=16, summary_widths=(1536, 1600)
    ),
    "efficientvit_b2": EfficientViTConfig(
        widths=(24, 48, 96, 192, 384), depths=(1, 3, 4, 4, 6), head_dim=32, summary_widths=(2304, 2560)
    ),
    "efficientvit_b3": EfficientViTConfig(
        widths=(32, 64, 128, 256, 512), depths=(1, 4, 6, 6, 9), head_dim=32, summary_widths=(2304, 2560)
    ),
}


class _NormHardswish(torch.autograd.Function):
    """Batch normalisation by the batch's own statistics, then hard-swish; the map between the two is not kept.

    The backward pass computes it again, a factor and a shift per channel: about a quarter less is kept, for a few per
    cent of time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        assert norm.momentum is not None
        y, mean, deviation = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.eps = norm.eps
        return F.hardswish(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        factor = weight * deviation  # of 1 / sqrt(variance + eps)
        shift = bias - mean * factor
        y = torch.addcmul(shift[:, None, None], x, factor[:, None, None]).to(x.dtype)
        torch.ops.aten.hardswish_backward.out(gradients[0], y, out=y)
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        found = torch.ops.aten.native_batch_norm_backward(
            y, x, weight, None, None, mean, deviation, True, ctx.eps, wanted
        )
        return found[0], None, found[1], found[2]


def _hardswish(x: Tensor) -> Tensor:
    """In place only where nothing is kept for a backward pass: autograd would copy the input first."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


class ConvNormHardswish(ConvNorm):
    """`ConvNorm` and hard-swish, with less memory in training."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1):
        super().__init__(in_channels, channels, kernel, stride, groups=groups, activation=_hardswish)

    def forward(
        self, x: Float[Tensor, "B C H W"], scale: Float[Tensor, " D"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        norm = self.norm
        if not self.training or scale is not None or torch.compiler.is_compiling():  # which fuses by itself
            return super().forward(x, scale)
        assert isinstance(norm, nn.BatchNorm2d) and norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        return _NormHardswish.apply(self.convolve(x), norm, norm.weight, norm.bias)


class ConvBias(nn.Module):
    """A convolution with a bias in the place of batch normalisation, then hard-swish."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        conv = self.conv
        return _hardswish(convolve(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups))


def _active(
    in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1, norm: bool = True
) -> nn.Module:
    """A convolution with hard-swish, with batch normalisation or with a bias."""
    if norm:
        return ConvNormHardswish(in_channels, channels, kernel, stride, groups=groups)
    return ConvBias(in_channels, channels, kernel, stride, groups=groups)


class InvertedResidual(nn.Module):
    """Widen, convolve each channel on its own, narrow: https://arxiv.org/abs/1801.04381, with hard-swish.

    `late_norm` has biases in place of the first norms. At an expansion of one nothing is widened.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        expansion: int,
        stride: int = 1,
        late_norm: bool = False,
        shortcut: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__()
        wide = in_channels * expansion
        self.widen = _active(in_channels, wide, 1, norm=not late_norm) if expansion != 1 else None
        self.depthwise = _active(wide, wide, 3, stride, groups=wide, norm=not late_norm)
        self.narrow = ConvNorm(wide, channels, 1)
        self.shortcut = shortcut
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        h = self.narrow(self.depthwise(x if self.widen is None else self.widen(x)))
        return x + drop_path(h, self.drop_path, self.training) if self.shortcut else h


class MultiScaleLinearAttention(nn.Module):
    """Attention with ReLU in place of softmax, over single pixels and over neighbourhoods gathered by a convolution."""

    def __init__(self, channels: int, head_dim: int, eps: float):
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.eps = eps
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)  # per head: query, key, value
        self.gather = nn.Conv2d(
            3 * inner, 3 * inner, AGGREGATION, padding=AGGREGATION // 2, groups=3 * inner, bias=False
        )
        self.mix = nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False)
        self.out = ConvNorm(2 * inner, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        H, W = x.shape[-2:]
        pixels = self.qkv(x)
        scales = torch.cat((pixels.flatten(2), self._neighbourhoods(pixels)), dim=1).contiguous()
        heads = scales.unflatten(1, (-1, 3, self.head_dim))  # (B, H, 3, D, N)
        mixed = linear_attention(heads[:, :, :2], heads[:, :, 2], eps=self.eps)
        mixed = mixed.flatten(1, 2).unflatten(2, (H, W))
        return self.out(mixed.contiguous(memory_format=torch.channels_last))

    def _neighbourhoods(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C N"]:
        gathered = self.gather(pixels.contiguous() if _few_learn(pixels) else pixels).flatten(2)
        weight = self.mix.weight.unflatten(0, (-1, self.head_dim)).flatten(2)  # (G, D, D): a query, a key or a value
        # as products: a grouped convolution is several times slower on processors
        return torch.einsum("gde,bgen->bgdn", weight, gathered.unflatten(1, (-1, self.head_dim))).flatten(1, 2)


def _few_learn(x: Tensor) -> bool:
    """On processors, channels last, the gradient of a depthwise 5x5 weight costs the same however small the map is."""
    B, _, H, W = x.shape
    return x.device.type == "cpu" and torch.is_grad_enabled() and B * H * W <= 512


def linear_attention(
    qk: Float[Tensor, "B H 2 D N"], v: Float[Tensor, "B H D N"], *, eps: float
) -> Float[Tensor, "B H D N"]:
    """relu(q) relu(k)^T v with rows that sum to one, in time and memory linear in the number of tokens.

    Sums over all tokens leave the range of half precision, so it is float32 at least, under autocast, too.
    """
    device = v.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        exact = torch.promote_types(v.dtype, torch.float32)
        q, k = qk.relu().to(exact).unbind(2)
        values = v.to(exact).contiguous()
        memory = values @ k.transpose(-2, -1)  # (B, H, D, D)
        total = k.sum(dim=-1).unsqueeze(-2)  # (B, H, 1, D): its product with q is what each row sums to
        sums = torch.cat((memory, total), dim=-2) @ q  # (B, H, D + 1, N)
        return (sums[..., :-1, :] / (sums[..., -1:, :] + eps)).to(v.dtype)


class EfficientViTBlock(nn.Module):
    """Linear attention for what is far, an inverted residual for what is near."""

    def __init__(self, channels: int, config: EfficientViTConfig, drop_path: float):
        super().__init__()
        self.attention = MultiScaleLinearAttention(channels, config.head_dim, config.attention_eps)
        self.local = InvertedResidual(
            channels, channels, expansion=config.expansion, late_norm=True, drop_path=drop_path
        )
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        x = x + drop_path(self.attention(x), self.drop_path, self.training)
        return self.local(x)


class EfficientViT(Backbone):
    """Stem -> two stages of convolutions -> two stages with attention -> widened, averaged, normalised summary.

    Pictures may have any height and width; each halving rounds up.
    """

    def __init__(self, config: EfficientViTConfig):
        super().__init__()
        c = self.config = config
        self.channels = c.widths[1:]
        self.strides = (4, 8, 16, 32)
        hidden, self.summary_channels = c.summary_widths
        self.stem = nn.Sequential(
            _active(3, c.widths[0], 3, 2),
            *(InvertedResidual(c.widths[0], c.widths[0], expansion=1) for _ in range(c.depths[0])),
        )
        self.stages = nn.ModuleList(_stage(c, i) for i in range(1, len(c.widths)))
        self.widen = _active(c.widths[-1], hidden, 1)
        self.summarise = nn.Linear(hidden, self.summary_channels, bias=False)
        self.norm = nn.LayerNorm(self.summary_channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                x = self.run(block, x)
            maps.append(x)
        averaged = self.widen(x).mean(dim=(2, 3))  # (B, C)
        return Features(tuple(maps), self.strides, F.hardswish(self.norm(self.summarise(averaged))))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def depth_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "stages":
            before = sum(len(list(stage.children())) for stage in self.stages[: int(rest[0])])
            return before + int(rest[1]) + 1
        return 0 if part == "stem" else len(self.layers) + 1


def _stage(config: EfficientViTConfig, i: int) -> nn.Sequential:
    """The i-th stage; the first is 1. With attention, the block that halves the resolution comes on top of `depths`."""
    counts = [config.depths[s] + _has_attention(s) for s in range(1, len(config.depths))]
    first, last = sum(counts[: i - 1]), sum(counts) - 1
    rates = [config.drop_path * (first + b) / max(1, last) for b in range(counts[i - 1])]
    before, channels = config.widths[i - 1], config.widths[i]
    halve = InvertedResidual(
        before, channels, expansion=config.expansion, stride=2, late_norm=_has_attention(i), shortcut=False
    )
    if _has_attention(i):
        return nn.Sequential(halve, *(EfficientViTBlock(channels, config, rate) for rate in rates[1:]))
    return nn.Sequential(
        halve,
        *(InvertedResidual(channels, channels, expansion=config.expansion, drop_path=rate) for rate in rates[1:]),
    )


def _has_attention(stage: int) -> bool:
    return stage >= 3
