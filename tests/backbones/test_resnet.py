"""ResNet: shapes, gradients, options. Against the libraries it is in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.features import Features
from saccade.backbones.resnet import RESNET, ResNet, ResNetConfig
from saccade.models.classifier import Classifier

TINY = ResNetConfig(depths=(1, 2, 1, 2), widths=(4, 6, 8, 10), stem=4, bottleneck=False)
OPTIONS = {
    "basic": TINY,
    "bottleneck": replace(TINY, bottleneck=True),
    "dilated": replace(TINY, dilated=True),
    "dilated_bottleneck": replace(TINY, dilated=True, bottleneck=True),
    "frozen": replace(TINY, frozen_norm=True, bottleneck=True),
}
options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())

# https://pytorch.org/vision/stable/models/resnet.html, with 1000 classes, in millions
PUBLISHED = {"resnet18": 11.7, "resnet34": 21.8, "resnet50": 25.6, "resnet101": 44.5}


def tiny(config: ResNetConfig, seed: int = 0) -> ResNet:
    """With every factor, shift and statistic its own, so that every branch shows."""
    torch.manual_seed(seed)
    model = ResNet(config)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.copy_(0.2 * torch.randn_like(value) + (0 if name.endswith(("bias", "mean")) else 1))
            if name.endswith("var"):
                value.abs_().add_(0.1)
    return model


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("name", RESNET)
def test_every_row_has_the_shapes_and_size_it_promises(name):
    with torch.device("meta"):
        model = Classifier(ResNet(RESNET[name]), 1000).eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[name]
    features = model.backbone(torch.empty(2, 3, 224, 320, device="meta"))
    assert isinstance(features, Features)
    assert features.strides == model.backbone.strides == (4, 8, 16, 32)
    widths = model.backbone.channels
    assert widths[-1] == (512 if name in ("resnet18", "resnet34") else 2048)
    assert [m.shape for m in features.maps] == [
        (2, width, 224 // stride, 320 // stride) for width, stride in zip(widths, features.strides, strict=True)
    ]
    assert features.summary.shape == (2, widths[-1])


@options
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (45, 70), (1, 1)], ids=str)
def test_features_of_any_shape(config, size):
    model = tiny(config).eval()
    features = model(torch.randn(2, 3, *size))
    for found, width, stride in zip(features.maps, model.channels, model.strides, strict=True):
        assert found.shape == (2, width, -(-size[0] // stride), -(-size[1] // stride))
        assert found.isfinite().all() and found.std() > 0
    assert torch.equal(features.summary, features.maps[-1].mean(dim=(2, 3)))


@options
def test_gradient_reaches_every_parameter(config):
    model = Classifier(tiny(config), 5)
    F.cross_entropy(model(torch.randn(4, 3, 64, 48)).logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, gradient in take_gradients(model).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-7, name


def test_summary_is_made_of_the_last_map():
    """So that gradients of a prediction with respect to the map explain it."""
    features = tiny(TINY).eval()(torch.randn(2, 3, 64, 96))
    (gradient,) = torch.autograd.grad(features.summary.sum(), features.maps[-1])
    assert (gradient - 1 / 6).abs().max() <= 1e-6  # 2 x 3 places


@options
def test_activation_checkpointing_changes_nothing(config):
    """Neither gradients nor statistics, bitwise, with stochastic depth: the second pass draws what the first drew."""
    images = torch.randn(4, 3, 64, 48)
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
    images = torch.randn(5, 3, 64, 48)
    with torch.no_grad():
        together = model.summary(images)
        images[1:] = 100 * torch.randn(4, 3, 64, 48)
        assert torch.equal(model.summary(images)[:1], together[:1])
        alone = model.summary(images[:1])
    assert (alone - together[:1]).abs().max() <= 1e-5 * together.abs().max()  # measured 4e-7


def test_drop_path_rises_from_block_to_block_and_is_off_in_evaluation():
    still, wild = tiny(TINY).eval(), tiny(replace(TINY, drop_path=0.5)).eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(still.summary(images), wild.summary(images))
    assert [block.drop_path for block in wild.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    wild.train()
    assert not torch.equal(wild.summary(images), wild.summary(images))


def test_a_new_network_passes_on_what_it_gets():
    """The last normalisation of every block begins with zeros; a frozen one, which never moves, with ones."""
    torch.manual_seed(0)
    block = ResNet(TINY).layers[0].eval()
    x = torch.rand(1, 4, 8, 8)
    assert torch.equal(block(x), x)
    frozen = ResNet(replace(TINY, frozen_norm=True)).layers[0].eval()
    assert not torch.equal(frozen(x), x)


def test_frozen_norm_stays_in_training_and_has_the_same_names():
    free, frozen = tiny(TINY), ResNet(replace(TINY, frozen_norm=True))
    assert not [name for name, _ in frozen.named_parameters() if "norm" in name]
    frozen.load_state_dict(free.state_dict(), strict=True)
    images = 3 + torch.randn(4, 3, 64, 64)
    frozen.train()
    summary = frozen.summary(images)
    torch.testing.assert_close(summary, free.eval().summary(images), rtol=1e-5, atol=1e-5)
    summary.sum().backward()
    after = frozen.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in free.state_dict().items())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("size", [(64, 96), (72, 40)], ids=str)
def test_dilation_adds_places_and_changes_none(kind, size):
    """At every second place, the last map is the plain network's of the same weights. Measured: 1.8e-15."""
    plain = tiny(OPTIONS[kind]).double().eval()
    fine = tiny(replace(OPTIONS[kind], dilated=True)).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, found = plain(images).maps, fine(images).maps
    assert found[3].shape[2:] == found[2].shape[2:] and fine.strides[-1] == fine.config.stride == 16
    assert (found[3][..., ::2, ::2] - expected[3]).abs().max() <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_every_parameter_has_a_depth():
    model = Classifier(tiny(TINY), 5)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(sum(TINY.depths) + 2))
    assert depths["backbone.stem.conv.weight"] == 0 and depths["head.weight"] == 7
    assert depths["backbone.stages.1.1.convs.0.conv.weight"] == 3
    assert model.backbone.layers[2] is model.backbone.get_submodule("stages.1.1")


def test_the_stem_is_computed_twice_and_counted_once() -> None:
    """Its end runs again in the backward pass: gradients and statistics are those of one run, to the bit."""
    plain, model = tiny(TINY).train(), tiny(TINY).train()
    images = torch.randn(2, 3, 40, 56)
    F.max_pool2d(plain.stem(images), 3, 2, 1).square().sum().backward()
    model._pooled(images).square().sum().backward()
    for (name, one), other in zip(plain.stem.named_parameters(), model.stem.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(plain.stem.named_buffers(), model.stem.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert model.stem.norm.num_batches_tracked == 1
