"""The loss of LW-DETR by hand, and its groups. Against transformers it is in tests/parity."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from saccade.config import RunConfig
from saccade.models import DETECTORS
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.models.lw_detr import GroupedOutputs
from saccade.tasks.detection import AGAINST_NOTHING, LOSSES
from saccade.tasks.lw_detr_loss import LW_DETR, overlap_aware_loss
from saccade.tasks.set_loss import Pairs, SetLoss

B, Q, K, G = 2, 5, 4, 3


def targets(counts: tuple[int, ...] = (3, 0)) -> BoxTargets:
    M = sum(counts)
    picture = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return BoxTargets(0.2 + 0.3 * torch.rand(M, 4, dtype=torch.float64), torch.arange(M) % K, picture)


def layer(queries: int) -> LayerOutputs:
    boxes = 0.2 + 0.3 * torch.rand(B, queries, 4, dtype=torch.float64)
    return LayerOutputs(torch.randn(B, queries, K, dtype=torch.float64).requires_grad_(), boxes.requires_grad_())


def outputs(groups: int) -> GroupedOutputs:
    return GroupedOutputs((layer(groups * Q), layer(groups * Q)), layer(groups * Q), groups)


def test_one_score_by_hand():
    """A matched query's score is pulled to between itself and the overlap; others are lowered, the surer the more."""
    logits = torch.tensor([[[[1.0, -2.0], [0.5, 3.0]]]], dtype=torch.float64, requires_grad=True)
    at = torch.zeros(1, 1, dtype=torch.long)
    pairs = Pairs(at, at, at, at, torch.tensor([[0.6]], dtype=torch.float64), torch.tensor(2.0))
    found = overlap_aware_loss(logits, pairs)
    p = [1 / (1 + math.exp(-x)) for x in (1.0, -2.0, 0.5, 3.0)]
    wanted = p[0] ** 0.25 * 0.6**0.75
    expected = -wanted * math.log(p[0]) - (1 - wanted) * math.log(1 - p[0])
    expected += sum(-(x**2) * math.log(1 - x) for x in p[1:])
    assert found.item() == pytest.approx(expected / 2)
    found.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 0, 0].item() == pytest.approx((p[0] - wanted) / 2)  # what is wanted has no gradient


def test_no_overlap_asks_for_a_little():
    logits = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    at = torch.zeros(1, 1, dtype=torch.long)
    found = overlap_aware_loss(logits, Pairs(at, at, at, at, torch.zeros(1, 1), torch.tensor(1.0)))
    assert found.item() == pytest.approx(math.log(2))  # 0.01 and 0.99 of it
    sure = torch.full((1, 1, 1, 1), 80.0)
    loss = overlap_aware_loss(sure, Pairs(at, at, at, at, torch.zeros(1, 1), torch.tensor(1.0)))
    assert loss.isfinite() and loss.item() == pytest.approx(0.99 * 80)


def test_groups_are_losses_of_their_own():
    torch.manual_seed(0)
    given, wanted = outputs(G), targets()
    together = LW_DETR(given, wanted)
    assert together.keys() == {"class", "l1", "giou", "layers", "proposals"}
    apart: list[dict[str, torch.Tensor]] = []
    for g in range(G):
        cut = slice(g * Q, (g + 1) * Q)
        one = [LayerOutputs(each.logits[:, cut], each.boxes[:, cut]) for each in (*given.layers, given.encoder)]  # type: ignore[union-attr]
        apart.append(LW_DETR(GroupedOutputs((one[0], one[1]), one[2], 1), wanted))
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(each[name].item() for each in apart) / G), name


def test_one_group_is_a_plain_set_loss():
    torch.manual_seed(0)
    given, wanted = outputs(1), targets()
    plain = SetLoss(**{name: getattr(LW_DETR, name) for name in SetLoss.__dataclass_fields__})
    expected = plain(DetectionOutputs(given.layers, given.encoder), wanted)
    found = LW_DETR(given, wanted)
    assert found.keys() == expected.keys()
    assert all(found[name].item() == pytest.approx(expected[name].item()) for name in found)


def test_proposals_are_asked_for_classes():
    torch.manual_seed(0)
    given, wanted = outputs(1), targets()
    others = replace(wanted, labels=(wanted.labels + 1) % K)
    assert LW_DETR(given, wanted)["proposals"] != LW_DETR(given, others)["proposals"]


def test_no_things_at_all():
    torch.manual_seed(0)
    given = outputs(G)
    losses = LW_DETR(given, targets((0, 0)))
    assert losses["l1"] == 0 and losses["giou"] == 0 and losses["class"] > 0
    p = given.logits.sigmoid()
    assert losses["class"].item() == pytest.approx(-(p**2 * (1 - p).log()).sum().item())
    torch.stack(list(losses.values())).sum().backward()
    assert given.layers[0].boxes.grad is not None and given.layers[0].boxes.grad.abs().max() == 0


def test_where_it_is_found():
    row = DETECTORS["rf_detr_nano"]
    assert LOSSES[row.loss](row, RunConfig(data="")) is LW_DETR and row.loss not in AGAINST_NOTHING
