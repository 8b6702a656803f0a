"""The loss of a set of boxes, by hand and against transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from saccade.config import RunConfig
from saccade.models import DETECTORS
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.tasks import set_loss
from saccade.tasks.detection import LOSSES
from saccade.tasks.set_loss import DEFORMABLE_DETR, DETR, SetLoss

B, Q, K = 3, 10, 5
BOTH = pytest.mark.parametrize("loss", [DETR, DEFORMABLE_DETR], ids=["detr", "deformable"])


def targets(counts: tuple[int, ...] = (2, 0, 3), dtype: torch.dtype = torch.float64) -> BoxTargets:
    M = sum(counts)
    picture = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return BoxTargets(0.1 + 0.5 * torch.rand(M, 4, dtype=dtype), torch.randint(K, (M,)), picture)


def layer(dtype: torch.dtype = torch.float64, classes: int = K + 1, queries: int = Q) -> LayerOutputs:
    logits = torch.randn(B, queries, classes, dtype=dtype).requires_grad_()
    return LayerOutputs(logits, (torch.rand(B, queries, 4, dtype=dtype) * 0.8 + 0.1).requires_grad_())


def test_one_thing_by_hand():
    """Two queries, two classes; the first query has the better box and class."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]], dtype=torch.float64)
    wanted = BoxTargets(
        torch.tensor([[0.5, 0.5, 0.4, 0.2]], dtype=torch.float64), torch.tensor([0]), torch.tensor([0])
    )
    outputs = DetectionOutputs((LayerOutputs(logits, boxes),))
    found = DETR(outputs, wanted)
    right = math.log(math.exp(2) + 2) - 2
    nothing = math.log(2 + math.e) - 1
    assert found.keys() == {"class", "l1", "giou"}
    assert found["class"].item() == pytest.approx((right + 0.1 * nothing) / 1.1)
    assert found["l1"].item() == pytest.approx(5 * 0.2)
    assert found["giou"].item() == pytest.approx(2 * 0.5)  # half of the hull, which is the thing itself
    focal = DEFORMABLE_DETR(outputs, wanted)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    others = 4 * 0.75 * 0.5**2 * math.log(2) + 0.75 * q**2 * -math.log(1 - q)
    assert focal["class"].item() == pytest.approx(2 * (0.25 * (1 - p) ** 2 * -math.log(p) + others))
    assert focal["l1"].item() == pytest.approx(1.0) and focal["giou"].item() == pytest.approx(1.0)


def test_perfect_answers_cost_almost_nothing():
    wanted = targets()
    logits = torch.full((B, Q, K + 1), -20.0, dtype=torch.float64)
    logits[..., -1] = 20.0
    boxes = torch.rand(B, Q, 4, dtype=torch.float64)
    places = torch.tensor([3, 7, 1, 4, 9])
    boxes[wanted.picture, places] = wanted.boxes
    logits[wanted.picture, places, -1] = -20.0
    logits[wanted.picture, places, wanted.labels] = 20.0
    assert all(value <= 1e-12 for value in DETR(DetectionOutputs((LayerOutputs(logits, boxes),)), wanted).values())


def their_losses(loss: SetLoss, layers: list[LayerOutputs], wanted: BoxTargets, encoder: LayerOutputs | None) -> Any:
    """transformers' criterion over the same layers, summed with the published weights."""
    labels: list[dict[str, Tensor]] = [
        {"class_labels": wanted.labels[wanted.picture == b], "boxes": wanted.boxes[wanted.picture == b]}
        for b in range(B)
    ]
    outputs: list[dict[str, Any]] = [{"logits": each.logits, "pred_boxes": each.boxes} for each in layers]
    if loss is DETR:
        from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

        criterion: Any = ImageLoss(HungarianMatcher(1, 5, 2), K, 0.1, ["labels", "boxes"])
        criterion.empty_weight = layers[0].logits.new_tensor([1.0] * K + [0.1])
        weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    else:
        from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

        classes = layers[0].logits.shape[-1]
        criterion = DeformableDetrImageLoss(
            DeformableDetrHungarianMatcher(2, 5, 2), classes, 0.25, ["labels", "boxes"]
        )
        weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}

    def weighted(each: dict[str, Any], labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: weights[name] * value for name, value in criterion(each, labels).items() if name in weights}

    found = [weighted(each, labels) for each in outputs]
    proposals: dict[str, Tensor] = {}
    if encoder is not None:
        blind = [{**each, "class_labels": torch.zeros_like(each["class_labels"])} for each in labels]
        proposals = weighted({"logits": encoder.logits, "pred_boxes": encoder.boxes}, blind)
    return found, proposals


