"""Boxes against torchvision, and where torchvision has no answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from saccade.layers.boxes import generalised_iou, iou, pairwise_generalised_iou, pairwise_iou, to_centres, to_corners

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def boxes(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Corners, some of them of equal boxes, some without overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator, dtype=dtype)
    sides = 0.02 + 0.5 * torch.rand(count, 2, generator=generator, dtype=dtype)
    return torch.cat((centres - sides / 2, centres + sides / 2), dim=1)


@DTYPES
def test_conversions_are_torchvisions(dtype):
    corners = boxes(50, dtype)
    centres = to_centres(corners)
    assert torch.equal(centres, box_convert(corners, "xyxy", "cxcywh"))
    assert (to_corners(centres) - box_convert(centres, "cxcywh", "xyxy")).abs().max() <= torch.finfo(dtype).eps
    assert (to_corners(centres) - corners).abs().max() <= 2 * torch.finfo(dtype).eps
    assert torch.equal(to_corners(torch.tensor([0.5, 0.25, 0.5, 0.5])), torch.tensor([0.25, 0.0, 0.75, 0.5]))


@DTYPES
def test_pairs_are_torchvisions_to_the_last_bit(dtype):
    a, b = boxes(40, dtype), torch.cat((boxes(30, dtype, 1), boxes(40, dtype)[:3]))
    expected = box_iou(a, b)
    assert (expected == 0).any() and (expected == 1).any()
    assert torch.equal(pairwise_iou(a, b), expected)
    assert torch.equal(pairwise_generalised_iou(a, b), generalized_box_iou(a, b))
    assert torch.equal(iou(a[:33], b), expected[:33].diagonal())
    assert torch.equal(generalised_iou(a[:33], b), generalized_box_iou(a[:33], b).diagonal())
    assert torch.equal(pairwise_iou(a.view(4, 10, 4), b[:12].view(4, 3, 4))[2], box_iou(a[20:30], b[6:9]))


def test_by_hand():
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 4.0])
    assert iou(a, b).item() == pytest.approx(1 / 9)  # 1 in common, of 4 + 6 - 1
    assert generalised_iou(a, b).item() == pytest.approx(1 / 9 - 3 / 12)  # 3 of the hull's 12 in neither
    assert generalised_iou(a, a).item() == 1
    far = torch.tensor([9.0, 0.0, 10.0, 1.0])
    assert iou(a, far).item() == 0 and generalised_iou(a, far).item() == pytest.approx(-(20 - 5) / 20)


def test_boxes_without_area_have_numbers_and_gradients():
    """torchvision divides 0 by 0."""
    point = torch.tensor([0.3, 0.3, 0.3, 0.3], requires_grad=True)
    box = torch.tensor([0.2, 0.2, 0.4, 0.4])
    for other in (point.detach(), box, box + 0.5):
        for measure in (iou, generalised_iou):
            value = measure(point, other)
            (gradient,) = torch.autograd.grad(value, point)
            assert value.isfinite() and gradient.isfinite().all()
    assert iou(point, point).item() == 0 and iou(point, box).item() == 0


def test_half_precision_is_widened():
    pixels = torch.tensor([0.0, 0.0, 600.0, 600.0])  # an area beyond float16's largest number
    assert iou(pixels.half(), pixels.half()).item() == 1
    assert iou(pixels.to(torch.int64), pixels.to(torch.int64)).item() == 1


def test_gradients():
    a = boxes(8, torch.float64).requires_grad_()
    b = boxes(8, torch.float64, 1)
    assert torch.autograd.gradcheck(lambda x: generalised_iou(x, b), a)
    assert torch.autograd.gradcheck(lambda x: iou(x, b), a)
