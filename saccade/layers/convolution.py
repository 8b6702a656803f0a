"""Convolution and batch normalisation as one layer: https://arxiv.org/abs/1502.03167."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

# channels: a strided convolution of one place whose maps have fewer overwrites memory that is not its own in oneDNN's
# gradient of the weights (on AVX2 from 7 down; https://github.com/uxlfoundation/oneDNN/issues/6035), which aborts
FEW = 16


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics, factors and shifts stay as they were loaded; `nn.BatchNorm2d`'s names.

    They are buffers, so that nothing that trains or unfreezes parameters finds them. `ConvNorm` applies them.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))


class ConvNorm(nn.Module):
    """A convolution that pads to keep the size, batch normalisation, and perhaps an activation.

    Outside training, to normalise is to multiply and shift each channel. Factor and shift go into the convolution's
    weight and bias where these are smaller than the map, which spares a pass over the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=bias)
        self.conv.to(memory_format=torch.channels_last)  # as the maps are, or each call would copy the weights
        self.norm = FrozenBatchNorm(out_channels) if frozen else nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(
        self, x: Float[Tensor, "B C H W"], scale: Float[Tensor, " D"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        """`scale` is one more factor per channel of the normalised map, such as LayerScale's: no pass of its own."""
        if self.by_batch:
            return self.finish(self.convolve(x), scale)
        x = self._normalise_as_known(x, scale)
        return x if self.activation is None else self.activation(x)

    @property
    def by_batch(self) -> bool:
        """Whether statistics are those of the batch, so that a call is `convolve`, then `finish`."""
        return self.training and isinstance(self.norm, nn.BatchNorm2d)

    def convolve(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self._convolve(x, self.conv.weight, self.conv.bias)

    def finish(self, x: Float[Tensor, "B D h w"], scale: Tensor | None = None) -> Float[Tensor, "B D h w"]:
        assert isinstance(self.norm, nn.BatchNorm2d)
        x = _normalise_batch(x, self.norm, scale)
        return x if self.activation is None else self.activation(x)

    def _normalise_as_known(self, x: Tensor, scale: Tensor | None) -> Tensor:
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        B, _, H, W = x.shape
        places = B * H * W // (conv.stride[0] * conv.stride[1])
        if conv.weight[0].numel() > places:
            weight, bias = _scaled(norm, scale)
            return F.batch_norm(self.convolve(x), norm.running_mean, norm.running_var, weight, bias, eps=norm.eps)
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * factor
        if scale is not None:
            factor, shift = factor * scale, shift * scale
        bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, factor)
        weight = conv.weight * factor[:, None, None, None]
        return self._convolve(x, weight, bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.conv
        stride = conv.stride
        if conv.kernel_size == (1, 1) and stride != (1, 1) and conv.in_channels < FEW:
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)  # the same places
        return convolve(x, weight, bias, stride, conv.padding, conv.dilation, conv.groups)


def convolve(
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "D c k k"],
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "B D h w"]:
    """`F.conv2d`. Channels of their own in large steps stay float32 on processors: oneDNN's gradient of the input takes
    up to 170 times as long in bfloat16 (measured on a Zen 5)."""
    low = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    if low and groups > 1 and max(stride) > 1:
        with torch.autocast("cpu", enabled=False):
            shifts = None if bias is None else bias.float()
            wide = F.conv2d(x.float(), weight.float(), shifts, stride, padding, dilation, groups)
        return wide.to(torch.get_autocast_dtype("cpu"))
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _normalise_batch(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None) -> Tensor:
    if scale is None:
        return norm(x)
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    weight, bias = _scaled(norm, scale)
    return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, True, norm.momentum, norm.eps)


def _scaled(norm: nn.BatchNorm2d | FrozenBatchNorm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (norm.weight, norm.bias) if scale is None else (norm.weight * scale, norm.bias * scale)


@contextmanager
def statistics_kept(layer: nn.Module) -> Iterator[None]:
    """Inside, batches leave no trace in running statistics: for activations that are computed a second time."""
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.copy_(count)


@contextmanager
def normalised_as_known(network: nn.Module) -> Iterator[None]:
    """Inside, batches are normalised by the running statistics, and leave no trace in them."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, ConvNorm)  # the last one chooses how its norm is computed
    changed = [module for module in network.modules() if isinstance(module, kinds) and module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
