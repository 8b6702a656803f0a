"""EfficientFormer: shapes, gradients, options. Against timm it is in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.efficientformer import (
    EFFICIENTFORMER,
    AttentionBlock,
    EfficientFormer,
    EfficientFormerConfig,
    PoolBlock,
    offset_bias,
    offset_indices,
)
from saccade.backbones.features import Features
from saccade.models.classifier import Classifier

TINY = EfficientFormerConfig(
    depths=(1, 2, 1, 3),
    widths=(4, 6, 8, 12),
    attention_blocks=2,
    heads=2,
    head_dim=4,
    value_dim=5,
    grid=3,
    layer_scale=0.5,
)
OPTIONS = {"tiny": TINY, "all_attention": replace(TINY, attention_blocks=3, expansion=2)}
options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())

PUBLISHED = {"efficientformer_l1": 12.3, "efficientformer_l3": 31.4}  # millions, in the paper's table 3


def tiny(config: EfficientFormerConfig) -> EfficientFormer:
    """With every factor, shift, bias and statistic its own, so that every branch shows."""
    torch.manual_seed(0)
    model = EfficientFormer(config)
    for name, value in model.state_dict().items():
        if value.ndim == 1 or "bias_table" in name:
            value.copy_(0.3 * torch.randn_like(value) + (0 if "bias" in name or name.endswith("mean") else 1))
            if name.endswith("var"):
                value.abs_().add_(0.1)
        elif value.ndim == 2:
            value.copy_(0.3 * torch.randn_like(value))
    return model


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("name", EFFICIENTFORMER)
def test_every_row_has_the_shapes_and_size_it_promises(name):
    row = EFFICIENTFORMER[name]
    with torch.device("meta"):
        backbone = EfficientFormer(row).eval()
    heads = 2 * (row.widths[-1] + 1) * 1000  # published with the two that are one here
    assert round((sum(p.numel() for p in backbone.parameters()) + heads) / 1e6, 1) == PUBLISHED[name]
    features = backbone(torch.empty(2, 3, 224, 320, device="meta"))
    assert isinstance(features, Features)
    assert features.strides == backbone.strides == (4, 8, 16, 32) and row.stride == 32
    assert [m.shape for m in features.maps] == [
        (2, width, 224 // stride, 320 // stride)
        for width, stride in zip(backbone.channels, features.strides, strict=True)
    ]
    assert features.summary.shape == (2, row.widths[-1])
    assert sum(isinstance(layer, AttentionBlock) for layer in backbone.layers) == row.attention_blocks


@options
@pytest.mark.parametrize("size", [(96, 96), (64, 224), (320, 32), (45, 70), (1, 1)], ids=str)
def test_features_of_any_shape(config, size):
    model = tiny(config).eval()
    features = model(torch.randn(2, 3, *size))
    for found, width, stride in zip(features.maps, model.channels, model.strides, strict=True):
        assert found.shape == (2, width, -(-size[0] // stride), -(-size[1] // stride))
        assert found.isfinite().all() and found.std() > 0
    torch.testing.assert_close(features.summary, features.maps[-1].mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)


def test_offset_bias_is_that_of_every_pair():
    table = torch.randn(2, 12)
    bias = offset_bias(table, (3, 4))
    assert bias.shape == (2, 12, 12)
    for i in range(12):
        for j in range(12):
            rows, columns = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            assert torch.equal(bias[:, i, j], table[:, rows * 4 + columns])
    assert torch.equal(offset_indices((3, 4)), offset_bias(torch.arange(12.0)[None], (3, 4))[0].long())


@pytest.mark.parametrize("wanted", [(5, 5), (2, 7), (9, 3), (1, 4), (1, 1)], ids=str)
def test_offset_bias_of_another_grid_is_interpolated(wanted):
    """Straight lines stay straight: of a table that is linear in both offsets, every value is known."""
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    table = torch.stack((1 + rows / 2, 10 + columns / 3)).flatten(1)  # up to 2 and 11
    bias = offset_bias(table, (3, 4), wanted)
    h, w = wanted
    for i in range(h * w):
        for j in range(h * w):
            down, across = abs(i // w - j // w) / max(1, h - 1), abs(i % w - j % w) / max(1, w - 1)
            assert bias[0, i, j].item() == pytest.approx(1 + down, abs=1e-6)
            assert bias[1, i, j].item() == pytest.approx(10 + across, abs=1e-5)


def test_offset_bias_of_its_own_grid_is_exact():
    table = torch.randn(8, 49)
    assert torch.equal(offset_bias(table, (7, 7), (7, 7)), table[:, offset_indices((7, 7))])


@options
@pytest.mark.parametrize("size", [(96, 96), (64, 128)], ids=str)
def test_gradient_reaches_every_parameter(config, size):
    model = Classifier(tiny(config), 5)
    F.cross_entropy(model(torch.randn(4, 3, *size)).logits, torch.tensor([0, 1, 2, 3])).backward()
    idle = (".conv.bias", "qkv.bias")  # before batch norm a shift is taken off again; of keys, softmax forgets it
    for name, gradient in take_gradients(model).items():
        assert gradient.isfinite().all(), name
        assert name.endswith(idle) or gradient.abs().max() > 1e-7, name


def test_summary_is_made_of_the_last_map():
    """So that gradients of a prediction with respect to the map explain it."""
    features = tiny(TINY).eval()(torch.randn(2, 3, 64, 96))
    (gradient,) = torch.autograd.grad(features.summary.sum(), features.maps[-1])
    assert (gradient - 1 / 6).abs().max() <= 1e-6  # 2 x 3 places


@options
def test_activation_checkpointing_changes_nothing(config):
    """Neither gradients nor statistics, bitwise, with stochastic depth: the second pass draws what the first drew."""
    images = torch.randn(4, 3, 64, 96)
    found = []
    for checkpointing in (False, True):
        model = tiny(replace(config, drop_path=0.5)).train()
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        summary = model.summary(images)
        (summary * torch.linspace(-1, 1, summary.numel()).view_as(summary)).sum().backward()
        found.append(
            {"summary": summary, **take_gradients(model), **{f"after {n}": v for n, v in model.state_dict().items()}}
        )
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@options
def test_batch_mates_change_nothing(config):
    model = tiny(config).eval()
    images = torch.randn(5, 3, 64, 96)
    with torch.no_grad():
        together = model.summary(images)
        images[1:] = 100 * torch.randn(4, 3, 64, 96)
        assert torch.equal(model.summary(images)[:1], together[:1])
        alone = model.summary(images[:1])
    assert (alone - together[:1]).abs().max() <= 1e-5 * together.abs().max()  # measured 4e-7


@pytest.mark.parametrize("kind", [PoolBlock, AttentionBlock])
def test_stochastic_depth_drops_whole_samples(kind):
    """Of 64 samples that are alike, those that lose both branches come out as they went in; the rest are scaled."""
    model = tiny(replace(TINY, drop_path=0.5)).train()
    block, rate = [(layer, layer.drop_path) for layer in model.layers if isinstance(layer, kind)][-1]
    x = torch.randn(1, 12, 3, 3) if kind is PoolBlock else torch.randn(1, 9, 12)
    inputs = (x.expand(64, *x.shape[1:]).contiguous(), *(() if kind is PoolBlock else ((3, 3),)))
    torch.manual_seed(0)
    dropped = (block(*inputs) == x).flatten(1).all(dim=1).float().mean().item()
    assert isinstance(rate, float) and dropped == pytest.approx(rate**2, abs=0.15)
    model.eval()
    assert not (block(*inputs) == x).flatten(1).all(dim=1).any()


def test_drop_path_rises_from_block_to_block_and_is_off_in_evaluation():
    still, wild = tiny(TINY).eval(), tiny(replace(TINY, drop_path=0.6)).eval()
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(still.summary(images), wild.summary(images))
    assert [block.drop_path for block in wild.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_residuals_stay_float32_under_autocast():
    """LayerScale begins at 1e-5; added to bfloat16, nothing of a branch would be left."""
    torch.manual_seed(0)
    model = EfficientFormer(EFFICIENTFORMER["efficientformer_l1"]).eval()
    block = model.layers[0]
    x = torch.rand(1, 48, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        features = model(torch.randn(1, 3, 64, 96))
    assert y.dtype == torch.float32 and not torch.equal(y, x.float())
    assert features.summary.isfinite().all()


def test_attention_in_the_last_stage_is_needed():
    for blocks in (0, 4):
        with pytest.raises(ValueError, match=f"{blocks} blocks with attention in a last stage of 3"):
            EfficientFormer(replace(TINY, attention_blocks=blocks))


def test_every_parameter_has_a_depth():
    model = Classifier(tiny(TINY), 5)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(sum(TINY.depths) + 2))
    assert depths["backbone.stem.1.conv.weight"] == 0
    assert depths["backbone.merges.0.conv.weight"] == depths["backbone.stages.1.0.scale1"] == 2
    assert depths["backbone.stages.3.2.attention.bias_table"] == 7
    assert depths["head.weight"] == depths["backbone.norm.weight"] == 8
    assert model.backbone.layers[2] is model.backbone.get_submodule("stages.1.1")
