"""Token merging and the forms of attention inside of ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import UserError
from saccade.backbones import backbone_row, build_backbone
from saccade.backbones.vit import ViT, ViTConfig
from saccade.config import NetworkConfig
from saccade.layers.efficient_attention import ATTENTION

FORMS = sorted(ATTENTION)


def build(**network: Any) -> ViT:
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", NetworkConfig.model_validate(network), 32)
    assert isinstance(backbone, ViT)
    return backbone


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_merging_tokens(pool: str, position: str) -> None:
    plain = build(pool=pool, position=position, registers=1, drop_path=0.0).eval()
    merging = build(pool=pool, position=position, registers=1, drop_path=0.0, merge_tokens=5).eval()
    merging.load_state_dict(plain.state_dict())
    images = torch.randn(20, 3, 32, 24)
    with torch.no_grad():
        features, exact = merging(images), plain(images)
        assert features.maps[0].shape == exact.maps[0].shape == (20, 128, 8, 6)
        assert gap(features.summary, exact.summary) > 1e-6, "nothing was merged"
        assert gap(merging.summary(images), features.summary) <= 1e-5  # measured 1e-6
        assert gap(merging(images[3:4]).summary, features.summary[3:4]) <= 1e-5  # measured 7e-7


def merged_counts(backbone: ViT, images: Tensor) -> list[int]:
    """Patch tokens after each block."""
    seen: list[int] = []
    hooks = [
        block.get_submodule("mlp").register_forward_hook(
            lambda module, inputs, output: seen.append(output.shape[1] - backbone.prefix)
        )
        for block in backbone.blocks
    ]
    backbone(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_each_block_has_fewer_tokens() -> None:
    backbone = build(merge_tokens=5).eval()
    assert merged_counts(backbone, torch.randn(1, 3, 32, 32)) == [59, 54, 49, 44, 39, 34]
    assert merged_counts(backbone, torch.randn(1, 3, 8, 16)) == [4, 2, 1, 1, 1, 1], "at most half of those left"


def test_a_decreasing_schedule_merges_most_in_the_first_blocks() -> None:
    backbone = build(merge_tokens=5, merge_schedule="decreasing").eval()
    images = torch.randn(2, 3, 32, 32)
    assert backbone.config.merges == (10, 8, 6, 4, 2, 0)
    assert merged_counts(backbone, images) == [54, 46, 40, 36, 34, 34], "as many left as with 5 in each block"
    assert gap(backbone.summary(images), backbone(images).summary) <= 1e-5
    assert backbone.trace(images).weights[-1].shape == (2, 4, 65, 65)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 12, 40])
@pytest.mark.parametrize("count", [0, 1, 5, 13])
def test_schedules_merge_as_many_in_all(depth: int, count: int) -> None:
    row = replace(backbone_row("vit_micro"), depth=depth, merge_tokens=count)
    falling = replace(row, merge_schedule="decreasing")
    assert isinstance(row, ViTConfig) and isinstance(falling, ViTConfig)
    assert row.merges == depth * (count,) and sum(falling.merges) == depth * count
    assert len(falling.merges) == depth and min(falling.merges) >= 0
    assert row.is_like(falling), "the same weights fit"


def test_a_picture_of_one_colour_is_merged_without_loss() -> None:
    plain = build(position="none").eval()
    merging = build(position="none", merge_tokens=9).eval()
    merging.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32).contiguous()
    assert gap(plain(images).summary, merging(images).summary) <= 2e-5  # measured 2e-6


def test_attention_is_traced_through_merging() -> None:
    backbone = build(merge_tokens=5).eval()
    trace = backbone.trace(torch.randn(2, 3, 32, 24))
    for weights in trace.weights:
        assert weights.shape == (2, 4, 49, 49)
        assert gap(weights.sum(-1), torch.ones(2, 4, 49)) <= 1e-5  # measured 5e-7


@pytest.mark.parametrize("network", [{"merge_tokens": 5}, *({"attention": form} for form in FORMS)])
def test_learns(network: dict[str, Any]) -> None:
    """Gradient reaches every parameter, the same with activation checkpointing."""
    gradients = []
    for again in (False, True):
        backbone = build(**network, drop_path=0.0).train()
        backbone.activation_checkpointing = again
        torch.manual_seed(1)
        features = backbone(torch.randn(2, 3, 32, 24))
        (features.summary.square().sum() + features.maps[0].square().sum()).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and gradient.isfinite().all() and gradient.any(), name
        assert gap(gradient, other) <= 1e-6 * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_attention(form: str) -> None:
    backbone = build(attention=form).eval()
    assert all(type(block.attention) is ATTENTION[form] for block in backbone.blocks)
    images = torch.randn(3, 3, 24, 40)
    with torch.no_grad():
        features = backbone(images)
        assert gap(backbone.summary(images), features.summary) <= 1e-5  # measured 1.2e-6
        assert gap(backbone(images[1:2]).summary, features.summary[1:2]) <= 1e-5  # measured 1.2e-6
        assert backbone.trace(images).weights[-1].shape[:2] == (3, 4)


@pytest.mark.parametrize("form", ["linear", "performer", "nystrom", "window"])
def test_weights_of_full_attention_fit(form: str) -> None:
    wanted = {n: p.shape for n, p in build(attention=form).named_parameters()}
    assert wanted == {n: p.shape for n, p in build().named_parameters()}


def test_what_does_not_go_together() -> None:
    row = backbone_row("vit_micro")
    with pytest.raises(UserError, match="only with full attention"):
        row.changed(NetworkConfig(merge_tokens=2, attention="linear"))
    with pytest.raises(UserError, match=r"network\.merge_schedule: a model of the family 'resnet'"):
        backbone_row("resnet18").changed(NetworkConfig(merge_schedule="decreasing"))
    with pytest.raises(UserError, match="takes no rotary positions"):
        row.changed(NetworkConfig(position="rotary", attention="spatial_reduction"))
    with pytest.raises(UserError, match=r"network\.merge_tokens: a model of the family 'resnet'"):
        backbone_row("resnet18").changed(NetworkConfig(merge_tokens=2))
