"""Deformable DETR: shapes, gradients, learning, the network of its row. Against transformers it is in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.backbones.resnet import ResNetConfig
from saccade.backbones.swin import SwinConfig
from saccade.config import NetworkConfig, PreprocessingConfig, RunConfig
from saccade.layers.boxes import iou, to_corners
from saccade.layers.deformable import DeformableAttention
from saccade.models import DETECTORS, build_network, name_of, read_row, task_of
from saccade.models.deformable_detr import DEFORMABLE_DETR, DeformableDetr, DeformableDETRConfig
from saccade.models.detector import BoxTargets
from saccade.tasks import set_loss
from saccade.weights.load import initial_network
from saccade.weights.model_file import ModelCard, save_model

BODY = ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False, widths=(8, 8, 16, 16), stem=8)
PLAIN = DeformableDETRConfig(
    backbone=BODY, dim=64, heads=4, hidden=64, encoder_depth=1, decoder_depth=2, queries=7, dropout=0.1, image_size=64
)
ROWS = {
    "plain": PLAIN,
    "refine": replace(PLAIN, refine=True),
    "two_stage": replace(PLAIN, refine=True, two_stage=True),
    "single": replace(PLAIN, levels=1),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
# millions; https://arxiv.org/abs/2010.04159, table 1, has 40 for the first, and 34 for the last two
PARAMETERS = {"": 40, "_refine": 41, "_two_stage": 41, "_single": 34, "_single_dc5": 34}


def build(row: DeformableDETRConfig = PLAIN, classes: int = 3) -> DeformableDetr:
    torch.manual_seed(0)
    network = build_network(row, classes)
    assert isinstance(network, DeformableDetr)
    return network


def stirred(network: DeformableDetr) -> DeformableDetr:
    with torch.no_grad():
        for parameter in network.parameters():  # some begin as zeros, and would let nothing through
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def targets() -> BoxTargets:
    """Two things in the first picture, none in the second."""
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.3], [0.7, 0.6, 0.2, 0.5]])
    return BoxTargets(boxes, torch.tensor([2, 0]), torch.tensor([0, 0]))


def total(network: DeformableDetr, images: Tensor) -> Tensor:
    return torch.stack(list(set_loss.DEFORMABLE_DETR(network(images), targets()).values())).sum()


@pytest.mark.parametrize("kind", PARAMETERS)
def test_every_row_has_the_size_that_was_published(kind):
    name = f"deformable_detr_resnet50{kind}"
    row = DETECTORS[name]
    with torch.device("meta"):
        network = build_network(row, 91)
    # a frozen norm's factors and shifts are no parameters here
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == PARAMETERS[kind]
    assert row.stride == (16 if "dc5" in name else 32) and row.image_size % row.stride == 0
    assert (task_of(row), name_of(row)) == ("detect", name) and name in DEFORMABLE_DETR
    assert read_row(row.to_dict(), "a test") == row


@rows
def test_shapes_for_any_picture(row):
    network = build(row).eval()
    outputs = network(torch.randn(2, 3, 64, 96))
    assert len(outputs.layers) == row.decoder_depth
    assert outputs.logits.shape == (2, 7, 3) and outputs.boxes.shape == (2, 7, 4)
    assert all(each.boxes.min() >= 0 and each.boxes.max() <= 1 for each in outputs.layers)
    if row.two_stage:
        places = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
        assert outputs.encoder.logits.shape == (2, places, 3) and outputs.encoder.boxes.shape == (2, places, 4)
    else:
        assert outputs.encoder is None
    outputs, maps = network.with_maps(torch.randn(1, 3, 96, 32))
    assert maps.shape == (1, 7, 6, 2) and outputs.logits.shape == (1, 7, 3)


def test_fewer_places_than_queries():
    row = replace(ROWS["two_stage"], queries=100)
    assert build(row).eval()(torch.randn(1, 3, 64, 32)).logits.shape == (1, 8 * 4 + 4 * 2 + 2 + 1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"two_stage": True}, "proposals are boxes"), ({"levels": 2}, "2 levels"), ({"levels": 0}, "0 levels")],
    ids=str,
)
def test_what_cannot_be_built(change, words):
    with pytest.raises(ValueError, match=words):
        build(replace(PLAIN, **change))


def test_begins_as_published():
    """Boxes around the learned points, or what places propose; every class as improbable; heads look around."""
    images = torch.randn(2, 3, 64, 96)
    for row in (ROWS["plain"], ROWS["refine"]):
        network = build(row).eval()
        for layer in network(images).layers:
            sides = layer.boxes[..., 2:] - torch.tensor(-2.0).sigmoid()
            assert sides.abs().max() <= 1e-6
            assert layer.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.02)
    network = build(ROWS["two_stage"]).eval()
    outputs = network(images)
    boxes = outputs.encoder.boxes[0]
    first, second = boxes[12 + 1], boxes[96 + 6 + 1]  # one row and one column from the edge
    assert torch.allclose(first, torch.tensor([1.5 / 12, 1.5 / 8, 0.05, 0.05]))
    assert torch.allclose(second, torch.tensor([1.5 / 6, 1.5 / 4, 0.1, 0.1]))
    assert (outputs.boxes[0, :, None] - boxes).abs().amax(dim=2).amin(dim=1).max() <= 1e-5
    for module in network.modules():
        if isinstance(module, DeformableAttention):
            assert module.offsets.weight.abs().max() == 0 and module.offsets.bias.abs().max() == 4


def test_places_at_the_edge_propose_nothing():
    """Of a map so fine that the middles of its first cells are within a hundredth of the edge."""
    network = build(ROWS["two_stage"]).eval()
    boxes = network(torch.randn(1, 3, 64, 416)).encoder.boxes[0, : 8 * 52].view(8, 52, 4)
    assert (boxes[:, [0, -1]] == 1).all() and (boxes[:, 1:-1] < 1).all()


@rows
def test_maps_are_where_queries_looked(row):
    network = stirred(build(row)).eval()
    images = torch.randn(2, 3, 64, 96)
    outputs, maps = network.with_maps(images)
    with torch.autocast("cpu", torch.bfloat16):
        _, coarse = network.with_maps(images)
    assert coarse.shape == maps.shape and coarse.isfinite().all()
    plain = network(images)
    for one, other in zip(outputs.layers, plain.layers, strict=True):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert maps.min() >= 0 and maps.sum(dim=(2, 3)).max() <= 1 + 1e-5  # what is looked at outside is not in it
    assert maps.std(dim=(2, 3)).min() > 0


def test_a_map_is_where_the_box_is():
    """A box far left is looked at far left."""
    network = build(ROWS["refine"]).eval()
    with torch.no_grad():
        network.query_table.zero_()
        network.reference.bias.copy_(torch.tensor([-2.0, 0.0]))  # x at 0.12, y in the middle
    _, maps = network.with_maps(torch.randn(1, 3, 64, 256))
    heat = maps[0].mean(dim=0)  # (4, 16)
    assert heat[:, :5].sum() > 0.7 * heat.sum() and heat[:, 8:].sum() < 0.1 * heat.sum()


@rows
def test_results_do_not_depend_on_batch_mates(row):
    network = stirred(build(row)).eval()
    images = torch.randn(3, 3, 64, 64)
    together, alone = network(images), network(images[1:2])
    assert (together.logits[1] - alone.logits[0]).abs().max() <= 1e-5
    assert (together.boxes[1] - alone.boxes[0]).abs().max() <= 1e-5


@rows
def test_gradient_reaches_every_parameter(row):
    network = stirred(build(row)).train()
    total(network, torch.randn(2, 3, 64, 64)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


@rows
def test_no_things_at_all(row):
    """Every parameter gets a gradient, as many processes that wait for each other need."""
    network = build(row).train()
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    losses = set_loss.DEFORMABLE_DETR(network(torch.randn(2, 3, 64, 64)), nothing)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("kind", ["plain", "two_stage"])
def test_overfits_one_batch(kind):
    row = replace(ROWS[kind], dropout=0.0)
    network = build(row).train()
    images = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    first = total(network, images).item()
    for _ in range(160):
        loss = total(network, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    outputs = network.eval()(images)
    scores, labels = outputs.logits.sigmoid().max(dim=-1)
    assert (scores[0] > 0.4).sum() == 2 and (scores[1] > 0.4).sum() == 0
    found = {int(labels[0, q]): outputs.boxes[0, q] for q in (scores[0] > 0.4).nonzero().flatten()}
    overlap = iou(to_corners(torch.stack((found[2], found[0]))), to_corners(targets().boxes))
    assert overlap.min() > 0.7


@rows
def test_activation_checkpointing_changes_nothing(row):
    images = torch.randn(2, 3, 64, 64)
    found = []
    for checkpointing in (False, True):
        network = build(replace(row, backbone=replace(BODY, frozen_norm=True))).train()
        network.backbone.activation_checkpointing = checkpointing
        torch.manual_seed(1)  # of dropout
        loss = total(network, images)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@rows
def test_half_precision(row):
    """Boxes and points stay in float32, which they need."""
    network = stirred(build(row)).to(torch.bfloat16).eval()
    outputs = network(torch.randn(2, 3, 64, 96, dtype=torch.bfloat16))
    assert all(each.boxes.dtype == torch.float32 and each.boxes.isfinite().all() for each in outputs.layers)
    assert outputs.logits.dtype == torch.bfloat16


def test_the_settings_of_a_run():
    row = PLAIN.changed(NetworkConfig(dropout=0.3, frozen_norm=True, drop_path=0.2), 96)
    assert isinstance(row, DeformableDETRConfig) and isinstance(row.backbone, ResNetConfig)
    assert (row.dropout, row.image_size, row.backbone.image_size) == (0.3, 96, 96)
    assert row.backbone.frozen_norm and row.backbone.drop_path == 0.2
    assert row.is_like(PLAIN) and not row.is_like(replace(PLAIN, refine=True))


def test_any_backbone():
    body = SwinConfig(dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), windows=(2, 2, 2, 2), image_size=64)
    network = build(replace(PLAIN, backbone=body)).eval()
    assert network(torch.randn(1, 3, 64, 96)).boxes.shape == (1, 7, 4)
    assert read_row(network.config.to_dict(), "a test") == network.config


@rows
def test_parts_for_training(row):
    network = build(row)
    assert len(network.layers) == 4 + 1 + 2
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    assert all(shapes[name][0] == 3 for name in network.class_tensors())
    assert {name for name, shape in shapes.items() if shape[0] == 3} == {
        *network.class_tensors(),
        *network.proposal_tensors(),
    }
    assert network.depth_of("backbone.stages.0.0.convs.0.conv.weight") == 1
    assert network.depth_of("encoder.0.norm1.weight") == network.depth


def test_what_proposes_knows_no_classes(tmp_path):
    """Its first row says whether there is anything: other classes, or another order of them, leave it where it is."""
    network = stirred(build(ROWS["two_stage"]))
    named, small = "deformable-detr-custom", PreprocessingConfig(image_size=64)
    card = ModelCard("detect", named, network.config.to_dict(), ("a", "b", "c"), small)
    file = tmp_path / "model.safetensors"
    save_model(file, network.state_dict(), card)
    last = len(network.classes) - 1
    for classes in (("c", "a", "b"), ("dog", "cat")):
        config = RunConfig(data="", weights=str(file), model=named, preprocessing=small)
        other, _ = initial_network(config, classes)
        assert isinstance(other, DeformableDetr)
        old, new = network.state_dict(), other.state_dict()
        for name in ("weight", "bias"):
            assert torch.equal(new[f"classes.{last}.{name}"][0], old[f"classes.{last}.{name}"][0])
            assert len(new[f"classes.{last}.{name}"]) == len(classes)
        scores = old["classes.0.weight"], new["classes.0.weight"]
        assert torch.equal(scores[1], scores[0][[2, 0, 1]]) if len(classes) == 3 else (scores[1] != scores[0][:2]).any()
