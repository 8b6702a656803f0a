"""Glance: shapes, what each part sees, gradients, learning; and its losses by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.backbones.resnet import ResNetConfig
from saccade.config import RunConfig
from saccade.layers.boxes import to_corners
from saccade.models import DETECTORS, build_network, name_of, read_row, task_of
from saccade.models.detector import BoxTargets
from saccade.models.glance import GLANCE, Dense, Glance, GlanceConfig, GlanceOutputs, disturb, refined, rivalry
from saccade.tasks import glance_loss
from saccade.tasks.detection import LOSSES
from saccade.tasks.glance_loss import GlanceLoss, assign_places, dense_losses, matchability

BODY = ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False, widths=(8, 8, 16, 16), stem=8)
TINY = GlanceConfig(
    backbone=BODY, dim=32, heads=4, hidden=64, decoder_layers=2, queries=9, denoising=8, image_size=64, points=2
)


def glance(row: GlanceConfig = TINY, classes: int = 3) -> Glance:
    torch.manual_seed(0)
    network = build_network(row, classes)
    assert isinstance(network, Glance)
    return network


def targets() -> BoxTargets:
    """Two things in the first picture, none in the second, one in the third."""
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.3], [0.7, 0.6, 0.2, 0.5], [0.5, 0.5, 0.9, 0.9]])
    return BoxTargets(boxes, torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2]))


def none() -> BoxTargets:
    return BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def total(network: Glance, images: Tensor, truth: BoxTargets) -> Tensor:
    return torch.stack(list(GlanceLoss()(network(images, truth), truth).values())).sum()


@pytest.mark.parametrize("name", GLANCE)
def test_rows(name: str) -> None:
    row = DETECTORS[name]
    with torch.device("meta"):
        network = build_network(row, 80)
    assert (task_of(row), name_of(row)) == ("detect", name) and row.loss in LOSSES
    assert read_row(row.to_dict(), "a test") == row
    assert isinstance(network, Glance)
    for tensor in network.class_tensors():
        assert network.state_dict()[tensor].shape[0] == 80


def test_shapes_for_any_picture_and_maps() -> None:
    network = glance().eval()
    images = torch.randn(2, 3, 64, 96)
    outputs, maps = network.with_maps(images)
    plain = network(images)
    assert plain.logits.shape == (2, 9, 3) and plain.boxes.shape == (2, 9, 4) and plain.dense is None
    assert torch.allclose(outputs.logits, plain.logits, atol=1e-5) and torch.allclose(outputs.boxes, plain.boxes)
    assert maps.shape == (2, 9, 8, 12) and maps.min() >= 0 and maps.std(dim=(2, 3)).min() > 0
    with torch.autocast("cpu", torch.bfloat16):
        _, coarse = network.with_maps(images)
    assert coarse.shape == maps.shape and coarse.isfinite().all()
    small = network(torch.randn(1, 3, 32, 32))  # 16 + 4 + 1 places
    assert small.logits.shape == (1, 9, 3)


def test_results_do_not_depend_on_batch_mates() -> None:
    network = glance().eval()
    images = torch.randn(3, 3, 64, 64)
    together, alone = network(images), network(images[1:2])
    assert (together.logits[1] - alone.logits[0]).abs().max() < 1e-5
    assert (together.boxes[1] - alone.boxes[0]).abs().max() < 1e-5


def test_queries_never_see_disturbed_truths() -> None:
    """What is asked of them must not be given away: with and without denoising they answer the same."""
    network = glance().train()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        seen, unseen = network(images, targets()), network(images, None)
    assert seen.denoising is not None and unseen.denoising is None
    for one, other in zip(seen.layers, unseen.layers, strict=True):
        assert (one.logits - other.logits).abs().max() < 1e-5 and (one.boxes - other.boxes).abs().max() < 1e-5


def test_gradient_reaches_every_parameter() -> None:
    network = glance().train()
    with torch.no_grad():
        for parameter in network.parameters():  # some begin with zeros, behind which nothing would be seen
            if not parameter.any():
                parameter.normal_(std=0.1)
    truth = targets()
    for step in range(3):  # each class is told to some disturbed box
        torch.manual_seed(step)
        total(network, torch.randn(3, 3, 64, 64), truth).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("truth", [none(), replace(targets(), picture=torch.tensor([1, 1, 1]))])
def test_pictures_and_batches_without_a_thing(truth: BoxTargets) -> None:
    network = glance().train()
    losses = GlanceLoss()(network(torch.randn(3, 3, 64, 64), truth), truth)
    assert all(torch.isfinite(value) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    if not len(truth.labels):
        assert losses["l1"] == losses["giou"] == losses["denoising"] == losses["places_giou"] == 0
        assert losses["class"] > 0 and losses["choice"] > 0


@pytest.mark.slow
def test_one_batch_is_learnt_without_doubles() -> None:
    """Two things in a picture, and after a few steps two sure queries, each on its own thing."""
    network = glance().train()
    images = torch.rand(1, 3, 64, 64) * 0.1
    images[:, 0, 8:32, 8:40] += 1.0
    images[:, 1, 36:60, 24:56] += 1.0
    truth = BoxTargets(
        torch.tensor([[24 / 64, 20 / 64, 0.5, 24 / 64], [40 / 64, 48 / 64, 0.5, 24 / 64]]),
        torch.tensor([1, 2]),
        torch.tensor([0, 0]),
    )
    images, truth = images.repeat(2, 1, 1, 1), BoxTargets(
        truth.boxes.repeat(2, 1), truth.labels.repeat(2), torch.tensor([0, 0, 1, 1])
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(220):
        torch.manual_seed(step)
        loss = total(network, images, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        outputs = network(images)
    scores, labels = outputs.logits[0].sigmoid().max(dim=1)
    sure = scores > 0.5
    assert sorted(labels[sure].tolist()) == [1, 2]
    for label, box in zip(truth.labels[:2], truth.boxes[:2], strict=True):
        found = outputs.boxes[0][sure & (labels == label)][0]
        assert (found - box).abs().max() < 0.05


def test_rivalry_is_the_overlap_with_a_surer_one_of_the_same_class() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.2], [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    logits = torch.tensor([[2.0, -9], [1.0, -9], [-9, 0.0], [3.0, -9]])
    hint = rivalry(boxes[None], logits[None])[0]
    assert hint[:, 0].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0], abs=1e-6)
    assert hint[1].tolist() == pytest.approx([0.5, 0.25, 0.5**4, 0.5**8], abs=1e-6)
    equal = rivalry(boxes[None, [0, 0]], logits[None, [0, 0]])[0]
    assert equal[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6), "of equals the first speaks"


def test_disturbed_copies() -> None:
    torch.manual_seed(0)
    truth = targets()
    noise = disturb(truth, 3, 40, 3)
    assert noise.boxes.shape == (3, 40, 4) and len(noise.target) == 10 * 2 * 3  # 10 groups of 2 x 2 places
    made = noise.boxes[noise.picture, noise.place]
    assert torch.equal(noise.picture, truth.picture[noise.target])
    moved = (to_corners(made) - to_corners(truth.boxes)[noise.target]).abs()
    share = moved / (truth.boxes[noise.target, 2:] / 2).repeat(1, 2)
    assert share[noise.right].max() <= 0.5 + 1e-5 and share[~noise.right].mean() > share[noise.right].mean()
    assert len({(int(p), int(q)) for p, q in zip(noise.picture, noise.place, strict=True)}) == len(noise.place)
    keep = noise.keep(45)
    assert not keep[40:, :40].any() and keep[:, 40:].all() and keep[:4, :4].all() and not keep[:4, 4:40].any()


def test_places_are_within_their_thing_and_of_one_thing_each() -> None:
    points = torch.tensor([[0.1, 0.1], [0.3, 0.3], [0.6, 0.6], [0.9, 0.9]])
    strides = torch.full((4, 2), 0.05)
    boxes = torch.tensor([[0.0, 0, 0.4, 0.4], [0.0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1]])[None]
    dense = Dense(boxes, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), points, strides)
    truth = BoxTargets(
        torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.75, 0.75, 0.5, 0.5], [0.2, 0.2, 0.4, 0.36]]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 0]),
    )
    found = assign_places(dense, dense.one, truth, 10)
    pairs = sorted(zip(found.place.tolist(), found.target.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 0), (2, 1), (3, 1)], "the third thing fits less well where the first one does"
    assert torch.allclose(found.share, torch.ones(4), atol=1e-4)
    one = assign_places(dense, dense.one, truth, 1)
    assert sorted(one.target.tolist()) == [0, 1]


def test_a_thing_smaller_than_every_stride_still_has_a_place() -> None:
    points = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    boxes = torch.cat((points - 0.2, points + 0.2), dim=1)[None]
    dense = Dense(boxes, torch.zeros(1, 4, 1), None, points, torch.full((4, 2), 0.5))
    truth = BoxTargets(torch.tensor([[0.4, 0.4, 0.1, 0.1]]), torch.tensor([0]), torch.tensor([0]))
    assert assign_places(dense, dense.one, truth, 1).place.tolist() == [0]


def test_matchability() -> None:
    logits, wanted = torch.zeros(2, 1), torch.tensor([[0.64], [0.0]])
    value = matchability(logits, wanted, gamma=1.5)
    # of a half: the cross-entropy is log 2 whatever is wanted; nothing counts by the score to the power gamma
    assert value.tolist() == pytest.approx([0.693147, 0.693147 * 0.5**1.5], rel=1e-5)
    best = torch.tensor([0.64**1.5]).logit().requires_grad_()
    matchability(best[None], torch.tensor([[0.64]])).sum().backward()
    assert best.grad is not None and abs(best.grad.item()) < 1e-6, "the score that is asked for is the overlap's power"


def test_refinement_is_relative_to_the_box() -> None:
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.1]]])
    assert torch.equal(refined(box, torch.zeros(1, 1, 4)), box)
    moved = refined(box, torch.tensor([[[0.5, -1.0, 0.0, torch.tensor(2.0).log()]]]))
    assert moved[0, 0].tolist() == pytest.approx([0.6, 0.4, 0.2, 0.2], rel=1e-5)


def test_loss_is_found_by_the_row() -> None:
    assert isinstance(LOSSES[TINY.loss](TINY, RunConfig(data="")), GlanceLoss)


def test_tiny_things_have_places_and_teach_boxes() -> None:
    """Three pixels of 384, at the start, when the boxes at a stride of eight have 32."""
    side = (torch.arange(48) + 0.5) / 48
    points = torch.stack((side.repeat(48), side.repeat_interleave(48)), dim=1)
    boxes = torch.cat((points - 16 / 384, points + 16 / 384), dim=1)[None].requires_grad_()
    scores = torch.full((1, len(points), 1), -4.6)
    dense = Dense(boxes, scores, scores.clone(), points, torch.full((len(points), 2), 8 / 384))
    truth = BoxTargets(torch.tensor([[0.4, 0.4, 3 / 384, 3 / 384]]), torch.tensor([0]), torch.tensor([0]))
    for most in (1, 10):
        found = assign_places(dense, dense.one, truth, most)
        assert len(found.place) and found.share.max() > 0.005
    losses = dense_losses(dense, truth, torch.tensor(1.0), 10)
    losses["places_l1"].backward()
    assert boxes.grad is not None and boxes.grad.abs().sum() > 0


def test_places_are_divided_by_the_mean_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, truth = glance(), targets()
    outputs = network(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), truth)
    assert isinstance(outputs, GlanceOutputs) and outputs.dense is not None
    alone = dense_losses(outputs.dense, truth, torch.tensor(1.0), 10)
    shares = []

    def mean(share: Tensor, device: torch.device) -> Tensor:
        shares.append(share)
        return torch.tensor(100.0)  # others have many more

    monkeypatch.setattr(glance_loss, "mean_over_processes", mean)
    among = dense_losses(outputs.dense, truth, torch.tensor(1.0), 10)
    for name in ("places", "places_giou", "places_l1"):
        assert among[name].item() == pytest.approx(alone[name].item() * max(1.0, shares[0].item()) / 100, rel=1e-4)
