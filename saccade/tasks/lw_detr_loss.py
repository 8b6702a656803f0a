"""How LW-DETR and RF-DETR learn: https://arxiv.org/abs/2406.03459. Every group of queries by a matching of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saccade.models.detector import BoxTargets, LayerOutputs
from saccade.models.lw_detr import GroupedOutputs
from saccade.tasks.matching import Weights, focal_cost
from saccade.tasks.set_loss import Pairs, SetLoss, mean_count

LEAST_QUALITY = 0.01


def overlap_aware_loss(
    logits: Float[Tensor, "L B Q K"], pairs: Pairs, *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, " L"]:
    """A yes or no for each class, per thing, https://arxiv.org/abs/2304.07527: how much of a yes a matched query should
    say is between its own score and the overlap of its box.
    """
    p = logits.sigmoid()
    at = pairs.layer, pairs.picture, pairs.query, pairs.label
    quality = (p[at].detach() ** alpha * pairs.iou.to(p.dtype) ** (1 - alpha)).clamp(min=LEAST_QUALITY)
    yes, no = torch.zeros_like(logits), p**gamma
    yes[at], no[at] = quality, 1 - quality
    return -(yes * F.logsigmoid(logits) + no * F.logsigmoid(-logits)).sum(dim=(1, 2, 3)) / pairs.count


@dataclass(frozen=True)
class GroupLoss(SetLoss):
    """A SetLoss of which each group of queries has one; the proposals are asked for classes, too."""

    def __call__(self, outputs: GroupedOutputs, targets: BoxTargets) -> dict[str, Tensor]:
        G, count = outputs.groups, mean_count(targets, outputs.groups)
        terms = self.terms([one for layer in outputs.layers for one in groups_of(layer, G)], targets, count)
        of_layers = torch.stack((terms.label, terms.l1, terms.giou)).unflatten(1, (-1, G)).sum(dim=2)  # (3, L)
        losses: dict[str, Tensor] = dict(zip(("class", "l1", "giou"), of_layers[:, -1], strict=True))
        if len(outputs.layers) > 1:
            losses["layers"] = of_layers[:, :-1].sum()
        if outputs.encoder is not None:
            proposals = groups_of(outputs.encoder, G)
            losses["proposals"] = self.terms(proposals, self.targets_of_proposals(targets), count).total
        return losses


def groups_of(layer: LayerOutputs, groups: int) -> list[LayerOutputs]:
    return list(map(LayerOutputs, layer.logits.chunk(groups, dim=1), layer.boxes.chunk(groups, dim=1)))


LW_DETR = GroupLoss(
    Weights(2.0, 5.0, 2.0), Weights(1.0, 5.0, 2.0), focal_cost, overlap_aware_loss, proposals_of_classes=True
)
