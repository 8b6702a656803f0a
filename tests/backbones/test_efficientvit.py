from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from saccade.backbones.efficientvit import (
    EFFICIENTVIT,
    ConvNormHardswish,
    EfficientViT,
    EfficientViTBlock,
    EfficientViTConfig,
    InvertedResidual,
    linear_attention,
)
from saccade.models.classifier import Classifier

TINY = EfficientViTConfig(
    widths=(4, 8, 8, 16, 16), depths=(1, 2, 1, 2, 1), head_dim=8, summary_widths=(24, 20), image_size=64
)
# Published, with 1000 classes, in millions: https://arxiv.org/abs/2205.14756 (b1 to b3)
PUBLISHED = {"efficientvit_b0": 3.4, "efficientvit_b1": 9.1, "efficientvit_b2": 24.3, "efficientvit_b3": 48.6}


def tiny(**changes: float) -> EfficientViT:
    """Its statistics and factors are no longer zeros and ones, so that each shows."""
    torch.manual_seed(0)
    model = EfficientViT(replace(TINY, **changes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", EFFICIENTVIT)
def test_every_row_has_the_shapes_it_promises(name):
    row = EFFICIENTVIT[name]
    with torch.device("meta"):
        model = Classifier(EfficientViT(row), 1000).eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[name]
    backbone = model.backbone
    for H, W in [(224, 224), (96, 160)]:
        features = backbone(torch.empty(2, 3, H, W, device="meta"))
        assert features.strides == backbone.strides == (4, 8, 16, 32) and backbone.channels == row.widths[1:]
        expected = [(2, C, H // s, W // s) for C, s in zip(backbone.channels, backbone.strides, strict=True)]
        assert [m.shape for m in features.maps] == expected
        assert features.summary.shape == (2, backbone.summary_channels)
    assert row.stride == 32 and row.about


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 75), (33, 31)], ids=str)
def test_features_of_any_size(size):
    features = tiny().eval()(torch.randn(2, 3, *size))
    for m, stride in zip(features.maps, features.strides, strict=True):
        assert m.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)), "each halving rounds up"
        assert m.isfinite().all() and m.std() > 1e-3
    assert features.summary.std() > 0.1


def test_batch_mates_do_not_matter():
    model = tiny().eval()
    images = torch.randn(3, 3, 64, 96)
    together = model.summary(images)
    for i in range(3):
        torch.testing.assert_close(model.summary(images[i : i + 1])[0], together[i], rtol=0, atol=2e-6)


def test_the_memory_format_of_pictures_and_recording_gradients_do_not_matter():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    before = images.clone()
    expected = model.summary(images)
    with torch.no_grad():
        without = model.summary(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(without, expected, rtol=0, atol=2e-6)
    assert torch.equal(images, before), "nothing is done in place to the caller's pictures"


def test_maps_are_not_changed_by_what_comes_after():
    model = tiny().eval()
    kept: list[Tensor] = []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _inputs, output: kept.append(output.clone()))
    with torch.no_grad():
        features = model(torch.randn(1, 3, 64, 64))
    ends = [sum(len(list(stage.children())) for stage in model.stages[: i + 1]) - 1 for i in range(4)]
    for end, m in zip(ends, features.maps, strict=True):
        assert torch.equal(kept[end], m)


def attention_by_rows(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """As the paper writes it, with the scores of every pair of tokens."""
    scores = q.relu().transpose(-2, -1) @ k.relu()  # (B, H, N, N)
    return ((scores @ v.transpose(-2, -1)) / (scores.sum(dim=-1, keepdim=True) + eps)).transpose(-2, -1)


def test_linear_attention_is_attention_with_relu():
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 3, 8, 30, dtype=torch.float64)
    qk, v = qkv[:, :, :2], qkv[:, :, 2]
    expected = attention_by_rows(qk[:, :, 0], qk[:, :, 1], v, 1e-5)
    assert (linear_attention(qk, v, eps=1e-5) - expected).abs().max() < 1e-13
    qk[0, 0, 0, :, 3] = -1.0  # a query that nothing answers
    found = linear_attention(qk.requires_grad_(), v, eps=1e-15)
    assert found[0, 0, :, 3].abs().max() == 0 and found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.square().sum(), qk)
    assert gradient.isfinite().all()


