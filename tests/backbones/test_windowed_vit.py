"""The ViT in windows: what lies in which window, who sees whom, maps. Against transformers it is in tests/parity."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from saccade.backbones import build_backbone, name_of, row_from_dict
from saccade.backbones.windowed_vit import WindowedViT, WindowedViTConfig
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.layers.encoder import EncoderBlock

TINY = WindowedViTConfig(
    dim=32, depth=4, heads=4, hidden=64, patch_size=4, grid=6, windows=2, whole=(1, 3), taken=(1, 2, 4), image_size=32
)
LIKE_DINOV2 = replace(TINY, class_token=True, norm=True, layer_scale=1.0, resize="antialias")
both = pytest.mark.parametrize("row", [TINY, LIKE_DINOV2], ids=["plain", "class token and norm"])


def vit(row: WindowedViTConfig) -> WindowedViT:
    torch.manual_seed(0)
    backbone = build_backbone(row)
    assert isinstance(backbone, WindowedViT)
    return backbone


@both
def test_shapes_of_any_picture(row):
    backbone = vit(row).eval()
    features = backbone(torch.randn(2, 3, 32, 48))
    assert backbone.channels == (32, 32, 32) and backbone.strides == features.strides == (4, 4, 4)
    assert [each.shape for each in features.maps] == [(2, 32, 8, 12)] * 3
    assert features.summary.shape == (2, 32) == (2, backbone.summary_channels)
    assert torch.equal(backbone.summary(torch.ones(1, 3, 24, 8)), backbone(torch.ones(1, 3, 24, 8)).summary)
    with pytest.raises(ValueError, match="multiples of 8"):
        backbone(torch.randn(1, 3, 32, 36))


def change_of(backbone: WindowedViT, images: Tensor, patch: tuple[int, int]) -> list[Tensor]:
    """Which places (h, w) of each map move when one patch of the picture does."""
    y, x = (4 * n for n in patch)
    other = images.clone()
    other[:, :, y : y + 4, x : x + 4] += 1
    with torch.no_grad():
        pairs = zip(backbone(images).maps, backbone(other).maps, strict=True)
        return [(a != b).any(dim=1)[0] for a, b in pairs]


@both
@pytest.mark.parametrize("patch", [(0, 0), (3, 5), (4, 6), (7, 0)])
def test_who_sees_whom(row, patch):
    """The first block looks at windows, halves of height and width; the second at the picture."""
    backbone = vit(row).eval()
    first, second, last = change_of(backbone, torch.randn(1, 3, 32, 48), patch)
    top, left = patch[0] // 4 * 4, patch[1] // 6 * 6
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[top : top + 4, left : left + 6] = True
    assert torch.equal(first, inside)
    assert second.all() and last.all()


@both
def test_windows_are_those_of_attention_with_a_mask(row):
    """The same numbers as blocks over all tokens, where those of other windows are hidden."""
    row = replace(row, class_token=False)  # of which each window has one
    backbone = vit(row).double().eval()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    grid = (8, 12)
    x = backbone.patches(images).flatten(2).transpose(1, 2) + backbone.positions(grid)
    window = torch.tensor([2 * (y // 4) + z // 6 for y, z in product(range(8), range(12))])
    mask = window[:, None] == window[None]
    maps = []
    for i, block in enumerate(backbone.blocks):
        assert isinstance(block, EncoderBlock)
        mixed = block.attention(block.norm1(x), bias=None if i in row.whole else mask[None, None])
        x = x + (mixed if block.scale1 is None else block.scale1(mixed))
        branch = block.mlp(block.norm2(x))
        x = x + (branch if block.scale2 is None else block.scale2(branch))
        if i + 1 in row.taken:
            normed = x if backbone.norm is None else backbone.norm(x)
            maps.append(normed.transpose(1, 2).unflatten(2, grid))
    for one, other in zip(backbone(images).maps, maps, strict=True):
        assert (one - other).abs().max() <= 1e-12  # measured 2e-15


def test_a_class_token_in_each_window():
    backbone = vit(LIKE_DINOV2).eval()
    tokens, grid = backbone.embed(torch.randn(2, 3, 32, 48))
    assert grid == (8, 12) and tokens.shape == (2 * 4, 1 + 4 * 6, 32)
    assert backbone.class_token is not None and torch.equal(tokens[:, 0], backbone.class_token.expand(8, -1))


@both
def test_gradient_reaches_every_parameter(row):
    backbone = vit(row).train()
    torch.stack([each.square().mean() for each in backbone(torch.randn(2, 3, 32, 32)).maps]).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@both
def test_activation_checkpointing_changes_nothing(row):
    found = []
    for checkpointing in (False, True):
        backbone = vit(replace(row, drop_path=0.3)).train()
        backbone.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        torch.stack([each.square().mean() for each in backbone(torch.ones(2, 3, 32, 32)).maps]).sum().backward()
        found.append([parameter.grad for parameter in backbone.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_parts_and_depths():
    backbone = vit(LIKE_DINOV2)
    assert len(backbone.layers) == 4
    depths = {name: backbone.depth_of(name) for name, _ in backbone.named_parameters()}
    assert depths["patches.projection.weight"] == depths["class_token"] == depths["positions.table"] == 0
    assert depths["blocks.2.mlp.up.weight"] == 3 and depths["norm.weight"] == 5


def test_rows():
    row = TINY.changed(NetworkConfig(drop_path=0.2, layer_scale=1e-5), 64)
    assert (row.drop_path, row.layer_scale, row.image_size, row.stride) == (0.2, 1e-5, 64, 8)
    with pytest.raises(UserError, match="network.pool"):
        TINY.changed(NetworkConfig(pool="mean"))
    assert row_from_dict(LIKE_DINOV2.to_dict(), "a test") == LIKE_DINOV2
    assert name_of(TINY) == "windowed_vit-custom"
    assert TINY.is_like(replace(TINY, norm_eps=1e-5, drop_path=0.5)) and not TINY.is_like(replace(TINY, windows=4))
    for taken in ((), (0, 4), (2, 1, 4), (1, 2)):
        with pytest.raises(ValueError, match="numbers must rise"):
            build_backbone(replace(TINY, taken=taken))
