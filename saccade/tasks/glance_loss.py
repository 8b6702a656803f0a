"""How Glance learns: every part of it is taught directly. `models/glance.py` says why each is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.boxes import generalised_iou, iou, to_corners
from saccade.models.detector import BoxTargets
from saccade.models.glance import Denoising, Dense, GlanceOutputs
from saccade.tasks.matching import Weights, focal_cost
from saccade.tasks.processes import mean_over_processes
from saccade.tasks.set_loss import Pairs, SetLoss, mean_count

GAMMA = 1.5  # of matchability
SEVERAL = 10  # places that one object teaches
SCORE_POWER, OVERLAP_POWER = 0.5, 6.0  # of task alignment


def matchability(
    logits: Float[Tensor, "*N K"], wanted: Float[Tensor, "*N K"], gamma: float = GAMMA
) -> Float[Tensor, "*N"]:
    """https://arxiv.org/abs/2412.04234: asks for the overlap to the power gamma, and forgives small scores of nothing.

    `wanted` is the overlap where there is an object of that class, else 0.
    """
    p = logits.detach().sigmoid()
    weight = torch.where(wanted > 0, 1.0, p**gamma)
    return (weight * F.binary_cross_entropy_with_logits(logits, wanted**gamma, reduction="none")).sum(dim=-1)


def matchability_loss(logits: Float[Tensor, "L B Q K"], pairs: Pairs) -> Float[Tensor, " L"]:
    """Of matched queries, per thing."""
    wanted = torch.zeros_like(logits)
    wanted[pairs.layer, pairs.picture, pairs.query, pairs.label] = pairs.iou.to(wanted.dtype).clamp_min(1e-4)
    return matchability(logits, wanted).sum(dim=(1, 2)) / pairs.count


DECODER = SetLoss(Weights(2.0, 5.0, 2.0), Weights(1.0, 5.0, 2.0), focal_cost, matchability_loss)


@dataclass(frozen=True)
class GlanceLoss:
    """(outputs, targets) -> named scalars, whose sum is learnt from."""

    decoder: SetLoss = DECODER
    several: int = SEVERAL

    def __call__(self, outputs: GlanceOutputs, targets: BoxTargets) -> dict[str, Tensor]:
        losses = dict(self.decoder(outputs, targets))
        count = mean_count(targets)
        if outputs.denoising is not None:
            losses["denoising"] = denoising_loss(outputs.denoising, targets, count)
        if outputs.dense is not None:
            losses.update(dense_losses(outputs.dense, targets, count, self.several))
        return losses


def denoising_loss(noise: Denoising, targets: BoxTargets, count: Tensor) -> Tensor:
    """Right copies must become their objects, wrong ones nothing; in all layers, per object and group."""
    logits = torch.stack([layer.logits for layer in noise.layers])[:, noise.picture, noise.place].float()  # (L, D, K)
    boxes = torch.stack([layer.boxes for layer in noise.layers])[:, noise.picture, noise.place].float()  # (L, D, 4)
    wanted_boxes = targets.boxes[noise.target]
    corners, wanted_corners = to_corners(boxes), to_corners(wanted_boxes)
    overlap = iou(corners.detach(), wanted_corners).clamp_min(1e-4) * noise.right  # (L, D)
    wanted = torch.zeros_like(logits)
    wanted.scatter_(2, targets.labels[noise.target].expand(len(logits), -1)[..., None], overlap[..., None])
    label = matchability(logits, wanted).sum()
    l1 = ((boxes - wanted_boxes).abs().sum(dim=-1) * noise.right).sum()
    giou = ((1 - generalised_iou(corners, wanted_corners)) * noise.right).sum()
    groups = max(1.0, len(noise.target) / (2 * max(1, len(targets.labels))))
    return (label + 5.0 * l1 + 2.0 * giou) / (count * groups)


def dense_losses(dense: Dense, targets: BoxTargets, count: Tensor, most: int) -> dict[str, Tensor]:
    """Every place learns scores and boxes; of the score that chooses queries, one place an object is right."""
    assert dense.many is not None
    several = assign_places(dense, dense.many, targets, most)
    one = assign_places(dense, dense.one, targets, 1)
    found = dense.boxes[several.picture, several.place].float()  # (P, 4)
    truth = to_corners(targets.boxes)[several.target]
    sizes = targets.boxes[several.target, 2:].repeat(1, 2)
    shares = mean_over_processes(several.share.sum(), several.share.device).clamp_min(1.0)
    weight = several.share / shares
    off = ((found - truth) / sizes.clamp_min(1e-3)).abs().clamp_max(10.0).mean(dim=1)
    return {
        "places": _place_loss(dense.many, several, targets) / shares,
        "places_giou": 2.0 * (weight * (1 - generalised_iou(found, truth))).sum(),
        "places_l1": 1.0 * (weight * off).sum(),
        "choice": _place_loss(dense.one, one, targets) / count,
    }


def _place_loss(logits: Tensor, assigned: Assigned, targets: BoxTargets) -> Tensor:
    wanted = torch.zeros_like(logits, dtype=torch.float32)
    wanted[assigned.picture, assigned.place, targets.labels[assigned.target]] = assigned.share
    logits = logits.float()
    p = logits.detach().sigmoid()
    weight = torch.where(wanted > 0, 1.0, p**GAMMA)
    return (weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()


@dataclass(frozen=True)
class Assigned:
    """P places and the objects that teach them, with how good each is for its object, 0 to 1."""

    picture: Tensor
    place: Tensor
    target: Tensor
    share: Float[Tensor, " P"]


@torch.no_grad()
def assign_places(dense: Dense, logits: Float[Tensor, "B N K"], targets: BoxTargets, most: int) -> Assigned:
    """Task alignment, https://arxiv.org/abs/2108.07755: the places that score and fit best, within the object.

    An object so small that no place lies in it is given those within one stride of its centre. A place that several
    objects want goes to the one that it overlaps most.
    """
    M, N = len(targets.labels), logits.shape[1]
    truth = to_corners(targets.boxes)  # (M, 4)
    boxes = dense.boxes.detach().float()[targets.picture]  # (M, N, 4)
    overlap = iou(boxes, truth[:, None]).clamp_min(0)  # (M, N)
    score = logits.detach().float().transpose(1, 2)[targets.picture, targets.labels].sigmoid()  # (M, N)
    reach = torch.maximum(targets.boxes[:, None, 2:] / 2, dense.strides)  # (M, N, 2)
    inside = ((dense.points - targets.boxes[:, None, :2]).abs() < reach).all(dim=-1)
    fit = score**SCORE_POWER * overlap**OVERLAP_POWER * inside
    best, place = fit.topk(min(most, N), dim=1)  # (M, P)
    target = torch.arange(M, device=fit.device)[:, None].expand_as(place)
    highest = best.amax(dim=1, keepdim=True)
    taken = best > 1e-12 * highest  # of tiny things all are small: the power of an overlap of 0.01 is 1e-12
    # of several objects at one place only the one with the largest overlap stays
    key = targets.picture[:, None] * N + place
    here = overlap.gather(1, place)
    largest = torch.zeros(len(logits) * N, device=fit.device).scatter_reduce_(
        0, key[taken], here[taken], "amax", include_self=True
    )
    taken = taken & (here >= largest[key])
    share = best / highest.clamp_min(torch.finfo(best.dtype).tiny) * here.amax(dim=1, keepdim=True)
    return Assigned(targets.picture[target[taken]], place[taken], target[taken], share[taken])