def test_linear_attention_keeps_float32_in_half_precision():
    """The divisor of 4,096 tokens is far over the largest number of float16."""
    torch.manual_seed(0)
    qkv = 10 * torch.randn(1, 2, 3, 16, 4096)
    halves = qkv.half()
    expected = linear_attention(halves.float()[:, :, :2], halves.float()[:, :, 2], eps=1e-5)
    found = linear_attention(halves[:, :, :2], halves[:, :, 2], eps=1e-5)
    assert found.dtype == torch.float16 and found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(qkv[:, :, :2], qkv[:, :, 2], eps=1e-5)
    assert torch.equal(found, linear_attention(qkv[:, :, :2], qkv[:, :, 2], eps=1e-5))


def test_the_norm_with_hardswish_is_the_two_one_after_the_other():
    torch.manual_seed(0)
    layer = ConvNormHardswish(3, 6, 3, 2).double().train()
    nn.init.normal_(layer.norm.weight, mean=2.0)
    nn.init.normal_(layer.norm.bias)
    apart = copy.deepcopy(layer)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    results = []
    for module, y in ((layer, layer(x)), (apart, F.hardswish(apart.norm(apart.conv(x))))):
        wanted = [x, *module.parameters()]
        results.append([y, *torch.autograd.grad(y.sin().sum(), wanted), *module.buffers()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(layer, x[:, :, :4, :4])


def test_trains_under_autocast():
    model = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.summary(torch.randn(2, 3, 64, 64)).square().mean()
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_gradient_reaches_every_parameter():
    model = Classifier(tiny(), 5).train()
    loss = F.cross_entropy(model(torch.randn(4, 3, 64, 64)).logits, torch.tensor([0, 1, 2, 3]))
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, loss).values())


def test_checkpointing_changes_neither_gradients_nor_statistics():
    images = torch.randn(4, 3, 64, 96)
    found = []
    for checkpointing in (False, True):
        model = tiny(drop_path=0.5).train()
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        found.append((gradients(model, model.summary(images).square().mean()), dict(model.named_buffers())))
    (plain, statistics), (again, statistics_again) = found
    for name, gradient in plain.items():
        assert (gradient - again[name]).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
    for name, value in statistics.items():
        assert torch.equal(value, statistics_again[name]), name


def test_drop_path_grows_with_depth_and_drops_whole_branches():
    branches = [layer for layer in tiny(drop_path=0.4).layers if getattr(layer, "shortcut", True)]
    rates = [float(branch.drop_path) for branch in branches]  # pyright: ignore[reportArgumentType]
    assert rates[0] > 0.0 and rates == sorted(set(rates)) and rates[-1] == pytest.approx(0.4)
    images = torch.randn(64, 4, 8, 8)
    torch.manual_seed(0)
    kept = InvertedResidual(4, 4, expansion=2, drop_path=0.5).train()(images) - images
    dropped = (kept.flatten(1).abs().amax(dim=1) == 0).sum()
    assert 16 < dropped < 48
    block = EfficientViTBlock(16, replace(TINY, drop_path=0.5), 0.5).train()
    x = torch.randn(64, 16, 4, 4)
    assert 4 < ((block(x) - x).flatten(1).abs().amax(dim=1) == 0).sum() < 32, "both branches, a quarter of the time"


def test_depth_is_counted_along_the_blocks():
    model = tiny()
    n = len(model.layers)
    assert n == sum(TINY.depths[1:]) + 2
    depths = [model.depth_of(name) for name, _ in model.named_parameters()]
    assert depths == sorted(depths) and set(depths) == set(range(n + 2))
    for i, layer in enumerate(model.layers):
        own = {id(p) for p in layer.parameters()}
        assert {model.depth_of(name) for name, p in model.named_parameters() if id(p) in own} == {i + 1}


def test_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model = Classifier(tiny(), 4).train()
    images, labels = torch.randn(8, 3, 32, 64), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1.2 < losses[0]
