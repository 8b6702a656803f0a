"""LW-DETR and RF-DETR: sizes, groups, proposals, maps, learning. Against transformers they are in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.backbones.resnet import ResNetConfig
from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.config import NetworkConfig
from saccade.models import DETECTORS, build_network, name_of, read_row, task_of
from saccade.models.detector import BoxTargets
from saccade.models.lw_detr import LW_DETR, LWDetr, LWDETRConfig, Proposer, RFDETRConfig, boxes_of_places, refined
from saccade.tasks import lw_detr_loss

BODY = WindowedViTConfig(
    dim=24, depth=2, heads=2, hidden=48, patch_size=8, grid=4, windows=2, whole=(1,), taken=(1, 2), layer_scale=0.1,
    key_bias=False, image_size=64,
)  # fmt: skip
LW = LWDETRConfig(
    backbone=BODY, dim=32, heads=2, cross_heads=4, hidden=64, decoder_depth=2, queries=5, groups=3, image_size=64
)
LEVELS = replace(LW, scales=(2.0, 0.5))
RF = RFDETRConfig(
    backbone=replace(BODY, class_token=True, norm=True, key_bias=True, layer_scale=1.0), dim=32, heads=2, cross_heads=4,
    hidden=64, decoder_depth=2, queries=5, groups=3, image_size=64,
)  # fmt: skip
rows = pytest.mark.parametrize("row", [LW, LEVELS, RF], ids=["lw_detr", "two levels", "rf_detr"])
# in millions: table 1 of https://arxiv.org/abs/2406.03459, and the RF-DETR project's list of models
PUBLISHED = {
    "lw_detr_tiny": 12.1,
    "lw_detr_small": 14.6,
    "lw_detr_medium": 28.2,
    "lw_detr_large": 46.8,
    "lw_detr_xlarge": 118.0,
    "rf_detr_nano": 30.5,
    "rf_detr_small": 32.1,
    "rf_detr_medium": 33.7,
    "rf_detr_base": 32.2 - 1.8,  # whose last block does nothing, and is not here
    "rf_detr_large": 33.9,
}


def detr(row: LWDETRConfig = LW, classes: int = 3) -> LWDetr:
    torch.manual_seed(0)
    network = build_network(row, classes)
    assert isinstance(network, LWDetr)
    return network


def stirred(network: LWDetr) -> LWDetr:
    """Some parameters begin as zeros, and would let nothing through."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def targets() -> BoxTargets:
    """Two things in the first picture, none in the second."""
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.3], [0.7, 0.6, 0.2, 0.5]])
    return BoxTargets(boxes, torch.tensor([2, 0]), torch.tensor([0, 0]))


def total(network: LWDetr, images: Tensor, wanted: BoxTargets | None = None) -> Tensor:
    losses = lw_detr_loss.LW_DETR(network(images), targets() if wanted is None else wanted)
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("name", LW_DETR)
def test_every_row_has_the_size_that_was_published(name):
    row = DETECTORS[name]
    with torch.device("meta"):
        network = build_network(row, 91)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.051)
    assert row.image_size % row.stride == 0 and row.image_size == row.backbone.image_size
    assert (task_of(row), name_of(row)) == ("detect", name)
    assert read_row(row.to_dict(), "a test") == row and type(read_row(row.to_dict(), "a test")) is type(row)


@rows
def test_shapes_for_any_picture(row):
    network = stirred(detr(row)).eval()
    outputs = network(torch.randn(2, 3, 64, 96))
    assert (len(outputs.layers), outputs.groups) == (2, 1) and outputs.encoder is not None
    for each in (*outputs.layers, outputs.encoder):
        assert each.logits.shape == (2, 5, 3) and each.boxes.shape == (2, 5, 4)
    network.train()
    outputs = network(torch.randn(2, 3, 64, 96))
    assert outputs.groups == 3 and outputs.encoder is not None
    assert outputs.logits.shape == (2, 15, 3) and outputs.encoder.boxes.shape == (2, 15, 4)


