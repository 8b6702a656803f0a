"""Which query answers for which thing: the assignment of least total cost, https://arxiv.org/abs/2005.12872.

Costs are computed for each thing against the queries of its own picture alone, for all layers of a decoder at once. The
reference has every thing of the batch against the queries of all its pictures, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.boxes import generalised_iou, to_corners
from saccade.models.detector import BoxTargets

# (logits (L, B, Q, K), targets) -> for each thing, the cost of its class at each query of its picture (L, M, Q)
ClassCost = Callable[[Tensor, BoxTargets], Tensor]


@dataclass(frozen=True)
class Weights:
    """Of the three parts of a cost, or of a loss."""

    label: float
    l1: float
    giou: float


@dataclass(frozen=True)
class Matches:
    """P pairs in each of L layers. Of more things in a picture than queries, some have no pair."""

    query: Int[Tensor, "L P"]
    target: Int[Tensor, "L P"]  # its number among the M of the batch


def softmax_cost(logits: Float[Tensor, "L B Q K"], targets: BoxTargets) -> Float[Tensor, "L M Q"]:
    """The probability of the thing's class, negative: unlike its logarithm it is of the size of the other costs."""
    return -_of_class(logits.softmax(dim=-1), targets)


def focal_cost(
    logits: Float[Tensor, "L B Q K"], targets: BoxTargets, *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "L M Q"]:
    """What the focal loss of a class would rise by, were it not the thing's: https://arxiv.org/abs/2010.04159."""
    x = _of_class(logits, targets)
    p = x.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(x)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-x)
    return positive - negative


def _of_class(values: Tensor, targets: BoxTargets) -> Tensor:
    """(L, B, Q, K) -> (L, M, Q): of each thing's picture and class."""
    return values.transpose(2, 3)[:, targets.picture, targets.labels]


@torch.no_grad()
def match(
    logits: Float[Tensor, "L B Q K"],
    boxes: Float[Tensor, "L B Q 4"],
    targets: BoxTargets,
    weights: Weights,
    class_cost: ClassCost = softmax_cost,
) -> Matches:
    """Each thing gets a query of its own, so that the sum of costs is least, in every layer for itself."""
    return assign(costs(logits, boxes, targets, weights, class_cost), targets)


@torch.no_grad()
def costs(
    logits: Float[Tensor, "L B Q K"],
    boxes: Float[Tensor, "L B Q 4"],
    targets: BoxTargets,
    weights: Weights,
    class_cost: ClassCost = softmax_cost,
) -> Float[Tensor, "L M Q"]:
    """Of each thing at each query of its picture."""
    found, wanted = boxes[:, targets.picture], targets.boxes[:, None].to(boxes.dtype)  # (L, M, Q, 4), (M, 1, 4)
    l1 = torch.stack([(found[..., i] - wanted[..., i]).abs_() for i in range(4)]).sum(dim=0)
    giou = generalised_iou(to_corners(found), to_corners(wanted))
    return weights.l1 * l1 - weights.giou * giou + weights.label * class_cost(logits, targets)


def assign(cost: Float[Tensor, "L M Q"], targets: BoxTargets) -> Matches:
    """A pair whose cost is not finite is taken only where a thing of that picture would have no query otherwise."""
    from scipy.optimize import linear_sum_assignment  # slow to import, so only where it is needed

    values = cost.cpu().double().numpy()
    counts = np.bincount(targets.picture.cpu().numpy(), minlength=1)
    ends = np.cumsum(counts)
    queries: list[np.ndarray] = []
    things: list[np.ndarray] = []
    for layer in values:
        pairs = [
            linear_sum_assignment(_finite(layer[end - count : end]))
            for end, count in zip(ends, counts, strict=True)
            if count
        ]
        starts = [end - count for end, count in zip(ends, counts, strict=True) if count]
        queries.append(np.concatenate([query for _, query in pairs] or [np.zeros(0, dtype=np.int64)]))
        rows = [start + row for start, (row, _) in zip(starts, pairs, strict=True)]
        things.append(np.concatenate(rows or [np.zeros(0, dtype=np.int64)]))
    device = cost.device
    return Matches(torch.from_numpy(np.stack(queries)).to(device), torch.from_numpy(np.stack(things)).to(device))


def _finite(cost: np.ndarray) -> np.ndarray:
    """Of the things of one picture (n, Q), with so much in place of NaN and infinity that any other way costs less."""
    good = np.isfinite(cost)
    if good.all():
        return cost
    known = cost[good]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    return np.where(good, cost, high + (high - low + 1.0) * min(cost.shape))
