"""Boxes, given by their centre and size or by two corners, and how far two of them overlap."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LEAST = 1e-12  # area: of smaller ones no share is taken, which would be 0/0


def to_corners(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centres, halves = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centres - halves, centres + halves), dim=-1)


def to_centres(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((first + second) / 2, second - first), dim=-1)


def iou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Tensor:
    """Intersection over union of boxes given by corners, one by one; shapes are broadcast.

    Of two boxes without any area it is zero.
    """
    intersection, union = _overlap(a, b)
    return intersection / union


def generalised_iou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Tensor:
    """https://arxiv.org/abs/1902.09630: from -1 to 1, and of use also where nothing overlaps. As `iou` otherwise."""
    a, b = _wide(a), _wide(b)
    intersection, union = _overlap(a, b)
    left, top, right, bottom = a.unbind(-1)
    other_left, other_top, other_right, other_bottom = b.unbind(-1)
    width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    hull = (width * height).clamp(min=LEAST)
    return intersection / union - (hull - union) / hull


def pairwise_iou(a: Float[Tensor, "*B N 4"], b: Float[Tensor, "*B M 4"]) -> Float[Tensor, "*B N M"]:
    """`iou` of every box with every other."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def pairwise_generalised_iou(a: Float[Tensor, "*B N 4"], b: Float[Tensor, "*B M 4"]) -> Float[Tensor, "*B N M"]:
    """`generalised_iou` of every box with every other."""
    return generalised_iou(a[..., :, None, :], b[..., None, :, :])


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union. By single coordinates: tensors of pairs and 2 axes would be twice as large."""
    left, top, right, bottom = _wide(a).unbind(-1)
    other_left, other_top, other_right, other_bottom = _wide(b).unbind(-1)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    intersection = width * height
    areas = (right - left) * (bottom - top) + (other_right - other_left) * (other_bottom - other_top)
    return intersection, (areas - intersection).clamp(min=LEAST)


def _wide(boxes: Tensor) -> Tensor:
    """Products of half precision's numbers of pixels overflow."""
    return boxes if boxes.dtype == torch.float64 else boxes.float()