def test_a_picture_of_fewer_places_than_queries():
    row = replace(LW, queries=10)
    for network in (detr(row).eval(), detr(row).train()):
        groups = 3 if network.training else 1
        outputs = network(torch.randn(2, 3, 16, 32))  # of 2 x 4 patches
        assert outputs.logits.shape == (2, 8 * groups, 3) and outputs.boxes.isfinite().all()
        total(network, torch.randn(2, 3, 16, 16)).backward()


def test_groups_do_not_see_each_other():
    """The first group answers in training as it does alone, where nothing but groups depends on the mode."""
    network = stirred(detr(RF))  # without statistics of batches
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        together, alone = network.train()(images), network.eval()(images)
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert (one.logits[:, :5] - other.logits).abs().max() <= 1e-5
        assert (one.boxes[:, :5] - other.boxes).abs().max() <= 1e-5
        assert (one.logits[:, 5:10] - other.logits).abs().max() > 1e-3


def test_places_and_their_boxes():
    boxes = boxes_of_places(1, (2, 4), torch.device("cpu"), torch.float64)
    assert boxes.shape == (8, 4) and boxes[:, 2:].eq(0.1).all()
    assert boxes[5, :2].tolist() == [0.375, 0.75]
    half = refined(boxes[5], torch.tensor([1.0, -2.0, 0.0, torch.tensor(3.0).log()]).double())
    assert torch.allclose(half, torch.tensor([0.475, 0.55, 0.1, 0.3], dtype=torch.float64))


def test_the_surest_places_are_chosen():
    """At first, queries lie where they were chosen; the choice was made by what is said of classes there."""
    network = detr(replace(LW, groups=1)).eval()
    proposer = network.proposers[0]
    assert isinstance(proposer, Proposer)
    torch.nn.init.normal_(proposer.classes.weight)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = network(images)
        memory, shapes = network._encode(images)
        sure = proposer.classes(proposer.entry(memory)).amax(dim=-1)[0]
    assert shapes == [(8, 8)] and outputs.encoder is not None
    best = sure.topk(5)
    assert (outputs.encoder.logits[0].amax(dim=-1) - best.values).abs().max() <= 1e-5
    middles = torch.stack((best.indices % 8, best.indices // 8), dim=-1) / 8 + 1 / 16
    assert (outputs.encoder.boxes[0, :, :2] - middles).abs().max() <= 1e-6
    assert (outputs.boxes - outputs.encoder.boxes).abs().max() <= 1e-6 and outputs.boxes[..., 2:].eq(0.05).all()


def test_places_at_the_edge_of_a_large_picture_propose_nothing():
    """Of 64 cells, the middle of the first is at 0.8 % of the side."""
    network = detr(replace(LW, queries=4000, groups=1, backbone=replace(BODY, patch_size=4))).eval()
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, 256, 16))  # 64 rows of 4 cells
    assert outputs.encoder is not None and len(outputs.encoder.boxes[0]) == 256
    assert outputs.encoder.boxes[0, :248, 1].min() > 0.01 and outputs.encoder.boxes[0, :248, 1].max() < 0.99
    assert outputs.encoder.boxes[0, 248:, 1].sub(0.5).abs().min() > 0.49


@rows
def test_maps_are_where_queries_looked(row):
    network = stirred(detr(row)).eval()
    images = torch.randn(2, 3, 64, 96)
    outputs, maps = network.with_maps(images)
    with torch.autocast("cpu", torch.bfloat16):
        _, coarse = network.with_maps(images)
    assert coarse.shape == maps.shape and coarse.isfinite().all()
    plain = network(images)
    for one, other in zip(outputs.layers, plain.layers, strict=True):
        assert (one.logits - other.logits).abs().max() <= 1e-5
        assert (one.boxes - other.boxes).abs().max() <= 1e-5
    assert maps.shape == (2, 5, 8, 12) and maps.min() >= 0 and maps.sum(dim=(2, 3)).max() <= 1 + 1e-5
    assert maps.sum() > 0.5 * maps.shape[0] * maps.shape[1]
    # the centre of what a query took lies near its box
    y, x = (torch.arange(n) + 0.5 for n in (8, 12))
    weight = maps.sum(dim=(2, 3))
    centre = torch.stack(((maps.sum(dim=2) * x).sum(-1) / weight / 12, (maps.sum(dim=3) * y).sum(-1) / weight / 8), -1)
    assert (centre - outputs.boxes[..., :2]).abs().median() < 0.15


