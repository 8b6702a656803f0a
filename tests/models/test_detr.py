"""DETR: shapes, gradients, learning, the network of its row. Against transformers it is in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.backbones.resnet import ResNetConfig
from saccade.backbones.swin import SwinConfig
from saccade.config import NetworkConfig
from saccade.models import DETECTORS, build_network, name_of, read_row, task_of
from saccade.models.detector import BoxTargets
from saccade.models.detr import DETR, Detr, DETRConfig
from saccade.tasks import set_loss

BODY = ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False, widths=(8, 8, 16, 16), stem=8)
TINY = DETRConfig(
    backbone=BODY, dim=32, heads=4, hidden=64, encoder_depth=1, decoder_depth=2, queries=7, dropout=0.1, image_size=64
)
# https://arxiv.org/abs/2005.12872, table 1, in millions
PUBLISHED = {"detr_resnet50": 41, "detr_resnet50_dc5": 41, "detr_resnet101": 60, "detr_resnet101_dc5": 60}


def detr(row: DETRConfig = TINY, classes: int = 3) -> Detr:
    torch.manual_seed(0)
    network = build_network(row, classes)
    assert isinstance(network, Detr)
    return network


def targets() -> BoxTargets:
    """Two things in the first picture, none in the second."""
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.3], [0.7, 0.6, 0.2, 0.5]])
    return BoxTargets(boxes, torch.tensor([2, 0]), torch.tensor([0, 0]))


def total(network: Detr, images: Tensor) -> Tensor:
    return torch.stack(list(set_loss.DETR(network(images), targets()).values())).sum()


@pytest.mark.parametrize("name", DETR)
def test_every_row_has_the_size_that_was_published(name):
    row = DETECTORS[name]
    with torch.device("meta"):
        network = build_network(row, 91)
    assert sum(p.numel() for p in network.parameters()) // 1_000_000 == PUBLISHED[name]
    assert row.stride == (16 if "dc5" in name else 32) and row.image_size % row.stride == 0
    assert (task_of(row), name_of(row)) == ("detect", name)
    assert read_row(row.to_dict(), "a test") == row


def test_shapes_for_any_picture():
    network = detr().eval()
    outputs = network(torch.randn(2, 3, 64, 96))
    assert len(outputs.layers) == TINY.decoder_depth and outputs.encoder is None
    assert outputs.logits.shape == (2, 7, 4) and outputs.boxes.shape == (2, 7, 4)
    assert all(each.boxes.min() > 0 and each.boxes.max() < 1 for each in outputs.layers)
    outputs, maps = network.with_maps(torch.randn(1, 3, 96, 32))
    assert maps.shape == (1, 7, 3, 1) and outputs.logits.shape == (1, 7, 4)


def test_maps_are_where_queries_looked():
    network = detr().eval()
    images = torch.randn(2, 3, 64, 96)
    outputs, maps = network.with_maps(images)
    plain = network(images)
    for one, other in zip(outputs.layers, plain.layers, strict=True):
        assert (one.logits - other.logits).abs().max() <= 1e-5  # measured 4.8e-7
        assert (one.boxes - other.boxes).abs().max() <= 1e-5
    assert maps.min() >= 0 and (maps.sum(dim=(2, 3)) - 1).abs().max() <= 1e-5
    assert maps.std(dim=(2, 3)).min() > 0


def test_results_do_not_depend_on_batch_mates():
    network = detr().eval()
    images = torch.randn(3, 3, 64, 64)
    together, alone = network(images), network(images[1:2])
    assert (together.logits[1] - alone.logits[0]).abs().max() <= 1e-5
    assert (together.boxes[1] - alone.boxes[0]).abs().max() <= 1e-5


def test_gradient_reaches_every_parameter():
    network = detr().train()
    with torch.no_grad():
        for parameter in network.parameters():  # some begin as zeros, and would let nothing through
            parameter.add_(0.05 * torch.randn_like(parameter))
    total(network, torch.randn(2, 3, 64, 64)).backward()
    # queries begin as zeros, so the first block mixes equal values, however it mixes them
    without = {"decoder.0.self_attention.qkv.weight"}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() > 1e-7) == (name not in without), name


def test_no_things_at_all():
    """Every parameter gets a gradient, as many processes that wait for each other need."""
    network = detr().train()
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    losses = set_loss.DETR(network(torch.randn(2, 3, 64, 64)), nothing)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_overfits_one_batch():
    row = replace(TINY, dropout=0.0)
    network = detr(row).train()
    images = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    first = total(network, images).item()
    for _ in range(150):
        loss = total(network, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    outputs = network.eval()(images)
    scores, labels = outputs.logits.softmax(dim=-1)[..., :-1].max(dim=-1)
    assert (scores[0] > 0.5).sum() == 2 and (scores[1] > 0.5).sum() == 0
    found = {int(labels[0, q]): outputs.boxes[0, q] for q in (scores[0] > 0.5).nonzero().flatten()}
    assert (found[2] - targets().boxes[0]).abs().max() < 0.05 and (found[0] - targets().boxes[1]).abs().max() < 0.05


def test_activation_checkpointing_changes_nothing():
    images = torch.randn(2, 3, 64, 64)
    found = []
    for checkpointing in (False, True):
        network = detr(replace(TINY, backbone=replace(BODY, frozen_norm=True))).train()
        network.backbone.activation_checkpointing = checkpointing
        torch.manual_seed(1)  # of dropout
        loss = total(network, images)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_settings_of_a_run():
    row = TINY.changed(NetworkConfig(dropout=0.3, frozen_norm=True, drop_path=0.2), 96)
    assert isinstance(row, DETRConfig) and isinstance(row.backbone, ResNetConfig)
    assert (row.dropout, row.image_size, row.backbone.image_size) == (0.3, 96, 96)
    assert row.backbone.frozen_norm and row.backbone.drop_path == 0.2
    assert row.is_like(TINY) and not row.is_like(replace(TINY, queries=8))
    assert not row.is_like(replace(TINY, backbone=replace(BODY, depths=(1, 1, 1, 2))))


def test_any_backbone():
    body = SwinConfig(dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), windows=(2, 2, 2, 2), image_size=64)
    network = detr(replace(TINY, backbone=body)).eval()
    assert network(torch.randn(1, 3, 64, 96)).boxes.shape == (1, 7, 4)
    assert read_row(network.config.to_dict(), "a test") == network.config


def test_parts_for_training():
    network = detr()
    assert len(network.layers) == 4 + 1 + 2
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    assert all(shapes[name][0] == 3 + 1 for name in network.class_tensors())
    assert network.depth_of("backbone.stages.0.0.convs.0.conv.weight") == 1
    assert network.depth_of("encoder.0.norm1.weight") == network.depth


def test_boxes_stay_in_float32():
    """A step of bfloat16 near 1 is four pixels of a thousand."""
    network = detr().to(torch.bfloat16).eval()
    outputs = network(torch.randn(2, 3, 64, 96, dtype=torch.bfloat16))
    assert all(each.boxes.dtype == torch.float32 for each in outputs.layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert detr().eval()(torch.randn(2, 3, 64, 96)).boxes.dtype == torch.float32