@BOTH
@pytest.mark.parametrize("two_stages", [False, True])
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0), (0, 14, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)], ids=str)
def test_every_term_and_gradient_is_transformers(loss, two_stages, counts, dtype, tolerance):
    """Measured, relative where above one: 3.4e-7 in float32, 5.5e-16 in float64; gradients 6e-8 and 1.1e-16."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    layers = [layer(dtype) for _ in range(3)]
    encoder = layer(dtype, queries=40) if two_stages and loss is DEFORMABLE_DETR else None
    wanted = targets(counts, dtype)
    found = loss(DetectionOutputs(tuple(layers), encoder), wanted)
    terms = loss.terms(layers, wanted)
    expected, proposals = their_losses(loss, layers, wanted, encoder)

    def off(a: Tensor, b: Tensor) -> float:
        return abs(a.item() - b.item()) / max(1.0, abs(b.item()))

    for i, each in enumerate(expected):
        assert off(terms.label[i], each["loss_ce"]) <= tolerance
        assert off(terms.l1[i], each["loss_bbox"]) <= tolerance
        assert off(terms.giou[i], each["loss_giou"]) <= tolerance
    assert off(found["class"], expected[-1]["loss_ce"]) <= tolerance
    assert off(found["l1"], expected[-1]["loss_bbox"]) <= tolerance
    assert off(found["giou"], expected[-1]["loss_giou"]) <= tolerance
    assert off(found["layers"], torch.stack([v for each in expected[:-1] for v in each.values()]).sum()) <= tolerance
    assert ("proposals" in found) == (encoder is not None)
    if encoder is not None:
        assert off(found["proposals"], torch.stack(list(proposals.values())).sum()) <= tolerance
    inputs = [x for each in (*layers, *([encoder] if encoder else [])) for x in (each.logits, each.boxes)]
    total = torch.stack(list(found.values())).sum()
    their_total = torch.stack([v for each in (*expected, proposals) for v in each.values()]).sum()
    for a, b in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(their_total, inputs, allow_unused=True), strict=True
    ):
        assert b is None or (a - b).abs().max() <= tolerance


@BOTH
def test_pictures_without_things_teach_that_there_is_nothing(loss):
    torch.manual_seed(0)
    outputs = DetectionOutputs((layer(), layer()))
    found = loss(outputs, targets((0, 0, 0)))
    assert found["l1"].item() == found["giou"].item() == 0 and found["class"].item() > 0.1
    torch.stack(list(found.values())).sum().backward()
    for each in outputs.layers:
        assert each.logits.grad is not None and each.logits.grad.abs().max() > 0
        assert each.boxes.grad is not None and each.boxes.grad.abs().max() == 0  # a gradient, though of nothing


@BOTH
def test_half_precision_is_widened(loss):
    torch.manual_seed(0)
    one = layer(torch.float32)
    narrow = LayerOutputs(one.logits.bfloat16(), one.boxes.bfloat16())
    wide = LayerOutputs(narrow.logits.float(), narrow.boxes.float())
    wanted = targets(dtype=torch.float32)
    found, expected = (loss(DetectionOutputs((each,)), wanted) for each in (narrow, wide))
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert a.dtype == torch.float32 and a.item() == b.item()


@BOTH
def test_a_loss_that_is_no_number_is_one_and_no_crash(loss):
    """The engine leaves such a step out."""
    bad = layer()
    bad = LayerOutputs(torch.full_like(bad.logits, math.nan), bad.boxes)
    assert not torch.stack(list(loss(DetectionOutputs((bad,)), targets()).values())).sum().isfinite()


def test_the_order_of_things_is_nothing():
    torch.manual_seed(0)
    outputs, wanted = DetectionOutputs((layer(),)), targets((3, 0, 2))
    order = torch.tensor([2, 0, 1, 4, 3])
    turned = replace(wanted, boxes=wanted.boxes[order], labels=wanted.labels[order])
    for a, b in zip(DETR(outputs, wanted).values(), DETR(outputs, turned).values(), strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


def test_count_is_the_mean_over_processes(monkeypatch):
    """Two processes, of which this one has 2 things and the other 6."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(6))
    wanted = targets((2, 0, 0))
    assert set_loss.mean_count(wanted).item() == 4.0
    torch.manual_seed(0)
    outputs = DetectionOutputs((layer(),))
    shared = DETR(outputs, wanted)
    monkeypatch.undo()
    alone = DETR(outputs, wanted)
    assert shared["l1"].item() == pytest.approx(alone["l1"].item() / 2)
    assert shared["giou"].item() == pytest.approx(alone["giou"].item() / 2)
    assert shared["class"].item() == pytest.approx(alone["class"].item())  # a mean over queries
    assert set_loss.mean_count(targets((0, 0, 0))).item() == 1.0


def test_losses_are_found_by_name():
    row, config = DETECTORS["detr_resnet50"], RunConfig(data="")
    assert LOSSES[row.loss](row, config) is DETR and LOSSES["deformable_detr"](row, config) is DEFORMABLE_DETR