def test_results_do_not_depend_on_batch_mates():
    network = stirred(detr(LEVELS)).eval()
    images = torch.randn(3, 3, 64, 64)
    together, alone = network(images), network(images[1:2])
    assert (together.logits[1] - alone.logits[0]).abs().max() <= 1e-5
    assert (together.boxes[1] - alone.boxes[0]).abs().max() <= 1e-5


@rows
def test_gradient_reaches_every_parameter(row):
    network = stirred(detr(row)).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics of batches undo shifts that come before
            module.eval()
    total(network, torch.randn(2, 3, 64, 64)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


def test_every_parameter_of_the_first_rf_detr_has_a_use():
    """As processes need that wait for each other's gradients."""
    row = DETECTORS["rf_detr_base"]
    assert isinstance(row.backbone, WindowedViTConfig)
    body = replace(row.backbone, dim=24, heads=2, hidden=48, patch_size=4, grid=4)
    network = stirred(detr(replace(RF, backbone=body))).train()
    total(network, torch.randn(1, 3, 32, 32)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_no_things_at_all():
    network = detr().train()
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    total(network, torch.randn(2, 3, 64, 64), nothing).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("row", [LW, RF], ids=["lw_detr", "rf_detr"])
def test_overfits_one_batch(row):
    network = detr(replace(row, groups=2)).train()
    images = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    first = total(network, images).item()
    for _ in range(160):
        loss = total(network, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    network.eval()
    if row is LW:  # statistics of two pictures are those of training
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()
    outputs = network(images)
    scores, labels = outputs.logits.sigmoid().max(dim=-1)
    assert (scores[0] > 0.5).sum() == 2 and (scores[1] > 0.5).sum() == 0
    found = {int(labels[0, q]): outputs.boxes[0, q] for q in (scores[0] > 0.5).nonzero().flatten()}
    assert (found[2] - targets().boxes[0]).abs().max() < 0.05 and (found[0] - targets().boxes[1]).abs().max() < 0.05


def test_bfloat16():
    """References are in float32; every parameter still learns, what was asked without a gradient before included."""
    network = stirred(detr(RF)).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(2, 3, 64, 64))
        losses = lw_detr_loss.LW_DETR(outputs, targets())
    assert outputs.boxes.dtype == torch.float32 and outputs.logits.dtype == torch.bfloat16
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_activation_checkpointing_changes_nothing():
    images = torch.randn(2, 3, 64, 64)
    found = []
    for checkpointing in (False, True):
        network = stirred(detr(replace(LW, dropout=0.2))).train()
        network.backbone.activation_checkpointing = checkpointing
        torch.manual_seed(1)  # of dropout
        loss = total(network, images)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_settings_of_a_run():
    row = LW.changed(NetworkConfig(dropout=0.3, drop_path=0.2), 96)
    assert isinstance(row, LWDETRConfig) and isinstance(row.backbone, WindowedViTConfig)
    assert (row.dropout, row.image_size, row.backbone.image_size, row.backbone.drop_path) == (0.3, 96, 96, 0.2)
    assert row.is_like(LW) and not row.is_like(replace(LW, queries=8)) and not LW.is_like(RF)
    assert LW.is_like(replace(LW, norm_eps=1e-3)) and not row.is_like(replace(LW, backbone=replace(BODY, grid=5)))


def test_any_backbone_whose_maps_have_one_size():
    body = ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False, widths=(8, 8, 16, 16), stem=8, dilated=True)
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors must match"):
        detr(replace(LW, backbone=body)).eval()(torch.randn(1, 3, 64, 64))


def test_parts_for_training():
    network = detr()
    assert len(network.layers) == 2 + 2
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    assert len(network.class_tensors()) == 2 * (1 + 3)
    assert all(shapes[name][0] == 3 for name in network.class_tensors())
    assert network.depth_of("backbone.blocks.1.norm1.weight") == 2
    assert network.depth_of("decoder.0.norm1.weight") == network.depth == 3
