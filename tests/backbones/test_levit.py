from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from saccade.backbones.levit import LEVIT, LeViT, LeViTConfig, OffsetBias
from saccade.models.classifier import Classifier

TINY = LeViTConfig(dims=(16, 24, 32), depths=(1, 2, 1), heads=(2, 2, 3), key_dim=8, image_size=96)
# Published, with 1000 classes and without distillation's second classifier, in millions
PUBLISHED = {"levit_128s": 7.4, "levit_128": 8.8, "levit_192": 10.5, "levit_256": 18.4, "levit_384": 38.4}


def tiny(**changes: float) -> LeViT:
    """Every branch is on, and biases show."""
    torch.manual_seed(0)
    model = LeViT(replace(TINY, **changes))  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
        if isinstance(module, OffsetBias):
            torch.nn.init.normal_(module.table)
    return model


@pytest.mark.parametrize("name", LEVIT)
def test_every_row_has_the_shapes_it_promises(name):
    row = LEVIT[name]
    with torch.device("meta"):
        model = Classifier(LeViT(row), 1000).eval()
        single = Classifier(LeViT(replace(row, summaries=1)), 1000)
        features = model.backbone(torch.empty(2, 3, 224, 224))
    assert [m.shape[1:] for m in features.maps] == [(row.dims[0], 14, 14), (row.dims[1], 7, 7), (row.dims[2], 4, 4)]
    assert features.strides == model.backbone.strides == (16, 32, 64) and model.backbone.channels == row.dims
    assert features.summary.shape == (2, model.backbone.summary_channels) == (2, 2 * row.dims[-1])
    assert sum(p.numel() for p in single.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.05)
    assert row.about


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (50, 75)], ids=str)
def test_features_of_any_size(size):
    features = tiny().eval()(torch.randn(2, 3, *size))
    for m, stride in zip(features.maps, features.strides, strict=True):
        assert m.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert m.isfinite().all()


def test_biases_are_by_distance_and_interpolated_from_end_to_end():
    bias = OffsetBias(2, (3, 3), stride=1)
    torch.nn.init.normal_(bias.table)
    found = bias((3, 3))
    assert found.shape == (1, 2, 9, 9)
    for query in range(9):
        for key in range(9):
            down, across = abs(query // 3 - key // 3), abs(query % 3 - key % 3)
            assert torch.equal(found[0, :, query, key], bias.table[:, down, across])
    halving = OffsetBias(2, (5, 3), stride=2)
    torch.nn.init.normal_(halving.table)
    found = halving((5, 3))
    assert found.shape == (1, 2, 6, 15), "three rows of two ask"
    assert torch.equal(found[0, :, 5, 4], halving.table[:, 3, 1]), "the query at (4, 2), the key at (1, 1)"
    larger = bias((5, 7))
    torch.testing.assert_close(larger[0, :, 0, 0], bias.table[:, 0, 0])
    torch.testing.assert_close(larger[0, :, 0, -1], bias.table[:, -1, -1])


def test_a_checkpoint_of_another_resolution_fits_after_its_biases_are_interpolated():
    old, new = tiny(), LeViT(replace(TINY, image_size=160)).eval()
    weights = dict(old.state_dict())
    notes = new.adapt(weights, old.config)
    assert notes[0] == "attention biases interpolated from 6x6 to 10x10" and len(notes) == 3
    new.load_state_dict(weights)
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(new.summary(images), old.eval().summary(images)), "as the old one would at this size"
    assert not old.adapt(dict(old.state_dict()), old.config)


def test_batch_mates_do_not_matter():
    model = tiny().eval()
    images = torch.randn(3, 3, 64, 96)
    together = model.summary(images)
    for i in range(3):
        torch.testing.assert_close(model.summary(images[i : i + 1])[0], together[i], rtol=0, atol=1e-5)


def test_gradient_reaches_every_parameter_and_predicting_before_does_not_matter():
    model = Classifier(tiny(), 5)
    with torch.inference_mode():
        model.eval()(torch.randn(1, 3, 48, 80))
    loss = F.cross_entropy(model.train()(torch.randn(4, 3, 48, 80)).logits, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_neither_gradients_nor_statistics():
    images = torch.randn(4, 3, 64, 96)
    found = []
    for checkpointing in (False, True):
        model = tiny(drop_path=0.5).train()
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        (model.summary(images) ** 3).mean().backward()
        found.append((model, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (again, gradients_again) = found
    for name, gradient in gradients.items():
        other = gradients_again[name]
        assert gradient is not None and other is not None
        assert (gradient - other).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
    for (name, value), other in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_depth_is_counted_along_the_blocks():
    model = tiny(drop_path=0.4)
    depths = [model.depth_of(name) for name, _ in model.named_parameters()]
    assert depths == sorted(depths) and set(depths) == set(range(len(model.layers) + 2))
    rates = [float(layer.drop_path) for layer in model.layers]  # pyright: ignore[reportArgumentType]
    assert rates == sorted(set(rates)) and rates[-1] == pytest.approx(0.4)
