"""From maps to levels: shapes at every scale, norms by hand, gradients. Against transformers it is in tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saccade.layers.convolution import ConvNorm
from saccade.layers.projector import C2f, ConvLayerNorm, Projector, convolution, norm_of_channels


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("scale", "size"), [(0.5, (4, 3)), (1.0, (7, 6)), (2.0, (14, 12))])
def test_levels(norm, scale, size):
    torch.manual_seed(0)
    projector = Projector((8, 12), 16, scale=scale, norm=norm)
    maps = [torch.randn(2, width, 7, 6) for width in (8, 12)]
    level = projector(maps)
    assert level.shape == (2, 16, *size)
    assert level.mean(dim=1).abs().max() <= 1e-5 and (level.var(dim=1, unbiased=False) - 1).abs().max() <= 1e-3
    level.square().sum(dim=1).sin().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name


def test_wide_maps_are_narrowed_before_they_are_enlarged():
    projector = Projector((516,), 8, scale=2.0)
    resize = projector.resizes[0]
    assert isinstance(resize, nn.Sequential)
    first, second = resize
    assert isinstance(first, ConvNorm) and isinstance(second, nn.ConvTranspose2d)
    assert first.conv.weight.shape == (258, 516, 1, 1) and second.weight.shape == (258, 129, 2, 2)
    assert projector([torch.randn(1, 516, 2, 3)]).shape == (1, 8, 4, 6)


def test_a_scale_that_there_is_not():
    with pytest.raises(ValueError, match="scale 4.0: not one of 0.5, 1.0, 2.0"):
        Projector((8,), 8, scale=4.0)


def test_norm_of_channels():
    norm = nn.LayerNorm(5)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 4)
    expected = norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 4))
    assert (norm_of_channels(x, norm) - expected).abs().max() <= 1e-6


def test_layer_norm_after_a_convolution():
    layer = ConvLayerNorm(3, 6, 3, 2, activation=F.relu, eps=0.1)
    x = torch.randn(1, 3, 5, 8)
    y = F.conv2d(x, layer.conv.weight, stride=2, padding=1)
    mean, variance = y.mean(dim=1, keepdim=True), y.var(dim=1, keepdim=True, unbiased=False)
    assert (layer(x) - ((y - mean) / (variance + 0.1).sqrt()).relu()).abs().max() <= 1e-5
    assert layer(x).shape == (1, 6, 3, 4)


def test_what_is_joined():
    """Both halves of the entry, and what every pair makes of the one before."""
    torch.manual_seed(0)
    block = C2f(4, 6, 2, convolution("layer", 1e-6))
    x = torch.randn(1, 4, 5, 5)
    first, second = block.entry(x).chunk(2, dim=1)
    third = block.pairs[0](second)
    joined = torch.cat((first, second, third, block.pairs[1](third)), dim=1)
    assert joined.shape == (1, 12, 5, 5) and torch.equal(block(x), block.out(joined))
