"""Who is matched with whom: against every possible way where there are few, and against transformers' matchers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from saccade.layers.boxes import generalised_iou, to_corners
from saccade.models.detector import BoxTargets
from saccade.tasks.matching import Matches, Weights, assign, costs, focal_cost, match, softmax_cost

WEIGHTS = Weights(1.0, 5.0, 2.0)
L, B, Q, K = 3, 4, 12, 5


def targets(counts: list[int], classes: int = K, dtype: torch.dtype = torch.float64) -> BoxTargets:
    M = sum(counts)
    picture = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    boxes = 0.1 + 0.5 * torch.rand(M, 4, dtype=dtype)
    return BoxTargets(boxes, torch.randint(classes, (M,)), picture)


def outputs(dtype: torch.dtype = torch.float64, queries: int = Q, classes: int = K + 1) -> tuple[Tensor, Tensor]:
    return torch.randn(L, B, queries, classes, dtype=dtype), torch.rand(L, B, queries, 4, dtype=dtype) * 0.8 + 0.1


def by_thing(matches: Matches, things: int) -> Tensor:
    """For each layer and thing its query, -1 for none."""
    table = torch.full((len(matches.query), things), -1)
    return table.scatter(1, matches.target, matches.query)


def test_costs_by_hand():
    torch.manual_seed(0)
    logits, boxes = outputs()
    wanted = targets([2, 0, 3, 1])
    found = costs(logits, boxes, wanted, WEIGHTS)
    assert found.shape == (L, 6, Q)
    for layer, thing, query in ((0, 0, 0), (2, 1, 11), (1, 4, 5), (2, 5, 3)):
        b = int(wanted.picture[thing])
        box, truth = boxes[layer, b, query], wanted.boxes[thing]
        expected = (
            5 * (box - truth).abs().sum()
            - logits[layer, b, query].softmax(-1)[wanted.labels[thing]]
            - 2 * generalised_iou(to_corners(box), to_corners(truth))
        )
        assert found[layer, thing, query].item() == pytest.approx(expected.item(), abs=1e-12)


def test_least_of_all_ways():
    torch.manual_seed(0)
    logits, boxes = outputs(queries=5)
    wanted = targets([3, 0, 2, 1])
    cost = costs(logits, boxes, wanted, WEIGHTS)
    table = by_thing(assign(cost, wanted), 6)
    for layer in range(L):
        for b in range(B):
            here = (wanted.picture == b).nonzero().flatten()
            n = len(here)
            every = [cost[layer, here, list(way)].sum().item() for way in permutations(range(5), n)] if n else [0.0]
            chosen = table[layer, here]
            assert (chosen >= 0).all() and len(set(chosen.tolist())) == n
            assert cost[layer, here, chosen].sum().item() == pytest.approx(min(every), abs=1e-12)


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 0, 0], [20, 0, 12, 1], [0, 0, 0, 7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_as_transformers(counts, dtype):
    """More things than queries included, where both leave the same things without one."""
    theirs = pytest.importorskip("transformers.loss.loss_for_object_detection")
    deformable = pytest.importorskip("transformers.loss.loss_deformable_detr")
    torch.manual_seed(0)
    for seed in range(5):
        torch.manual_seed(seed)
        logits, boxes = outputs(dtype)
        wanted = targets(counts, dtype=dtype)
        labels = [
            {"class_labels": wanted.labels[wanted.picture == b], "boxes": wanted.boxes[wanted.picture == b]}
            for b in range(B)
        ]
        starts = torch.tensor([0, *counts]).cumsum(0)
        for cost, matcher in (
            (softmax_cost, theirs.HungarianMatcher(1, 5, 2)),
            (focal_cost, deformable.DeformableDetrHungarianMatcher(1, 5, 2)),
        ):
            table = by_thing(match(logits, boxes, wanted, WEIGHTS, cost), sum(counts))
            for layer in range(L):
                found = matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
                expected = torch.full((sum(counts),), -1)
                for b, (query, thing) in enumerate(found):
                    expected[starts[b] + thing] = query
                assert torch.equal(table[layer], expected)


def test_pictures_and_layers_do_not_matter_to_each_other():
    torch.manual_seed(0)
    logits, boxes = outputs()
    wanted = targets([2, 0, 3, 1])
    table = by_thing(match(logits, boxes, wanted, WEIGHTS), 6)
    alone = BoxTargets(wanted.boxes[2:5], wanted.labels[2:5], torch.zeros(3, dtype=torch.long))
    for layer in range(L):
        part = match(logits[layer : layer + 1, 2:3], boxes[layer : layer + 1, 2:3], alone, WEIGHTS)
        assert torch.equal(by_thing(part, 3)[0], table[layer, 2:5])


def test_nothing_to_match():
    logits, boxes = outputs()
    found = match(logits, boxes, targets([0, 0, 0, 0]), WEIGHTS)
    assert found.query.shape == found.target.shape == (L, 0) and found.query.dtype == torch.long


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_taken_last(bad):
    """And does not change how the others are matched."""
    wanted = targets([3])
    cost = torch.tensor([[[1.0, 5.0, 2.0, 9.0], [2.0, 1.0, 5.0, 9.0], [bad, 0.9, 0.1, bad]]], dtype=torch.float64)
    assert by_thing(assign(cost, wanted), 3).tolist() == [[0, 1, 2]]
    cost[0, 2] = bad  # a thing whose every cost is none gets what the others leave
    assert by_thing(assign(cost, wanted), 3)[0, :2].tolist() == [0, 1]
    assert len(set(by_thing(assign(cost, wanted), 3)[0].tolist())) == 3
    cost[:] = bad
    assert sorted(by_thing(assign(cost, wanted), 3)[0].tolist()) != [-1, -1, -1]
    assert by_thing(assign(cost, wanted), 3).unique().numel() == 3


def test_a_huge_cost_is_not_taken_for_none():
    wanted = targets([2])
    cost = torch.tensor([[[1e30, 1e31], [float("nan"), 1e31]]], dtype=torch.float64)
    assert by_thing(assign(cost, wanted), 2).tolist() == [[0, 1]]


def test_costs_have_no_other_pictures_things():
    """Its memory grows with things times queries, not with things times queries of all pictures."""
    many = 16
    logits, boxes = torch.randn(1, many, 50, 4), torch.rand(1, many, 50, 4)
    wanted = targets([5] * many, classes=4, dtype=torch.float32)
    assert costs(logits, boxes, wanted, WEIGHTS).numel() == many * 5 * 50


def test_focal_cost_has_no_infinities():
    """Where a probability is one in float32, the reference's logarithm is minus infinity."""
    logits = torch.tensor([[[[40.0, -40.0, 0.0]]]]).requires_grad_()
    wanted = BoxTargets(torch.rand(3, 4), torch.arange(3), torch.zeros(3, dtype=torch.long))
    found = focal_cost(logits, wanted)[0, :, 0]
    assert found.isfinite().all()
    assert np.allclose(found.detach().numpy(), [-0.75 * 40, 0.25 * 40, (0.25 - 0.75) * 0.25 * np.log(2)], rtol=1e-5)
