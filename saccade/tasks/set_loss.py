"""The loss of a set of boxes: a query for each thing, and all other queries for nothing. https://arxiv.org/abs/2005.12872

Every layer of the decoder learns from a matching of its own. All layers are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.boxes import generalised_iou, iou, to_corners
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.tasks.matching import ClassCost, Matches, Weights, focal_cost, match, softmax_cost
from saccade.tasks.processes import mean_over_processes

NOTHING = 0.1  # weight of the class for nothing, of which there are many more than of all others


@dataclass(frozen=True)
class Pairs:
    """P queries and their things in each of L layers, by all that a loss needs to find and to weigh them."""

    layer: Int[Tensor, "L 1"]
    picture: Int[Tensor, "L P"]
    query: Int[Tensor, "L P"]
    label: Int[Tensor, "L P"]
    iou: Float[Tensor, "L P"]  # of both boxes, without a gradient
    count: Float[Tensor, ""]  # things per process, what sums over things are divided by


ClassLoss = Callable[[Tensor, Pairs], Tensor]  # (logits (L, B, Q, K), pairs) -> (L,)


@dataclass(frozen=True)
class Terms:
    """Weighted, for each of L layers; and which queries they are of."""

    label: Float[Tensor, " L"]
    l1: Float[Tensor, " L"]
    giou: Float[Tensor, " L"]
    matches: Matches

    @property
    def total(self) -> Tensor:
        return torch.stack((self.label, self.l1, self.giou)).sum()


def softmax_loss(logits: Float[Tensor, "L B Q K"], pairs: Pairs) -> Float[Tensor, " L"]:
    """Cross-entropy, a weighted mean over all queries of a layer; the last class is nothing."""
    nothing = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:3], nothing, device=logits.device)
    classes[pairs.layer, pairs.picture, pairs.query] = pairs.label
    weights = logits.new_ones(classes.shape).masked_fill_(classes == nothing, NOTHING)
    found = logits.log_softmax(dim=-1).gather(-1, classes[..., None])[..., 0]  # (L, B, Q)
    return -(weights * found).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def focal_loss(
    logits: Float[Tensor, "L B Q K"], pairs: Pairs, *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, " L"]:
    """A yes or no for each class, https://arxiv.org/abs/1708.02002, per thing; no class is nothing."""
    wanted = torch.zeros_like(logits)
    wanted[pairs.layer, pairs.picture, pairs.query, pairs.label] = 1.0
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = (p - wanted).abs()  # 1 - the probability of the right answer
    share = (1 - alpha) + (2 * alpha - 1) * wanted
    return (share * missed**gamma * cross_entropy).sum(dim=(1, 2, 3)) / pairs.count


@dataclass(frozen=True)
class SetLoss:
    """(outputs, targets) -> named scalars, whose sum is learnt from.

    Those of the last layer by their names, those of the layers before it and of a first stage's proposals in one sum
    each. The proposals are asked for no class, only whether there is something: one class stands for all; but where
    they are `proposals_of_classes`.
    """

    costs: Weights
    weights: Weights
    class_cost: ClassCost
    class_loss: ClassLoss
    proposals_of_classes: bool = False

    def __call__(self, outputs: DetectionOutputs, targets: BoxTargets) -> dict[str, Tensor]:
        count = mean_count(targets)
        terms = self.terms(outputs.layers, targets, count)
        losses = {"class": terms.label[-1], "l1": terms.l1[-1], "giou": terms.giou[-1]}
        if len(outputs.layers) > 1:
            losses["layers"] = torch.stack((terms.label, terms.l1, terms.giou))[:, :-1].sum()
        if outputs.encoder is not None:
            losses["proposals"] = self.terms((outputs.encoder,), self.targets_of_proposals(targets), count).total
        return losses

    def targets_of_proposals(self, targets: BoxTargets) -> BoxTargets:
        return targets if self.proposals_of_classes else without_classes(targets)

    def terms(self, layers: Sequence[LayerOutputs], targets: BoxTargets, count: Tensor | None = None) -> Terms:
        """Each part of the loss, of each of these layers, which have the same number of queries."""
        count = mean_count(targets) if count is None else count
        logits = _at_least_float32(torch.stack([layer.logits for layer in layers]))
        boxes = _at_least_float32(torch.stack([layer.boxes for layer in layers]))
        matches = match(logits, boxes, targets, self.costs, self.class_cost)
        layer, picture = torch.arange(len(layers), device=boxes.device)[:, None], targets.picture[matches.target]
        found, wanted = boxes[layer, picture, matches.query], targets.boxes.to(boxes.dtype)[matches.target]  # (L, P, 4)
        l1 = (found - wanted).abs().sum(dim=(1, 2)) / count
        corners, wanted_corners = to_corners(found), to_corners(wanted)
        giou = (1 - generalised_iou(corners, wanted_corners)).sum(dim=1) / count
        overlap = iou(corners.detach(), wanted_corners)
        pairs = Pairs(layer, picture, matches.query, targets.labels[matches.target], overlap, count)
        label = self.class_loss(logits, pairs)
        return Terms(self.weights.label * label, self.weights.l1 * l1, self.weights.giou * giou, matches)


def without_classes(targets: BoxTargets) -> BoxTargets:
    return replace(targets, labels=torch.zeros_like(targets.labels))


def mean_count(targets: BoxTargets, groups: int = 1) -> Tensor:
    """How many things a process has on the average, at least one: what sums over things are divided by.

    Each group of queries has all of them.
    """
    return mean_over_processes(groups * len(targets.labels), targets.boxes.device).clamp(min=1.0)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


# https://arxiv.org/abs/2005.12872
DETR = SetLoss(Weights(1.0, 5.0, 2.0), Weights(1.0, 5.0, 2.0), softmax_cost, softmax_loss)
# https://arxiv.org/abs/2010.04159
DEFORMABLE_DETR = SetLoss(Weights(2.0, 5.0, 2.0), Weights(2.0, 5.0, 2.0), focal_cost, focal_loss)
