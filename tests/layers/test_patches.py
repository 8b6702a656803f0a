from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.patches import ConvStem, PatchEmbed


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """For gradients, which grow with what they are summed over: of the largest, where that is over one."""
    return gap(a, b) / max(1.0, b.abs().max().item())


def test_patches_without_bias():
    module = PatchEmbed(4, 12, bias=False)
    assert [name for name, _ in module.named_parameters()] == ["projection.weight"]
    assert not module(torch.zeros(1, 3, 8, 8)).any()


@pytest.mark.parametrize("patch_size", [1, 2, 4, 14, 16])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("of_images", [True, False])
def test_patches_are_the_strided_convolution(patch_size, grid, of_images):
    """Measured: 3.8e-6, with 768 products in a sum; gradients, of the largest: 2.0e-7."""
    torch.manual_seed(0)
    module = PatchEmbed(patch_size, 12)
    weight, bias = module.projection.weight, module.projection.bias
    assert bias is not None
    torch.nn.init.normal_(bias)
    images = torch.randn(2, 3, grid[0] * patch_size, grid[1] * patch_size, requires_grad=of_images)
    got = module(images)
    expected = F.conv2d(images, weight, bias, stride=patch_size)
    assert got.shape == (2, 12, *grid)
    assert gap(got, expected) <= 1e-5
    upstream = torch.randn_like(got)
    learnt = (images, weight, bias) if of_images else (weight, bias)
    of_ours = torch.autograd.grad(got, learnt, upstream)
    of_theirs = torch.autograd.grad(expected, learnt, upstream)
    for a, b in zip(of_ours, of_theirs, strict=True):
        assert relative(a, b) <= 1e-5


def test_patches_take_any_memory_layout():
    torch.manual_seed(0)
    module = PatchEmbed(4, 12)
    images = torch.randn(2, 3, 8, 12)
    got = module(images.contiguous(memory_format=torch.channels_last))
    assert gap(got, module(images)) <= 1e-6  # measured 0


@pytest.mark.parametrize("widths", [(8,), (8, 16), (4, 8, 16)], ids=str)
def test_stem_halves_once_per_width(widths):
    torch.manual_seed(0)
    stem = ConvStem(widths, 12, repeats=(1,))
    assert stem.stride == 2 ** len(widths)
    tokens = stem(torch.randn(2, 3, 3 * stem.stride, 5 * stem.stride))
    assert tokens.shape == (2, 12, 3, 5)
    tokens.square().mean().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_no_copy_of_the_pictures_is_kept():
    kept: list[int] = []
    images = torch.randn(2, 3, 8, 12)

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        PatchEmbed(4, 12)(images).sum()
    assert kept == [images.data_ptr()]
